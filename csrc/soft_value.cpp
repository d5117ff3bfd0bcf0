// tdkd::soft_value and its backward on CPU: float32 [..., k] to [...].
#include "rows.h"

#define TDKD_BODY "soft_value_row.h"
#include "every_isa.h"
#include "tensors.h"

namespace tdkd {
namespace {

Tensor soft_value(const Tensor& q) {
  const LogitRows rows(q);
  Tensor value = torch::stable::new_empty(q, rows.shape());
  float* out = static_cast<float*>(value.mutable_data_ptr());
  auto body = TDKD_BODY_FOR(choose_isa(), soft_value_row);
  torch::stable::parallel_for(0, rows.count, grain(2 * rows.columns),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i)
                                  out[i] = body(rows.row<float>(i), rows.columns);
                              });
  return value;
}

Tensor soft_value_backward(const Tensor& grad_value, const Tensor& q) {
  const LogitRows rows(q);
  Tensor grad = torch::stable::new_empty(q, rows.shape(rows.columns));
  const Tensor given = torch::stable::contiguous(grad_value);
  const float* dv = static_cast<const float*>(given.const_data_ptr());
  float* out = static_cast<float*>(grad.mutable_data_ptr());
  auto body = TDKD_BODY_FOR(choose_isa(), soft_value_row_backward);
  torch::stable::parallel_for(
      0, rows.count, grain(2 * rows.columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          body(rows.row<float>(i), rows.columns, dv[i], out + i * rows.columns);
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
