// tdkd::select_actions on CPU.
#include "select_actions.h"

#include <tuple>

#include "tensors.h"

namespace tdkd {

namespace {

struct Outputs {
  Tensor ids, log_probs, count;
};

/// Panel `logits` of rows of `columns` logits, from the column `first` on.
void select_panel(const LogitRows& rows, int64_t first, int64_t columns, const Selection& how,
                  const std::optional<Tensor>& include, const std::optional<Tensor>& state,
                  Carry* carry, Outputs& out) {
  const int64_t k = how.k;
  const bool last = first + rows.columns == columns;
  int32_t* id = static_cast<int32_t*>(out.ids.mutable_data_ptr());
  float* log_prob = static_cast<float*>(out.log_probs.mutable_data_ptr());
  int32_t* members = static_cast<int32_t*>(out.count.mutable_data_ptr());
  std::optional<Integers> taken;
  if (include) taken.emplace(*include);
  std::optional<Tensor> states;
  if (state) states = torch::stable::contiguous(*state);
  const bool* counts = states ? static_cast<const bool*>(states->const_data_ptr()) : nullptr;
  Bound bound(columns);
  const Isa isa = choose_isa();

  with_type(rows.tensor, [&](auto type) {
    using T = decltype(type);
    auto body = how.scale.capped() ? TDKD_BODY_FOR(isa, select_row<T, true>)
                                   : TDKD_BODY_FOR(isa, select_row<T, false>);
    torch::stable::parallel_for(
        0, rows.count, grain(rows.columns), [&](int64_t begin, int64_t end) {
          SelectScratch scratch(rows.columns, std::min(k, columns));
          for (int64_t i = begin; i < end; ++i) {
            int64_t with = taken ? (*taken)[i] : -1;
            if ((counts && !counts[i]) || !bound.holds(with)) {
              write_empty(k, id + i * k, log_prob + i * k, members + i);
              continue;
            }
            Carry none{};
            body(rows.row<T>(i), rows.columns, first, last, how, with, scratch,
                 carry ? carry[i] : none, id + i * k, log_prob + i * k, members + i);
          }
        });
  });
  bound.check("include");
}

Selection selection(int64_t k, double top_p, double temperature, std::optional<double> softcap,
                    double logit_scale) {
  require(k >= 1, "k: expected an int >= 1, got ", k);
  return {k, top_p < 1 ? top_p * (1.0 - 1e-5) : 2.0, make_scale(temperature, softcap, logit_scale)};
}

std::tuple<Tensor, Tensor, Tensor> select_actions(const Tensor& logits, int64_t k, double top_p,
                                                  double temperature, std::optional<double> softcap,
                                                  double logit_scale, std::optional<Tensor> include,
                                                  std::optional<Tensor> state) {
  const LogitRows rows(logits);
  const Selection how = selection(k, top_p, temperature, softcap, logit_scale);
  Outputs out{torch::stable::new_empty(logits, rows.shape(k), ScalarType::Int),
              torch::stable::new_empty(logits, rows.shape(k), ScalarType::Float),
              torch::stable::new_empty(logits, rows.shape(), ScalarType::Int)};
  select_panel(rows, 0, rows.columns, how, include, state, nullptr, out);
  return {out.ids, out.log_probs, out.count};
}

void select_panel_(const Tensor& logits, int64_t first, int64_t columns, int64_t k, double top_p,
                   double temperature, std::optional<double> softcap, double logit_scale,
                   std::optional<Tensor> include, std::optional<Tensor> state, Tensor ids,
                   Tensor log_probs, Tensor count, Tensor carry) {
  const LogitRows rows(logits);
  const Selection how = selection(k, top_p, temperature, softcap, logit_scale);
  auto fits = [&](const Tensor& x, ScalarType type, int64_t size) {
    return x.is_contiguous() && x.scalar_type() == type && x.numel() == rows.count * size;
  };
  require(fits(ids, ScalarType::Int, k) && fits(log_probs, ScalarType::Float, k) &&
              fits(count, ScalarType::Int, 1) && fits(carry, ScalarType::Double, 2),
          "select_panel_: expected the contiguous outputs of select_actions, and a carry of two "
          "float64 a row");
  require(first >= 0 && first + rows.columns <= columns, "first: expected columns ", first, " to ",
          first + rows.columns, " within ", columns);
  Outputs out{ids, log_probs, count};
  select_panel(rows, first, columns, how, include, state,
               static_cast<Carry*>(carry.mutable_data_ptr()), out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("select_actions", TORCH_BOX(&select_actions));
  m.impl("select_panel_", TORCH_BOX(&select_panel_));
}

}  // namespace tdkd
