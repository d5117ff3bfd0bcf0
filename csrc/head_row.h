// Products with rows of a head. No include guard: included once for each instruction set.

/// sum_i h_i w_i, in float32.
template <class T>
float dot(const float* h, const T* w, int64_t n) {
  constexpr int width = Vec::width;
  Vec sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width) {
    for (int j = 0; j < 4; ++j) {
      sums[j] = fma(load(h + i + j * width), load(w + i + j * width), sums[j]);
    }
  }
  for (; i + width <= n; i += width) sums[0] = fma(load(h + i), load(w + i), sums[0]);
  float total = float(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
  for (; i < n; ++i) total += h[i] * to_float(w[i]);
  return total;
}

/// y += a x
template <class T>
void add_scaled(float a, const T* x, int64_t n, float* y) {
  constexpr int width = Vec::width;
  const Vec scale = all(a);
  int64_t i = 0;
  for (; i + width <= n; i += width) store(y + i, fma(scale, load(x + i), load(y + i)));
  for (; i < n; ++i) y[i] += a * to_float(x[i]);
}
