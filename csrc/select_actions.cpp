// tdkd::select_actions on CPU.
#include "select_actions.h"

#include <tuple>

#include "tensors.h"

namespace tdkd {

namespace {

std::tuple<Tensor, Tensor, Tensor> select_actions(const Tensor& logits, int64_t k, double top_p,
                                                  double temperature, std::optional<double> softcap,
                                                  double logit_scale, std::optional<Tensor> include,
                                                  std::optional<Tensor> state) {
  require(k >= 1, "k: expected an int >= 1, got ", k);
  const LogitRows rows(logits);
  const Selection how{k, top_p < 1 ? top_p * (1.0 - 1e-5) : 2.0,
                      make_scale(temperature, softcap, logit_scale)};
  Tensor ids = torch::stable::new_empty(logits, rows.shape(k), ScalarType::Int);
  Tensor log_probs = torch::stable::new_empty(logits, rows.shape(k), ScalarType::Float);
  Tensor count = torch::stable::new_empty(logits, rows.shape(), ScalarType::Int);
  int32_t* id = static_cast<int32_t*>(ids.mutable_data_ptr());
  float* log_prob = static_cast<float*>(log_probs.mutable_data_ptr());
  int32_t* members = static_cast<int32_t*>(count.mutable_data_ptr());
  std::optional<Integers> taken;
  if (include) taken.emplace(*include);
  std::optional<Tensor> states;
  if (state) states = torch::stable::contiguous(*state);
  const bool* counts = states ? static_cast<const bool*>(states->const_data_ptr()) : nullptr;
  Bound bound(rows.columns);
  const Isa isa = choose_isa();

  with_type(logits, [&](auto type) {
    using T = decltype(type);
    auto body = how.scale.capped() ? TDKD_BODY_FOR(isa, select_row<T, true>)
                                   : TDKD_BODY_FOR(isa, select_row<T, false>);
    torch::stable::parallel_for(0, rows.count, grain(rows.columns),
                                [&](int64_t begin, int64_t end) {
                                  SelectScratch scratch(rows.columns, std::min(k, rows.columns));
                                  for (int64_t i = begin; i < end; ++i) {
                                    int64_t with = taken ? (*taken)[i] : -1;
                                    if ((counts && !counts[i]) || !bound.holds(with)) {
                                      write_empty(k, id + i * k, log_prob + i * k, members + i);
                                      continue;
                                    }
                                    body(rows.row<T>(i), rows.columns, how, with, scratch,
                                         id + i * k, log_prob + i * k, members + i);
                                  }
                                });
  });
  bound.check("include");
  return {ids, log_probs, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) { m.impl("select_actions", TORCH_BOX(&select_actions)); }

}  // namespace tdkd
