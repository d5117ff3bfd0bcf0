// The soft value of one short row, and its gradient. No include guard: included once for each
// instruction set.

struct RowLevel {
  float peak;  // 0 where nothing is above -inf
  double total;
};

/// sum_j exp(x_j - peak); NaN where x holds NaN or +inf. Writes the terms too, where `terms` is
/// given.
inline RowLevel sum_terms(const float* x, int64_t k, float* terms) {
  constexpr int width = Vec::width;
  float last[width];
  const int64_t whole = k / width * width;
  std::copy(x + whole, x + k, last);
  std::fill(last + (k - whole), last + width, -INFINITY);
  Vec top = load(last);
  for (int64_t j = 0; j < whole; j += width) top = max(load(x + j), top);
  float peak = highest(top);
  if (peak == -INFINITY) peak = 0;

  const Vec origin = all(peak), log2e = all(1.44269504f), lowest = all(-87.0f);
  auto term = [&](Vec v) {
    Vec d = v - origin;
    return zero_below(exp_of(d, log2e, lowest), d, lowest);
  };
  Vec sums = all(0.0f);
  double total = 0;
  for (int64_t j = 0; j < whole; j += width) {
    Vec e = term(load(x + j));
    if (terms) store(terms + j, e);
    sums = sums + e;
    if (j % (64 * width) == 0) {
      total += sum(sums);
      sums = all(0.0f);
    }
  }
  Vec e = term(load(last));
  if (terms) {
    store(last, e);
    std::copy(last, last + (k - whole), terms + whole);
  }
  return {peak, total + sum(sums + e)};
}

inline float soft_value_row(const float* x, int64_t k) {
  RowLevel row = sum_terms(x, k, nullptr);
  return row.total == 0 ? -INFINITY : float(row.peak + std::log(row.total));
}

/// The row is summed again: exp(x - value) would carry the rounding of value, 3e-5 at 1000.
inline void soft_value_row_backward(const float* x, int64_t k, float grad_value, float* grad) {
  RowLevel row = sum_terms(x, k, grad);
  const float share = row.total == 0 ? 0.0f : float(grad_value / row.total);
  for (int64_t j = 0; j < k; ++j) grad[j] *= share;
}
