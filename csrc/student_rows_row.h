// One row of student logits, forward and backward. No include guard: included once for each
// instruction set. `slots` are the ids >= 0 of the row in ascending order; `log_weight` is null, or
// what a sampled column counts for.

/// Scaled and weighted logits of up to a block, padded with -inf.
template <class T>
inline void weighted_block(const T* x, const float* log_weight, int64_t count, const Scale& scale,
                           float* block) {
  for (int64_t i = 0; i < count; ++i) block[i] = scale(to_float(x[i])) + log_weight[i];
  std::fill(block + count, block + block_size, -INFINITY);
}

template <class T, bool capped>
void student_row(const T* x, const float* log_weight, int64_t n, const Scale& scale,
                 const std::vector<Slot>& slots, float* z, double* log_rest) {
  for (Slot s : slots) z[s.slot] = scale(to_float(x[s.id]));

  float block[block_size];
  Vec top = all(-INFINITY);
  auto sum_over = [&](auto& rest, auto copy, auto whole) {
    size_t next = 0;
    for (int64_t first = 0, blocks = 0; first < n; first += block_size) {
      int64_t count = std::min<int64_t>(block_size, n - first);
      bool hit = next < slots.size() && slots[next].id < first + count;
      if (hit || count < block_size || !whole) {
        copy(first, count);
        for (; next < slots.size() && slots[next].id < first + count; ++next) {
          block[slots[next].id - first] = -INFINITY;
        }
        top = max(rest.add(block), top);
      } else {
        top = max(rest.add(x + first), top);
      }
      if (++blocks % block_vectors == 0) rest.flush();
    }
    *log_rest = highest(top) == -INFINITY && !rest.has_nan() ? -INFINITY : rest.log();
  };
  if (log_weight) {
    RowSum<false> rest(Scale{1, 0, 1});
    sum_over(
        rest,
        [&](int64_t first, int64_t count) {
          weighted_block(x + first, log_weight + first, count, scale, block);
        },
        false);
  } else {
    RowSum<capped> rest(scale);
    sum_over(
        rest, [&](int64_t first, int64_t count) { copy_block(x + first, count, block); }, true);
  }
}

/// grad[j] = dz/dx (grad_rest exp(z_j - log_rest) outside the set, the sum of its slots' grad_z in
/// it). `grad` may be `x`; `of_slots` has room for one float a slot.
template <class T, bool capped>
void student_row_backward(const T* x, const float* log_weight, int64_t n, const Scale& scale,
                          const std::vector<Slot>& slots, double log_rest, const float* grad_z,
                          float grad_rest, float* of_slots, T* grad) {
  // before x is overwritten
  for (size_t s = 0; s < slots.size(); ++s)
    of_slots[s] = scale.derivative(to_float(x[slots[s].id]));
  if (grad_rest == 0 || log_rest == -INFINITY) {
    std::fill(grad, grad + n, T{});
  } else {
    const float slope = scale.slope();
    const float inner_slope = capped || log_weight ? 1.0f : slope;
    const Vec slope_log2e = all(inner_slope * 1.44269504f);
    const Vec lowest = all(-126.0f) / slope_log2e;
    const Vec inner = all(capped ? scale.logit_scale / scale.softcap : 1.0f);
    const Vec outer = all(capped ? scale.softcap / scale.temperature : 1.0f);
    // exp((x - c) slope) exp(c slope - log_rest): c is rounded, log_rest is not
    const float center = float(log_rest / inner_slope);
    const double residue = double(center) * inner_slope - log_rest;
    double share = double(grad_rest) * slope * std::exp(residue);
    // logits of 1e10 round by hundreds of nats; 0 * inf would make NaN of those far below
    if (std::isfinite(grad_rest)) share = std::clamp<double>(share, -FLT_MAX, FLT_MAX);
    const Vec origin = all(center), factor = all(float(share));
    const Vec ones = all(1.0f);
    auto write = [&](const T* from, const float* weight, T* to) {
      Vec v = load(from);
      if constexpr (capped) {
        Vec t = tanh_of(v * inner);
        Vec d = outer * t - origin;
        if (weight) d = d + load(weight);
        Vec e = zero_below(exp_of(d, slope_log2e, lowest), v, all(-FLT_MAX));
        store(to, factor * zero_below(e, d, lowest) * (ones - t * t));
      } else {
        Vec d = (weight ? fma(v, all(slope), load(weight)) : v) - origin;
        store(to, factor * zero_below(exp_of(d, slope_log2e, lowest), d, lowest));
      }
    };
    int64_t i = 0;
    for (; i + Vec::width <= n; i += Vec::width) {
      write(x + i, log_weight ? log_weight + i : nullptr, grad + i);
    }
    if (i < n) {
      T from[Vec::width] = {}, to[Vec::width];
      float weight[Vec::width] = {};
      std::copy(x + i, x + n, from);
      if (log_weight) std::copy(log_weight + i, log_weight + n, weight);
      write(from, log_weight ? weight : nullptr, to);
      std::copy(to, to + (n - i), grad + i);
    }
  }
  for (size_t s = 0; s < slots.size();) {
    const int32_t id = slots[s].id;
    const float derivative = of_slots[s];
    float total = 0;
    for (; s < slots.size() && slots[s].id == id; ++s) total += grad_z[slots[s].slot];
    // no gradient reaches a masked logit, and 0 * dz/dx would be NaN where z is infinite
    from_float(total == 0 ? 0.0f : total * derivative, grad[id]);
  }
}
