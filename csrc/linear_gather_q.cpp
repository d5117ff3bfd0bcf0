// tdkd::head_products and its backward on CPU: hidden [N, H] with the rows ids [N, k] of a head.
#include "rows.h"

#define TDKD_BODY "head_row.h"
#include "every_isa.h"
#include "tensors.h"

namespace tdkd {
namespace {

const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->const_data_ptr()) : nullptr;
}

Tensor head_products(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& ids) {
  const LogitRows h(hidden), head(weight);
  const Integers id(ids);
  const int64_t k = ids.size(-1);
  Tensor products = torch::stable::new_empty(hidden, h.shape(k), ScalarType::Float);
  float* out = static_cast<float*>(products.mutable_data_ptr());
  std::optional<Tensor> held;
  if (bias) held = torch::stable::contiguous(*bias);
  const float* b = floats(held);
  Bound bound(head.count);
  const Isa isa = choose_isa();
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    auto body = TDKD_BODY_FOR(isa, dot<T>);
    torch::stable::parallel_for(0, h.count, grain(k * h.columns), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * k; j < end * k; ++j) {
        const int64_t at = id[j];
        const bool member = at >= 0 && bound.holds(at);
        out[j] = member ? body(h.row<float>(j / k), head.row<T>(at), h.columns) : 0.0f;
        if (member && b) out[j] += b[at];
      }
    });
  });
  bound.check("ids");
  return products;
}

/// Slots by id, those of one id in their order: a counting sort.
struct Segments {
  Segments(const Integers& id, int64_t slots, int64_t rows) : start(rows + 1) {
    for (int64_t j = 0; j < slots; ++j) {
      if (id[j] >= 0) ++start[id[j] + 1];
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (start[i + 1]) touched.push_back(i);
      start[i + 1] += start[i];
    }
    slot.resize(start[rows]);
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t j = 0; j < slots; ++j) {
      if (id[j] >= 0) slot[next[id[j]]++] = j;
    }
  }

  std::vector<int64_t> start, slot, touched;
};

/// Gradients of hidden, and (where `of_head`) of weight and bias: each touched row is summed in
/// float32 in the order of slots, and written once; the others are zero.
std::tuple<Tensor, Tensor, Tensor> head_products_backward(const Tensor& grad, const Tensor& hidden,
                                                          const Tensor& weight, const Tensor& ids,
                                                          bool of_head) {
  const LogitRows h(hidden), head(weight);
  const Integers id(ids);
  const int64_t k = ids.size(-1), width = h.columns;
  const Tensor given = torch::stable::contiguous(grad);
  const float* g = static_cast<const float*>(given.const_data_ptr());
  Tensor by_hidden = torch::stable::new_zeros(hidden, h.shape(width));
  Tensor by_weight = torch::stable::new_zeros(weight, {of_head ? head.count : 0, width});
  Tensor by_bias = torch::stable::new_zeros(hidden, {of_head ? head.count : 0});
  float* dh = static_cast<float*>(by_hidden.mutable_data_ptr());
  float* db = static_cast<float*>(by_bias.mutable_data_ptr());
  const Isa isa = choose_isa();
  with_type(weight, [&](auto type) {
    using T = decltype(type);
    auto add_row = TDKD_BODY_FOR(isa, add_scaled<T>);
    torch::stable::parallel_for(0, h.count, grain(k * width), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * k; j < end * k; ++j) {
        if (id[j] >= 0 && g[j] != 0) add_row(g[j], head.row<T>(id[j]), width, dh + j / k * width);
      }
    });
    if (!of_head) return;
    const Segments segments(id, h.count * k, head.count);
    T* dw = static_cast<T*>(by_weight.mutable_data_ptr());
    auto add_hidden = TDKD_BODY_FOR(isa, add_scaled<float>);
    torch::stable::parallel_for(
        0, int64_t(segments.touched.size()), grain(8 * width), [&](int64_t begin, int64_t end) {
          std::vector<float> sum(width);
          for (int64_t t = begin; t < end; ++t) {
            const int64_t at = segments.touched[t];
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t s = segments.start[at]; s < segments.start[at + 1]; ++s) {
              const int64_t j = segments.slot[s];
              if (g[j] != 0) add_hidden(g[j], h.row<float>(j / k), width, sum.data());
              db[at] += g[j];
            }
            for (int64_t i = 0; i < width; ++i) from_float(sum[i], dw[at * width + i]);
          }
        });
  });
  return {by_hidden, by_weight, by_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("head_products", TORCH_BOX(&head_products));
  m.impl("head_products_backward", TORCH_BOX(&head_products_backward));
}

}  // namespace tdkd
