// tdkd::student_rows and its backward on CPU.
#include "student_rows.h"

#include <tuple>

#include "tensors.h"

namespace tdkd {
namespace {

struct Options {
  Options(const Tensor& ids, int64_t columns, const std::optional<Tensor>& weight,
          const std::optional<Tensor>& rows)
      : ids(ids), k(ids.size(-1)) {
    if (weight) {
      require(weight->scalar_type() == ScalarType::Float && weight->numel() == columns,
              "log_weight: expected float32, one a column of ", columns, ", got ", weight->numel());
      held[0] = torch::stable::contiguous(*weight);
      log_weight = static_cast<const float*>(held[0]->const_data_ptr());
    }
    if (rows) {
      held[1] = torch::stable::contiguous(*rows);
      state = static_cast<const bool*>(held[1]->const_data_ptr());
    }
  }

  bool counts(int64_t row) const { return !state || state[row]; }

  /// The ids of a row that are no padding, ascending.
  void slots_of(int64_t row, Bound& bound, std::vector<Slot>& slots) const {
    slots.clear();
    for (int64_t j = 0; j < k; ++j) {
      int64_t id = ids[row * k + j];
      if (id >= 0 && bound.holds(id)) slots.push_back({int32_t(id), int32_t(j)});
    }
    std::sort(slots.begin(), slots.end());
  }

  Integers ids;
  int64_t k;
  const float* log_weight = nullptr;
  const bool* state = nullptr;

 private:
  std::optional<Tensor> held[2];
};

std::tuple<Tensor, Tensor> student_rows(const Tensor& logits, const Tensor& ids, double temperature,
                                        std::optional<double> softcap, double logit_scale,
                                        std::optional<Tensor> log_weight,
                                        std::optional<Tensor> state) {
  const LogitRows rows(logits);
  const Options given(ids, rows.columns, log_weight, state);
  const Scale scale = make_scale(temperature, softcap, logit_scale);
  Tensor z = torch::stable::new_empty(logits, rows.shape(given.k), ScalarType::Float);
  Tensor log_rest = torch::stable::new_empty(logits, rows.shape(), ScalarType::Double);
  float* value = static_cast<float*>(z.mutable_data_ptr());
  double* rest = static_cast<double*>(log_rest.mutable_data_ptr());
  Bound bound(rows.columns);
  const Isa isa = choose_isa();

  with_type(logits, [&](auto type) {
    using T = decltype(type);
    auto body = scale.capped() ? TDKD_BODY_FOR(isa, student_row<T, true>)
                               : TDKD_BODY_FOR(isa, student_row<T, false>);
    torch::stable::parallel_for(
        0, rows.count, grain(rows.columns), [&](int64_t begin, int64_t end) {
          std::vector<Slot> slots;
          for (int64_t i = begin; i < end; ++i) {
            float* row_value = value + i * given.k;
            std::fill(row_value, row_value + given.k, -INFINITY);
            rest[i] = -INFINITY;
            if (!given.counts(i)) continue;
            given.slots_of(i, bound, slots);
            body(rows.row<T>(i), given.log_weight, rows.columns, scale, slots, row_value, rest + i);
          }
        });
  });
  bound.check("ids");
  return {z, log_rest};
}

/// Writes the gradient of logits into `grad`, which may be the logits themselves.
void write_gradient(const Tensor& grad_z, const Tensor& grad_rest, const Tensor& logits,
                    const Tensor& ids, const Tensor& log_rest, const Scale& scale,
                    const std::optional<Tensor>& log_weight, const std::optional<Tensor>& state,
                    Tensor& grad) {
  const LogitRows rows(logits);
  const Options given(ids, rows.columns, log_weight, state);
  const Tensor from_z = torch::stable::contiguous(grad_z);
  const Tensor from_rest = torch::stable::contiguous(grad_rest);
  const float* dz = static_cast<const float*>(from_z.const_data_ptr());
  const double* drest = static_cast<const double*>(from_rest.const_data_ptr());
  const double* rest = static_cast<const double*>(log_rest.const_data_ptr());
  Bound bound(rows.columns);
  const Isa isa = choose_isa();

  with_type(logits, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(grad.mutable_data_ptr());
    auto body = scale.capped() ? TDKD_BODY_FOR(isa, student_row_backward<T, true>)
                               : TDKD_BODY_FOR(isa, student_row_backward<T, false>);
    torch::stable::parallel_for(
        0, rows.count, grain(rows.columns), [&](int64_t begin, int64_t end) {
          std::vector<Slot> slots;
          std::vector<float> of_slots(given.k);
          for (int64_t i = begin; i < end; ++i) {
            T* row_grad = out + i * rows.columns;
            if (!given.counts(i)) {
              std::fill(row_grad, row_grad + rows.columns, T{});
              continue;
            }
            given.slots_of(i, bound, slots);
            body(rows.row<T>(i), given.log_weight, rows.columns, scale, slots, rest[i],
                 dz + i * given.k, float(drest[i]), of_slots.data(), row_grad);
          }
        });
  });
  bound.check("ids");
}

Tensor student_rows_backward(const Tensor& grad_z, const Tensor& grad_rest, const Tensor& logits,
                             const Tensor& ids, const Tensor& log_rest, double temperature,
                             std::optional<double> softcap, double logit_scale,
                             std::optional<Tensor> log_weight, std::optional<Tensor> state) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  write_gradient(grad_z, grad_rest, logits, ids, log_rest,
                 make_scale(temperature, softcap, logit_scale), log_weight, state, grad);
  return grad;
}

void student_rows_backward_(const Tensor& grad_z, const Tensor& grad_rest, Tensor logits,
                            const Tensor& ids, const Tensor& log_rest, double temperature,
                            std::optional<double> softcap, double logit_scale,
                            std::optional<Tensor> log_weight, std::optional<Tensor> state) {
  require(logits.is_contiguous(), "logits: expected contiguous ones, to be overwritten");
  write_gradient(grad_z, grad_rest, logits, ids, log_rest,
                 make_scale(temperature, softcap, logit_scale), log_weight, state, logits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("student_rows", TORCH_BOX(&student_rows));
  m.impl("student_rows_backward", TORCH_BOX(&student_rows_backward));
  m.impl("student_rows_backward_", TORCH_BOX(&student_rows_backward_));
}

}  // namespace tdkd
