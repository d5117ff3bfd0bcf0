// tdkd::soft_value and its backward on CPU: float32 [..., k] to [...].
#include "tensors.h"

namespace tdkd {
namespace {

Tensor soft_value(const Tensor& q) {
  const LogitRows rows(q);
  Tensor value = torch::stable::new_empty(q, rows.shape());
  float* out = static_cast<float*>(value.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.count, grain(8 * rows.columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const float* x = rows.row<float>(i);
                                  float peak = -INFINITY;
                                  for (int64_t j = 0; j < rows.columns; ++j)
                                    peak = std::max(peak, x[j]);
                                  if (peak == -INFINITY) peak = 0;
                                  double total = 0;
                                  for (int64_t j = 0; j < rows.columns; ++j)
                                    total += std::exp(x[j] - peak);
                                  out[i] = total == 0 ? -INFINITY : float(peak + std::log(total));
                                }
                              });
  return value;
}

Tensor soft_value_backward(const Tensor& grad_value, const Tensor& q, const Tensor& value) {
  const LogitRows rows(q);
  Tensor grad = torch::stable::new_empty(q, rows.shape(rows.columns));
  const Tensor given = torch::stable::contiguous(grad_value);
  const float* dv = static_cast<const float*>(given.const_data_ptr());
  const float* v = static_cast<const float*>(value.const_data_ptr());
  float* out = static_cast<float*>(grad.mutable_data_ptr());
  torch::stable::parallel_for(
      0, rows.count, grain(8 * rows.columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const float* x = rows.row<float>(i);
          for (int64_t j = 0; j < rows.columns; ++j) {
            out[i * rows.columns + j] = v[i] == -INFINITY ? 0.0f : dv[i] * std::exp(x[j] - v[i]);
          }
        }
      });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("soft_value", TORCH_BOX(&soft_value));
  m.impl("soft_value_backward", TORCH_BOX(&soft_value_backward));
}

}  // namespace tdkd
