// Vectors of floats, one type for each instruction set, all with the same functions. No torch here.
//
// TDKD_AVX2_BEGIN and TDKD_AVX512_BEGIN switch code generation on for the functions up to TDKD_END,
// so that one library carries all bodies and rows.h chooses among them at run time.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TDKD_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define TDKD_X86 0
#endif

// What a row's loop calls must not depend on how much else its file holds.
#define TDKD_INLINE __attribute__((always_inline)) inline

#define TDKD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TDKD_BEGIN(features) \
  TDKD_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define TDKD_END _Pragma("clang attribute pop")
#else
#define TDKD_BEGIN(features) _Pragma("GCC push_options") TDKD_PRAGMA(GCC target(features))
#define TDKD_END _Pragma("GCC pop_options")
#endif
#define TDKD_AVX2_BEGIN TDKD_BEGIN("avx2,fma,f16c,popcnt")
#define TDKD_AVX512_BEGIN TDKD_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,popcnt")

namespace tdkd {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // the exponent's bias differs by 112; subnormal numbers come out right too
  float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, BFloat16& out) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  out.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half& out) {
  uint32_t bits = std::bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  float magnitude = std::bit_cast<float>(bits);
  uint32_t half;
  if (x != x) {
    half = 0x7e00;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    // the sum's last place is 2^-24, the step of subnormal halves
    half = std::bit_cast<uint32_t>(magnitude + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  } else {
    half = (bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

namespace portable {

struct Vec {
  static constexpr int width = 8;
  float v[width];
};

template <class F>
TDKD_INLINE Vec map(F f) {
  Vec out;
  for (int i = 0; i < Vec::width; ++i) out.v[i] = f(i);
  return out;
}
template <class F>
TDKD_INLINE unsigned mask(F f) {
  unsigned out = 0;
  for (int i = 0; i < Vec::width; ++i) out |= unsigned(f(i)) << i;
  return out;
}

TDKD_INLINE Vec all(float x) {
  return map([&](int) { return x; });
}
template <class T>
TDKD_INLINE Vec load(const T* p) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
TDKD_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < Vec::width; ++i) from_float(a.v[i], p[i]);
}
TDKD_INLINE Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
TDKD_INLINE Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
TDKD_INLINE Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
TDKD_INLINE Vec operator/(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] / b.v[i]; });
}
TDKD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
TDKD_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
TDKD_INLINE Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
TDKD_INLINE Vec abs(Vec a) {
  return map([&](int i) { return std::fabs(a.v[i]); });
}
TDKD_INLINE Vec with_sign(Vec a, Vec sign) {
  return map([&](int i) { return std::copysign(a.v[i], sign.v[i]); });
}
TDKD_INLINE Vec zero_below(Vec a, Vec b, Vec low) {
  return map([&](int i) { return b.v[i] < low.v[i] ? 0.0f : a.v[i]; });
}
/// x where a < limit, else y.
TDKD_INLINE Vec select_below(Vec a, Vec limit, Vec x, Vec y) {
  return map([&](int i) { return a.v[i] < limit.v[i] ? x.v[i] : y.v[i]; });
}
TDKD_INLINE Vec shift_left_23(Vec a) {
  return map([&](int i) { return std::bit_cast<float>(std::bit_cast<uint32_t>(a.v[i]) << 23); });
}
TDKD_INLINE unsigned greater(Vec a, Vec b) {
  return mask([&](int i) { return a.v[i] > b.v[i]; });
}
TDKD_INLINE unsigned at_least(Vec a, Vec b) {
  return mask([&](int i) { return a.v[i] >= b.v[i]; });
}

#include "vector_math.h"

}  // namespace portable

#if TDKD_X86

TDKD_AVX2_BEGIN
namespace avx2 {

struct Vec {
  static constexpr int width = 8;
  __m256 v;
};

inline Vec all(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vec load(const Half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}
inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign(Vec a, Vec sign) {
  return {_mm256_or_ps(a.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), sign.v))};
}
inline Vec zero_below(Vec a, Vec b, Vec low) {
  return {_mm256_andnot_ps(_mm256_cmp_ps(b.v, low.v, _CMP_LT_OQ), a.v)};
}
inline Vec select_below(Vec a, Vec limit, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, limit.v, _CMP_LT_OQ))};
}
inline Vec shift_left_23(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23))};
}
inline unsigned greater(Vec a, Vec b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
inline unsigned at_least(Vec a, Vec b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}

#include "vector_math.h"

}  // namespace avx2
TDKD_END

TDKD_AVX512_BEGIN
namespace avx512 {

struct Vec {
  static constexpr int width = 16;
  __m512 v;
};

inline Vec all(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec fms(Vec a, Vec b, Vec c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
inline Vec with_sign(Vec a, Vec sign) {
  return {_mm512_or_ps(a.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.v))};
}
inline Vec zero_below(Vec a, Vec b, Vec low) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b.v, low.v, _CMP_NLT_UQ), a.v)};
}
inline Vec select_below(Vec a, Vec limit, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, limit.v, _CMP_LT_OQ), x.v)};
}
inline Vec shift_left_23(Vec a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23))};
}
inline unsigned greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline unsigned at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }

#include "vector_math.h"

}  // namespace avx512
TDKD_END

#endif

}  // namespace tdkd
