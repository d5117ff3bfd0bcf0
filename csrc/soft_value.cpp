// tdkd::soft_value and its backward on CPU: float32 [..., k] to [...].
#include "tensors.h"

namespace tdkd {
namespace {

/// The largest of a row, or 0 where nothing is above -inf: the level from which it is summed.
float level_of(const float* x, int64_t k) {
  float peak = -INFINITY;
  for (int64_t j = 0; j < k; ++j) peak = std::max(peak, x[j]);
  return peak == -INFINITY ? 0.0f : peak;
}

Tensor soft_value(const Tensor& q) {
  const LogitRows rows(q);
  Tensor value = torch::stable::new_empty(q, rows.shape());
  float* out = static_cast<float*>(value.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.count, grain(8 * rows.columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const float* x = rows.row<float>(i);
                                  const float level = level_of(x, rows.columns);
                                  double total = 0;
                                  for (int64_t j = 0; j < rows.columns; ++j)
                                    total += std::exp(x[j] - level);
                                  out[i] = total == 0 ? -INFINITY : float(level + std::log(total));
                                }
                              });
  return value;
}

// The row is summed again: exp(q - value) would carry the rounding of value, 3e-5 at 1000.
Tensor soft_value_backward(const Tensor& grad_value, const Tensor& q) {
  const LogitRows rows(q);
  Tensor grad = torch::stable::new_empty(q, rows.shape(rows.columns));
  const Tensor given = torch::stable::contiguous(grad_value);
  const float* dv = static_cast<const float*>(given.const_data_ptr());
  float* out = static_cast<float*>(grad.mutable_data_ptr());
  torch::stable::parallel_for(0, rows.count, grain(16 * rows.columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const float* x = rows.row<float>(i);
                                  float* row_grad = out + i * rows.columns;
                                  const float level = level_of(x, rows.columns);
                                  double total = 0;
                                  for (int64_t j = 0; j < rows.columns; ++j)
                                    total += row_grad[j] = std::exp(x[j] - level);
                                  const float share = total == 0 ? 0.0f : float(dv[i] / total);
                                  for (int64_t j = 0; j < rows.columns; ++j) row_grad[j] *= share;
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
