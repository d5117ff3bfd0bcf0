// Selection of action sets, row by row. No torch here.
#pragma once

#include <vector>

#include "rows.h"

namespace tdkd {

struct Selection {
  int64_t k;
  double reach;  // probability that a prefix must reach; 1 or more: as many as k
  Scale scale;
};

/// int32 in the order of floats, for all but NaN; -0 comes just before +0.
inline int32_t ordered(float x) {
  int32_t bits = std::bit_cast<int32_t>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float from_ordered(int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

/// Elements that may be members, in ascending order of ids.
struct Candidates {
  std::vector<float> values;
  std::vector<int32_t> ids;
  int64_t ties;  // how many more elements that equal the threshold are of use

  int64_t size() const { return int64_t(values.size()); }

  void clear(int64_t k) {
    values.clear();
    ids.clear();
    ties = k;
  }

  void push(float value, int32_t id, float t) {
    if (value == t) {
      if (!ties) return;
      --ties;
    }
    values.push_back(value + 0.0f);  // -0 and +0 tie
    ids.push_back(id);
  }

  /// Leaves k of them: those above t, and the first that equal it.
  void keep(float t, int64_t k) {
    int64_t above = std::count_if(values.begin(), values.end(), [&](float x) { return x > t; });
    int64_t left = k - above, out = 0;
    for (int64_t i = 0; i < size(); ++i) {
      if (values[i] < t || (values[i] == t && left-- <= 0)) continue;
      values[out] = values[i];
      ids[out++] = ids[i];
    }
    values.resize(out);
    ids.resize(out);
  }

  /// By value descending, ties by id ascending.
  void sort();

 private:
  std::vector<uint64_t> keys, other;
};

struct SelectScratch {
  SelectScratch(int64_t n, int64_t k)
      : groups(n / block_vectors + 2 * widest),
        supergroups(n / (block_vectors * block_vectors) + 2 * widest) {
    // see select_actions_row.h for the bound
    int64_t most = std::min(n, (block_vectors + 1) * k);
    found.values.reserve(most);
    found.ids.reserve(most);
    shortlist.reserve(std::min<int64_t>(int64_t(groups.size()), block_vectors * k));
  }

  static constexpr int widest = 16;  // lanes of a Vec
  std::vector<float> groups, supergroups, shortlist;
  Candidates found;
};

void write_empty(int64_t k, int32_t* ids, float* log_probs, int32_t* count);

/// The top-p prefix of the sorted candidates, then `taken` (where it is >= 0, with logit
/// `taken_logit`): appended, or in place of the last member.
void write_set(const Candidates& found, const Selection& how, double log_z, int64_t taken,
               float taken_logit, int32_t* ids, float* log_probs, int32_t* count);

}  // namespace tdkd

#define TDKD_BODY "select_actions_row.h"
#include "every_isa.h"
