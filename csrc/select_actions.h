// Selection of action sets, row by row. No torch here.
#pragma once

#include <array>
#include <tuple>
#include <utility>
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

/// What a panel of a row's columns leaves to the next one; the row's outputs hold its candidates.
struct Carry {
  double total;  // of the sum of exponentials
  float reference, taken;
};
static_assert(sizeof(Carry) == 2 * sizeof(double));

/// Elements that may be members, in ascending order of ids.
struct Candidates {
  std::vector<float> values;
  std::vector<int32_t> ids;
  int64_t count;
  int64_t ties;  // how many more elements that equal the threshold are of use

  /// At most so many will be pushed.
  void reserve(int64_t most) {
    values.resize(most + 1);
    ids.resize(most + 1);
  }

  void load(const float* from, const int32_t* from_ids, int64_t size) {
    count = size;
    std::copy(from, from + size, values.data());
    std::copy(from_ids, from_ids + size, ids.data());
  }
  int64_t store(float* to, int32_t* to_ids) const {
    std::copy(values.data(), values.data() + count, to);
    std::copy(ids.data(), ids.data() + count, to_ids);
    return count;
  }

  float lowest() const { return *std::min_element(values.data(), values.data() + count); }
  float highest() const { return *std::max_element(values.data(), values.data() + count); }

  // no branch: whether an element ties is not to be predicted
  void push(float value, int32_t id, float t) {
    const bool tie = value == t, kept = !tie | (ties > 0);
    values[count] = value + 0.0f;  // -0 and +0 tie
    ids[count] = id;
    count += kept;
    ties -= tie & kept;
  }

  /// Leaves k of them: those above t, and the first that equal it.
  void keep(float t, int64_t k) {
    const float *begin = values.data(), *end = begin + count;
    int64_t above = std::count_if(begin, end, [&](float x) { return x > t; });
    int64_t left = k - above, out = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < t || (values[i] == t && left-- <= 0)) continue;
      values[out] = values[i];
      ids[out++] = ids[i];
    }
    count = out;
  }

  /// By value descending, ties by id ascending.
  void sort() {
    const size_t n = size_t(count);
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

 private:
  std::vector<uint64_t> keys, other;
};

struct SelectScratch {
  /// Of n columns at a time.
  SelectScratch(int64_t n, int64_t k)
      : groups(n / block_vectors + 2 * widest),
        supergroups(n / (block_vectors * block_vectors) + 2 * widest),
        blocks(n / (block_vectors * narrowest) + 2) {
    // see select_actions_row.h for the bound
    found.reserve(k + std::min(n, (block_vectors + 1) * k));
    shortlist.reserve(groups.size());
  }

  static constexpr int narrowest = 8, widest = 16;  // lanes of a Vec
  std::vector<float> groups, supergroups, shortlist;
  std::vector<int32_t> blocks;
  Candidates found;
};

inline void write_empty(int64_t k, int32_t* ids, float* log_probs, int32_t* count) {
  std::fill(ids, ids + k, -1);
  std::fill(log_probs, log_probs + k, -INFINITY);
  *count = 0;
}

/// The top-p prefix of the sorted candidates, then `taken` (where it is >= 0, with logit
/// `taken_logit`): appended, or in place of the last member.
inline void write_set(const Candidates& found, const Selection& how, double log_z, int64_t taken,
                      float taken_logit, int32_t* ids, float* log_probs, int32_t* count) {
  const int64_t k = how.k, n = std::min(found.count, k);
  int64_t members = 0;
  bool has_taken = false;
  double before = 0;
  for (; members < n && before < how.reach; ++members) {
    ids[members] = found.ids[members];
    log_probs[members] = float(how.scale.wide(found.values[members]) - log_z);
    has_taken |= ids[members] == taken;
    if (how.reach < 1) before += std::exp(double(log_probs[members]));
  }
  std::fill(ids + members, ids + k, -1);
  std::fill(log_probs + members, log_probs + k, -INFINITY);
  if (taken >= 0 && !has_taken) {
    int64_t slot = std::min(members, k - 1);
    ids[slot] = int32_t(taken);
    log_probs[slot] = float(how.scale.wide(taken_logit) - log_z);
    members = slot + 1;
  }
  *count = int32_t(members);
}

}  // namespace tdkd

#define TDKD_BODY "select_actions_row.h"
#include "every_isa.h"
