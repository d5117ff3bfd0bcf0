// Row mathematics on Vec. No include guard: simd.h includes it once for each instruction set.
// max(a, b) gives b where either is NaN, on every instruction set; the order of arguments matters.

/// exp(d * slope), as 2^(d * slope_log2e), to 2e-7 relative for d * slope from -87 to 88 (where the
/// product is not fused, on `portable`, to its own rounding further: 3e-6 at -87). NaN stays NaN; d
/// below `lowest` = -126 / slope_log2e counts as `lowest`, so that -inf gives 2^-126.
TDKD_INLINE Vec exp_of(Vec d, Vec slope_log2e, Vec lowest) {
  d = max(lowest, d);
  // adding 1.5 * 2^23 rounds to an integer; 127 makes its low bits the exponent field of 2^n
  const Vec magic = all(12582912.0f + 127.0f);
  Vec t = fma(d, slope_log2e, magic);
  Vec f = fms(d, slope_log2e, t - magic);
  // 2^f = 1 + f p(f) on [-1/2, 1/2], least maximal relative error in degree 5: 9e-8
  Vec p = all(0x1.5bba14p-10f);
  p = fma(p, f, all(0x1.3cea88p-7f));
  p = fma(p, f, all(0x1.c6b752p-5f));
  p = fma(p, f, all(0x1.ebf9bcp-3f));
  p = fma(p, f, all(0x1.62e42ap-1f));
  p = fma(p, f, all(1.0f));
  return p * shift_left_23(t);
}

/// tanh to 2e-7 relative: a softcap that is large against its logits multiplies small ones.
TDKD_INLINE Vec tanh_of(Vec u) {
  Vec e = exp_of(all(-2.0f) * abs(u), all(1.44269504f), all(-87.0f));
  Vec t = (all(1.0f) - e) / (all(1.0f) + e);
  // u + u^3 p(u^2) below 5/8, least maximal relative error in degree 4: 4e-9
  Vec s = u * u;
  Vec p = all(-0x1.75e1a8p-8f);
  p = fma(p, s, all(0x1.522692p-6f));
  p = fma(p, s, all(-0x1.b83c58p-5f));
  p = fma(p, s, all(0x1.110726p-3f));
  p = fma(p, s, all(-0x1.555532p-2f));
  return select_below(abs(u), all(0.625f), fma(u * s, p, u), with_sign(t, u));
}

inline float highest(Vec a) {
  float lanes[Vec::width];
  store(lanes, a);
  return *std::max_element(lanes, lanes + Vec::width);
}

inline double sum(Vec a) {
  float lanes[Vec::width];
  store(lanes, a);
  double total = 0;
  for (float lane : lanes) total += lane;
  return total;
}
