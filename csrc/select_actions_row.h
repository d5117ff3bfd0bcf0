// The action set of one row. No include guard: included once for each instruction set.
//
// A *group* is one lane of a block: block_vectors elements, one maximum. The k-th largest group
// maximum, t, is no larger than the k-th largest element, since k groups hold an element >= t; so
// the top k are among the elements >= t, and those above t lie in fewer than k groups. One read of
// the row leaves its group maxima and its sum of exponentials; a second look at the few blocks that
// reach t finds the members.

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

template <class T, bool capped>
void select_row(const T* x, int64_t n, const Selection& how, int64_t taken, SelectScratch& scratch,
                int32_t* ids, float* log_probs, int32_t* count) {
  const int64_t k = how.k, whole = n / block_size, blocks = (n + block_size - 1) / block_size;
  constexpr int width = Vec::width;
  float* groups = scratch.groups.data();
  float* supergroups =
      scratch.supergroups.data();  // maxima over as many blocks as a block has vectors
  float rest[block_size];
  copy_block(x + whole * block_size, n - whole * block_size, rest);

  RowSum<capped> row(how.scale);
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
  const float best = n ? highest(highest_top) : -INFINITY;
  const double log_z = best == -INFINITY ? 0 : row.log();
  if (best == -INFINITY || best == INFINITY || std::isnan(log_z)) {
    return write_empty(k, ids, log_probs, count);
  }

  float t = -FLT_MAX;
  if (used * width >= k) {
    t = threshold(supergroups, used * width, k, best);
    // the groups above it are fewer than k * block_vectors, and those that tie need no look
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

  Candidates& found = scratch.found;
  found.clear(k);
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
      collect(x + b * block_size, b * block_size, t, found);
    } else {
      collect(rest, b * block_size, t, found);
    }
  }
  if (found.count > k) found.keep(threshold(found.values.data(), found.count, k, best), k);
  found.sort();
  write_set(found, how, log_z, taken, taken >= 0 ? to_float(x[taken]) : 0.0f, ids, log_probs,
            count);
}
