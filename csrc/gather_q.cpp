// tdkd::gather_q and its backward on CPU. A few values a row: no instruction set matters here.
#include "tensors.h"

namespace tdkd {
namespace {

Tensor gather_q(const Tensor& logits, const Tensor& ids, double temperature,
                std::optional<double> softcap, double logit_scale) {
  const LogitRows rows(logits);
  const Integers id(ids);
  const int64_t k = ids.size(-1);
  const Scale scale = make_scale(temperature, softcap, logit_scale);
  Tensor q = torch::stable::new_empty(logits, rows.shape(k), ScalarType::Float);
  float* out = static_cast<float*>(q.mutable_data_ptr());
  Bound bound(rows.columns);
  with_type(logits, [&](auto type) {
    using T = decltype(type);
    torch::stable::parallel_for(0, rows.count, grain(8 * k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = rows.row<T>(i);
        for (int64_t j = i * k; j < (i + 1) * k; ++j) {
          out[j] = id[j] >= 0 && bound.holds(id[j]) ? scale(to_float(x[id[j]])) : -INFINITY;
        }
      }
    });
  });
  bound.check("ids");
  return q;
}

/// The dense gradient of the logits; duplicates of an id add up in float32, in the order of slots.
Tensor gather_q_backward(const Tensor& grad_q, const Tensor& logits, const Tensor& ids,
                         double temperature, std::optional<double> softcap, double logit_scale) {
  const LogitRows rows(logits);
  const Integers id(ids);
  const int64_t k = ids.size(-1);
  const Scale scale = make_scale(temperature, softcap, logit_scale);
  Tensor grad = torch::stable::new_zeros(logits, rows.shape(rows.columns));
  const Tensor given = torch::stable::contiguous(grad_q);
  const float* dq = static_cast<const float*>(given.const_data_ptr());
  Bound bound(rows.columns);
  with_type(logits, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    torch::stable::parallel_for(0, rows.count, grain(32 * k), [&](int64_t begin, int64_t end) {
      std::vector<std::pair<int64_t, float>> slots;
      for (int64_t i = begin; i < end; ++i) {
        const T* x = rows.row<T>(i);
        T* row = out + i * rows.columns;
        slots.clear();
        for (int64_t j = i * k; j < (i + 1) * k; ++j) {
          if (id[j] >= 0 && bound.holds(id[j])) slots.emplace_back(id[j], dq[j]);
        }
        std::stable_sort(slots.begin(), slots.end(),
                         [](const auto& a, const auto& b) { return a.first < b.first; });
        for (size_t s = 0; s < slots.size();) {
          const int64_t at = slots[s].first;
          float total = 0;
          for (; s < slots.size() && slots[s].first == at; ++s) total += slots[s].second;
          from_float(total == 0 ? 0.0f : total * scale.derivative(to_float(x[at])), row[at]);
        }
      }
    });
  });
  bound.check("ids");
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("gather_q", TORCH_BOX(&gather_q));
  m.impl("gather_q_backward", TORCH_BOX(&gather_q_backward));
}

}  // namespace tdkd
