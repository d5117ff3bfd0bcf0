// tdkd::select_actions on CPU.
#include "select_actions.h"

#include <array>
#include <tuple>

#include "tensors.h"

namespace tdkd {

void Candidates::sort() {
  const size_t n = values.size();
  keys.resize(n);
  for (size_t i = 0; i < n; ++i) {
    keys[i] = uint64_t(~(uint32_t(ordered(values[i])) ^ 0x80000000u)) << 32 | uint32_t(ids[i]);
  }
  if (n < 192) {
    std::sort(keys.begin(), keys.end());
  } else {
    // ids ascend already, so that a stable sort by the upper half is enough
    other.resize(n);
    for (int shift = 32; shift < 64; shift += 8) {
      std::array<uint32_t, 256> start{};
      for (uint64_t key : keys) ++start[key >> shift & 255];
      uint32_t at = 0;
      for (uint32_t& bin : start) at += std::exchange(bin, at);
      for (uint64_t key : keys) other[start[key >> shift & 255]++] = key;
      keys.swap(other);
    }
  }
  for (size_t i = 0; i < n; ++i) {
    values[i] = from_ordered(int32_t(~uint32_t(keys[i] >> 32) ^ 0x80000000u));
    ids[i] = int32_t(uint32_t(keys[i]));
  }
}

void write_empty(int64_t k, int32_t* ids, float* log_probs, int32_t* count) {
  std::fill(ids, ids + k, -1);
  std::fill(log_probs, log_probs + k, -INFINITY);
  *count = 0;
}

void write_set(const Candidates& found, const Selection& how, double log_z, int64_t taken,
               float taken_logit, int32_t* ids, float* log_probs, int32_t* count) {
  const int64_t k = how.k, n = std::min(found.size(), k);
  int64_t members = 0;
  bool has_taken = false;
  double before = 0;
  for (; members < n && before < how.reach; ++members) {
    ids[members] = found.ids[members];
    log_probs[members] = float(how.scale(found.values[members]) - log_z);
    has_taken |= ids[members] == taken;
    if (how.reach < 1) before += std::exp(double(log_probs[members]));
  }
  std::fill(ids + members, ids + k, -1);
  std::fill(log_probs + members, log_probs + k, -INFINITY);
  if (taken >= 0 && !has_taken) {
    int64_t slot = std::min(members, k - 1);
    ids[slot] = int32_t(taken);
    log_probs[slot] = float(how.scale(taken_logit) - log_z);
    members = slot + 1;
  }
  *count = int32_t(members);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> select_actions(const Tensor& logits, int64_t k, double top_p,
                                                  double temperature, std::optional<double> softcap,
                                                  double logit_scale, std::optional<Tensor> include,
                                                  std::optional<Tensor> state) {
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
    torch::stable::parallel_for(0, rows.count, grain(rows.columns), [&](int64_t begin, int64_t end) {
      SelectScratch scratch(rows.columns, std::min(k, rows.columns));
      for (int64_t i = begin; i < end; ++i) {
        int64_t with = taken ? (*taken)[i] : -1;
        if ((counts && !counts[i]) || !bound.holds(with)) {
          write_empty(k, id + i * k, log_prob + i * k, members + i);
          continue;
        }
        body(rows.row<T>(i), rows.columns, how, with, scratch, id + i * k, log_prob + i * k,
             members + i);
      }
    });
  });
  bound.check("include");
  return {ids, log_probs, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) { m.impl("select_actions", TORCH_BOX(&select_actions)); }

}  // namespace tdkd
