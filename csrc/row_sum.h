// No include guard: rows.h includes it once for each instruction set.

constexpr int block_size = block_vectors * Vec::width;

/// Asks for the cache lines of `count` elements that will be read `ahead` bytes after x: hardware
/// prefetchers stop at each page. Addresses past the row do no harm.
template <class T>
inline void prefetch(const T* x, int count, uintptr_t ahead) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(x) + ahead;
  for (uintptr_t at = 0; at < count * sizeof(T); at += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + at));
  }
}

/// sum_j exp(z_j - z(reference)) over a row that is seen once, block by block.
///
/// The reference is an element of the row, at most 8 nats below the largest one so far, so that
/// nothing overflows and the rounding of x - reference stays below the last place of exp(8).
/// A block that rises further above it is summed again, out of the cache, from a new reference.
template <bool capped>
struct RowSum {
  explicit RowSum(const Scale& scale)
      : scale(scale),
        inner(all(capped ? scale.logit_scale / scale.softcap : 1.0f)),
        outer(all(capped ? scale.softcap / scale.temperature : 1.0f)),
        slope(all((capped ? 1.0f : scale.slope()) * 1.44269504f)),
        lowest(all(std::max(-FLT_MAX, -126.0f / ((capped ? 1.0f : scale.slope()) * 1.44269504f)))),
        partial(all(0.0f)) {
    look_from(-FLT_MAX);
  }

  /// Adds block_size elements; returns the maximum of each lane, without regard to NaN.
  template <class T>
  Vec add(const T* x) {
    for (;;) {
      Vec top[2] = {all(-INFINITY), all(-INFINITY)};
      Vec terms[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
#pragma GCC unroll 1
      for (int j = 0; j < block_vectors; j += 4) {
        prefetch(x + j * Vec::width, 4 * Vec::width, 4096);
        Vec a = load(x + j * Vec::width), b = load(x + (j + 1) * Vec::width);
        Vec c = load(x + (j + 2) * Vec::width), d = load(x + (j + 3) * Vec::width);
        top[0] = max(a, max(b, top[0]));
        top[1] = max(c, max(d, top[1]));
        terms[0] = terms[0] + term(a);
        terms[1] = terms[1] + term(b);
        terms[2] = terms[2] + term(c);
        terms[3] = terms[3] + term(d);
      }
      top[0] = max(top[0], top[1]);
      if (!greater(top[0], limit)) {
        partial = partial + ((terms[0] + terms[1]) + (terms[2] + terms[3]));
        return top[0];
      }
      flush();
      float from = reference;
      look_from(highest(top[0]));
      total *= std::exp(scale.wide(from) - scale.wide(reference));
    }
  }

  /// Goes on with a row whose first part another sum has seen.
  void resume(float from, double so_far) {
    look_from(from);
    total = so_far;
  }
  std::pair<float, double> carry() {
    flush();
    return {reference, total};
  }

  /// There was something in the row that has no logsumexp.
  void spoil() { total = NAN; }

  /// Moves what vectors hold into a double; to be called every few blocks.
  void flush() {
    total += sum(partial);
    partial = all(0.0f);
  }

  bool has_nan() {
    flush();
    return std::isnan(total);
  }

  /// logsumexp of the row; NaN where it held NaN or +inf; not to be asked where it was all -inf.
  double log() {
    flush();
    return scale.wide(reference) + std::log(total);
  }

 private:
  Vec term(Vec x) const {
    if constexpr (!capped) return exp_of(x - origin, slope, lowest);
    // a cap leaves -inf where it is
    Vec e = exp_of(outer * tanh_of(x * inner) - origin, slope, lowest);
    return zero_below(e, x, all(-FLT_MAX));
  }

  void look_from(float x) {
    reference = x;
    origin = all(capped ? scale(x) : x);
    limit = all(x + 8.0f / scale.slope());
  }

  Scale scale;
  Vec inner, outer, slope, lowest, partial, origin, limit;
  float reference;
  double total = 0;
};

/// A copy of `count` elements as floats, padded with -inf to a block.
template <class T>
inline void copy_block(const T* x, int64_t count, float* block) {
  for (int64_t i = 0; i < count; ++i) block[i] = to_float(x[i]);
  std::fill(block + count, block + block_size, -INFINITY);
}
