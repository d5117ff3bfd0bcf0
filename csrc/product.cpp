// tdkd::product_ on CPU: bfloat16 matrices, a float32 result. PyTorch's own products round theirs
// to bfloat16, and its float32 ones take two to three times as long (measured with AMX).
//
// The products of blocks are oneDNN's, as PyTorch exports them; here blocks are cut, laid out as
// those want them, and added up. All blocks have one of a few sizes, padded with zeros: oneDNN
// compiles each size once a thread and keeps it.
#include "tensors.h"

#if TDKD_X86 && defined(__linux__)
#define TDKD_BLOCK_PRODUCTS 1
#else
#define TDKD_BLOCK_PRODUCTS 0
#endif

#if TDKD_BLOCK_PRODUCTS
// Declared here, since the stable ABI has none: weak, so that a torch without them has no product
// of bfloat16, and loads all the same.
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {
__attribute__((weak, visibility("default"))) void brgemm(int64_t M, int64_t N, int64_t K,
                                                         int64_t ld_a, int64_t ld_b, int64_t ld_c,
                                                         bool add_C, const c10::BFloat16* A,
                                                         const c10::BFloat16* B, float* C,
                                                         bool is_vnni);
__attribute__((weak, visibility("default"))) void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas
#endif

namespace tdkd {
namespace {

#if TDKD_BLOCK_PRODUCTS

using at::native::cpublas::brgemm;
using at::native::cpublas::brgemm_release;

int64_t over(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Two neighbours along the dimension that is summed over: what one lane of a dot product takes.
using Pair = uint32_t;

constexpr int64_t side = 64;         // rows and columns of a block of the result
constexpr int64_t strip = 32;        // pairs that are laid out at a time
constexpr int64_t most_pairs = 256;  // of a block
constexpr int64_t most_side = 10;    // blocks of a tile, either way
constexpr int64_t sum_row = most_side * side;
constexpr int64_t row_pairs = most_pairs + 16;  // rows of `a`, laid out, begin in other cache sets

/// Room that begins with a cache line: a block's rows that straddle two take twice as long.
template <class T, int64_t size>
T* room() {
  struct alignas(64) Line {
    T x[64 / sizeof(T)];
  };
  thread_local std::vector<Line> lines(over(size * sizeof(T), 64));
  return lines[0].x;
}

/// A matrix [lines, depth] that is summed over its depth, with a unit stride in one dimension.
struct Matrix {
  const uint16_t* data;
  int64_t lines, depth, line, step;

  /// Whether it is the lines that are contiguous.
  bool across() const { return step != 1; }
};

TDKD_AVX512_BEGIN

/// Pairs of one line, where the depth is contiguous; zero beyond `end`.
void load_line(const Matrix& x, int64_t line, int64_t first, int64_t end, int64_t pairs,
               Pair* out) {
  const int64_t here = line < x.lines ? std::clamp<int64_t>(end - first, 0, 2 * pairs) : 0;
  if (here) std::memcpy(out, x.data + line * x.line + first, here * sizeof(uint16_t));
  std::memset(reinterpret_cast<uint16_t*>(out) + here, 0, (2 * pairs - here) * sizeof(uint16_t));
}

/// [strip, side] pairs of lines `at` on, where the lines are contiguous.
void load_across(const Matrix& x, int64_t at, int64_t first, int64_t end, Pair* out) {
  const int64_t count = std::min(x.lines - at, side);
  for (int64_t k = 0; k < strip; ++k, out += side) {
    const int64_t depth = first + 2 * k;
    if (depth >= end) {
      std::fill(out, out + side, 0);
      continue;
    }
    const uint16_t* low = x.data + depth * x.step + at;
    if (depth + 1 < end) {
      const uint16_t* high = low + x.step;
      for (int64_t i = 0; i < count; ++i) out[i] = Pair(low[i]) | Pair(high[i]) << 16;
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = low[i];
    }
    std::fill(out + count, out + side, 0);
  }
}

/// 16 x 16 pairs; rows are `from_row` numbers and `to_row` pairs apart.
void transpose_16(const uint16_t* from, int64_t from_row, Pair* to, int64_t to_row) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_row);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // r[4 b + i] has the columns 4 c + i of rows 4 b to 4 b + 3
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(to + (8 + i) * to_row, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(to + (4 + i) * to_row, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(to + (12 + i) * to_row, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

/// `a` as [side, row_pairs].
void lay_rows(const Matrix& x, int64_t at, int64_t first, int64_t end, int64_t pairs, Pair* out) {
  if (!x.across()) {
    for (int64_t i = 0; i < side; ++i) {
      load_line(x, at + i, first, end, pairs, out + i * row_pairs);
    }
    return;
  }
  Pair strips[strip * side];
  for (int64_t p = 0; p < pairs; p += strip) {
    load_across(x, at, first + 2 * p, end, strips);
    for (int64_t i = 0; i < side; i += 16) {
      for (int64_t k = 0; k < strip; k += 16) {
        transpose_16(reinterpret_cast<const uint16_t*>(strips + k * side + i), 2 * side,
                     out + i * row_pairs + p + k, row_pairs);
      }
    }
  }
}

/// `b` as [pairs, side].
void lay_columns(const Matrix& x, int64_t at, int64_t first, int64_t end, int64_t pairs,
                 Pair* out) {
  if (x.across()) {
    for (int64_t p = 0; p < pairs; p += strip, out += strip * side) {
      load_across(x, at, first + 2 * p, end, out);
    }
    return;
  }
  Pair lines[16 * 16];
  for (int64_t i = 0; i < side; i += 16) {  // 16 streams at a time, which the CPU fetches ahead
    for (int64_t p = 0; p < pairs; p += 16) {
      const int64_t from = first + 2 * p;
      Pair* square = out + p * side + i;
      if (at + i + 16 <= x.lines && from + 32 <= end) {
        const uint16_t* inside = x.data + (at + i) * x.line + from;
        transpose_16(inside, x.line, square, side);
      } else {
        for (int64_t j = 0; j < 16; ++j) load_line(x, at + i + j, from, end, 16, lines + 16 * j);
        transpose_16(reinterpret_cast<const uint16_t*>(lines), 32, square, side);
      }
    }
  }
}

/// Of a tile's sum what lies in the matrix, past the caches where nothing is added to: a chunk of
/// logits is larger than they are.
void write_out(const float* sum, int64_t rows, int64_t columns, bool add, float* out,
               int64_t out_row) {
  for (int64_t i = 0; i < rows; ++i, sum += sum_row, out += out_row) {
    int64_t j = 0;
    if (add) {
      for (; j < columns; ++j) out[j] += sum[j];
      continue;
    }
    for (; j < columns && reinterpret_cast<uintptr_t>(out + j) % 64; ++j) out[j] = sum[j];
    for (; j + 16 <= columns; j += 16) _mm512_stream_ps(out + j, _mm512_loadu_ps(sum + j));
    for (; j < columns; ++j) out[j] = sum[j];
  }
  _mm_sfence();  // before another thread is told that the result is there
}

TDKD_END

/// Blocks of a tile each way, such that the slowest thread is done first: a block's product costs
/// about four times what laying out one of its sides does.
std::pair<int64_t, int64_t> choose_tile(int64_t rows, int64_t columns, int64_t threads) {
  std::pair<int64_t, int64_t> best{1, 1};
  int64_t least = INT64_MAX;
  for (int64_t m = 1; m <= std::min(rows, most_side); ++m) {
    for (int64_t n = 1; n <= std::min(columns, most_side) && m * n <= 4 * most_side; ++n) {
      const int64_t tiles = over(rows, m) * over(columns, n);
      const int64_t cost = over(tiles, threads) * (4 * m * n + m + n);
      if (cost < least) {
        least = cost;
        best = {m, n};
      }
    }
  }
  return best;
}

struct Product {
  Matrix a, b;  // b as [columns, depth]
  float* out;
  int64_t out_row;
  bool add;

  void tile(int64_t row, int64_t column, int64_t m, int64_t n) const {
    m = std::min(m, over(a.lines - row, side));
    n = std::min(n, over(b.lines - column, side));
    Pair* left = room<Pair, side * row_pairs>();
    Pair* right = room<Pair, most_side * side * most_pairs>();
    float* sum = room<float, most_side * side * sum_row>();
    const int64_t parts = over(a.depth, 2 * most_pairs);
    const int64_t pairs = over(over(a.depth, 2 * parts), strip) * strip;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = 2 * part * pairs, end = std::min(a.depth, first + 2 * pairs);
      for (int64_t j = 0; j < n; ++j) {
        lay_columns(b, column + j * side, first, end, pairs, right + j * side * pairs);
      }
      for (int64_t i = 0; i < m; ++i) {
        lay_rows(a, row + i * side, first, end, pairs, left);
        for (int64_t j = 0; j < n; ++j) {
          brgemm(side, side, 2 * pairs, 2 * row_pairs, side, sum_row, part > 0,
                 reinterpret_cast<const c10::BFloat16*>(left),
                 reinterpret_cast<const c10::BFloat16*>(right + j * side * pairs),
                 sum + (i * sum_row + j) * side, true);
        }
      }
    }
    write_out(sum, std::min(m * side, a.lines - row), std::min(n * side, b.lines - column), add,
              out + row * out_row + column, out_row);
  }

  void run() const {
    const int64_t rows = over(a.lines, side), columns = over(b.lines, side);
    const int64_t threads = torch::stable::get_num_threads();
    const auto [m, n] = choose_tile(rows, columns, threads);
    const int64_t across = over(columns, n);
    torch::stable::parallel_for(0, over(rows, m) * across, 1,
                                [&, m = m, n = n](int64_t begin, int64_t end) {
                                  for (int64_t t = begin; t < end; ++t) {
                                    tile(t / across * m * side, t % across * n * side, m, n);
                                  }
                                  brgemm_release(true);
                                });
  }
};

/// A matrix and what holds its numbers: a copy where neither stride is 1.
struct Operand {
  Operand(const char* name, const Tensor& x, int lines) : tensor(x) {
    require(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, name,
            ": expected a bfloat16 matrix");
    if (x.stride(0) != 1 && x.stride(1) != 1) tensor = torch::stable::contiguous(x);
    const int depth = 1 - lines;
    matrix = {static_cast<const uint16_t*>(tensor.const_data_ptr()), tensor.size(lines),
              tensor.size(depth), tensor.size(lines) == 1 ? 1 : tensor.stride(lines),
              tensor.size(depth) == 1 ? 1 : tensor.stride(depth)};
  }

  Tensor tensor;
  Matrix matrix;
};

/// Whether oneDNN multiplies blocks of bfloat16 on this CPU, and in the layout used here.
bool able() {
  static const bool found = [] {
    if (!brgemm || !brgemm_release || !__builtin_cpu_supports("avx512bf16")) return false;
    try {  // numbers that bfloat16 holds, and tells apart
      const int n = 32;
      std::vector<uint16_t> x(n * n), y(n * n);
      std::vector<float> wanted(n * n), sum(n * n);
      for (int i = 0; i < n; ++i) {
        for (int k = 0; k < n; ++k) {
          BFloat16 of_x, of_y;
          from_float(float((3 * i + k) % 11), of_x);
          from_float(float((i + 5 * k) % 13), of_y);
          x[i * n + k] = of_x.bits;
          y[k / 2 * 2 * n + 2 * i + k % 2] = of_y.bits;
          for (int j = 0; j < n; ++j)
            wanted[i * n + j] += float((3 * i + k) % 11 * ((j + 5 * k) % 13));
        }
      }
      brgemm(n, n, n, n, n, n, false, reinterpret_cast<const c10::BFloat16*>(x.data()),
             reinterpret_cast<const c10::BFloat16*>(y.data()), sum.data(), true);
      brgemm_release(true);
      return sum == wanted;
    } catch (const std::exception&) {  // oneDNN is switched off, or was told of a smaller CPU
      return false;
    }
  }();
  return found;
}

bool multiplies() { return choose_isa() == Isa::avx512 && able(); }

void product_(Tensor out, const Tensor& a, const Tensor& b, bool add) {
  const Operand left("a", a, 0), right("b", b, 1);
  const Product product{left.matrix, right.matrix, static_cast<float*>(out.mutable_data_ptr()),
                        out.stride(0), add};
  require(able(), "product_: this CPU or this torch has no product of bfloat16");
  require(product.a.depth == product.b.depth, "a, b: expected equal depths, got ", product.a.depth,
          " and ", product.b.depth);
  require(
      out.dim() == 2 && out.scalar_type() == ScalarType::Float && out.size(0) == product.a.lines &&
          out.size(1) == product.b.lines && (out.stride(1) == 1 || out.size(1) == 1),
      "out: expected float32 [", product.a.lines, ", ", product.b.lines, "] with contiguous rows");
  if (product.a.depth) {
    product.run();
  } else if (!add) {
    torch::stable::zero_(out);
  }
}

#else

bool multiplies() { return false; }

void product_(Tensor, const Tensor&, const Tensor&, bool) {
  require(false, "product_: there is no product of bfloat16 here");
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tdkd, m) { m.def("multiplies_bfloat16() -> bool"); }

STABLE_TORCH_LIBRARY_IMPL(tdkd, CompositeExplicitAutograd, m) {
  m.impl("multiplies_bfloat16", TORCH_BOX(&multiplies));
}

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) { m.impl("product_", TORCH_BOX(&product_)); }

}  // namespace tdkd
