// The action set of one row, a panel of its columns after the other, or all at once. No include
// guard: included once for each instruction set.
//
// A *group* is one lane of a block: block_vectors elements, one maximum. The k-th largest group
// maximum, t, is no larger than the k-th largest element, since k groups hold an element >= t; so
// the top k are among the elements >= t, and those above t lie in fewer than k groups. One read of
// the row leaves its group maxima and its sum of exponentials; a second look at the few blocks that
// reach t finds the members. Once k are found, a later panel has members above the lowest of these.

inline int64_t count_at_least(const float* x, int64_t n, float t) {
  int64_t count = 0, i = 0;
  for (; i + Vec::width <= n; i += Vec::width)
    count += std::popcount(at_least(load(x + i), all(t)));
  for (; i < n; ++i) count += x[i] >= t;
  return count;
}

/// A t with count(x >= t) >= k and count(x > t) <= k: the k-th largest, or a number between it and
/// the next; -FLT_MAX where fewer than k are finite. No NaN; nothing above `best`. Gallops down
/// from there and then bisects, over the ordered bits of floats.
inline float threshold(const float* x, int64_t n, int64_t k, float best) {
  const int64_t floor = ordered(-FLT_MAX);
  if (n < k || count_at_least(x, n, -FLT_MAX) < k) return -FLT_MAX;
  int64_t above = int64_t(ordered(best)) + 1, low = above, count = 0;
  for (int64_t step = 1 << 20; count < k; step *= 2) {
    if (low < above) above = low;
    low = std::max(above - step, floor);
    count = count_at_least(x, n, from_ordered(int32_t(low)));
  }
  while (above - low > 1 && count != k) {
    int64_t middle = low + (above - low) / 2;
    int64_t inside = count_at_least(x, n, from_ordered(int32_t(middle)));
    if (inside >= k) {
      low = middle;
      count = inside;
    } else {
      above = middle;
    }
  }
  return from_ordered(int32_t(low));
}

/// Appends the elements of one block that are above t, and `ties` of those that equal it.
template <class T>
inline void collect(const T* block, int64_t first_id, float t, Candidates& found) {
  // few branches, since which vector holds a hit is not to be predicted
  constexpr int words = block_size / 64, vectors = 64 / Vec::width;
  for (int w = 0; w < words; ++w) {
    uint64_t hits = 0;
    for (int j = 0; j < vectors; ++j) {
      const T* x = block + (w * vectors + j) * Vec::width;
      hits |= uint64_t(at_least(load(x), all(t))) << (j * Vec::width);
    }
    for (; hits; hits &= hits - 1) {
      int i = w * 64 + std::countr_zero(hits);
      found.push(to_float(block[i]), int32_t(first_id + i), t);
    }
  }
}

/// Adds to `row` a panel of n columns, whose ids begin with `first`, and to the candidates its top
/// k, of which the k best remain.
template <class T, bool capped>
void select_panel(const T* x, int64_t n, int64_t first, int64_t k, RowSum<capped>& row,
                  SelectScratch& scratch) {
  const int64_t whole = n / block_size, blocks = (n + block_size - 1) / block_size;
  constexpr int width = Vec::width;
  float* groups = scratch.groups.data();
  float* supergroups =
      scratch.supergroups.data();  // maxima over as many blocks as a block has vectors
  float rest[block_size];
  copy_block(x + whole * block_size, n - whole * block_size, rest);

  int64_t used = 0;
  Vec top = all(-INFINITY), highest_top = top;
  for (int64_t b = 0; b < blocks; ++b) {
    Vec maxima = b < whole ? row.add(x + b * block_size) : row.add(rest);
    store(groups + b * width, maxima);
    top = max(maxima, top);
    if (b % block_vectors == block_vectors - 1 || b == blocks - 1) {
      store(supergroups + used * width, top);
      ++used;
      highest_top = max(top, highest_top);
      top = all(-INFINITY);
      row.flush();
    }
  }
  const float best = highest(highest_top);
  if (best == INFINITY) row.spoil();
  if (best == -INFINITY || row.has_nan()) return;

  Candidates& found = scratch.found;
  const bool full = found.count == k;
  const float lowest = full ? found.lowest() : -FLT_MAX;
  float t = lowest;
  if (full || used * width >= k) {
    if (!full) t = threshold(supergroups, used * width, k, best);
    // by supergroups, those above it are fewer than k * block_vectors, and ties need no look
    scratch.shortlist.clear();
    for (int64_t g = 0; g < blocks * width; g += width) {
      for (unsigned hits = greater(load(groups + g), all(t)); hits; hits &= hits - 1) {
        scratch.shortlist.push_back(groups[g + std::countr_zero(hits)]);
      }
    }
    int64_t above = int64_t(scratch.shortlist.size());
    // where just k are above, a number below them would do for the list, but not for other groups
    if (above >= k) t = std::max(t, threshold(scratch.shortlist.data(), above, k, best));
  } else if (blocks * width >= k) {
    t = threshold(groups, blocks * width, k, best);
  }

  found.ties = full && t == lowest ? 0 : k;
  int32_t* hit_blocks = scratch.blocks.data();
  int64_t hit = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    hit_blocks[hit] = int32_t(b);
    hit += at_least(load(groups + b * width), all(t)) != 0;
  }
  for (int64_t h = 0; h < hit; ++h) {
    const int64_t b = hit_blocks[h];
    if (!found.ties && !greater(load(groups + b * width), all(t))) continue;
    if (b < whole) {
      collect(x + b * block_size, first + b * block_size, t, found);
    } else {
      collect(rest, first + b * block_size, t, found);
    }
  }
  if (found.count > k) {
    found.keep(threshold(found.values.data(), found.count, k, found.highest()), k);
  }
}

/// The set of a row whose columns from `first` on are x. Before the last ones, its outputs hold the
/// candidates in the order of ids, and `carry` the rest of what is known.
template <class T, bool capped>
void select_row(const T* x, int64_t n, int64_t first, bool last, const Selection& how,
                int64_t taken, SelectScratch& scratch, Carry& carry, int32_t* ids, float* log_probs,
                int32_t* count) {
  RowSum<capped> row(how.scale);
  Candidates& found = scratch.found;
  found.load(log_probs, ids, first ? *count : 0);
  if (first) row.resume(carry.reference, carry.total);
  if (n) select_panel<T, capped>(x, n, first, how.k, row, scratch);
  if (first <= taken && taken < first + n) carry.taken = to_float(x[taken - first]);
  if (!last) {
    std::tie(carry.reference, carry.total) = row.carry();
    *count = int32_t(found.store(log_probs, ids));
    return;
  }
  const double log_z = found.count ? row.log() : 0;
  if (!found.count || std::isnan(log_z)) return write_empty(how.k, ids, log_probs, count);
  found.sort();
  write_set(found, how, log_z, taken, carry.taken, ids, log_probs, count);
}
