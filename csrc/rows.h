// What the ops share about rows of logits: the scale between a head and its logits, the sum of
// exponentials over a row, and the choice of instruction set. No torch here.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "simd.h"

namespace tdkd {

/// z = softcap * tanh(logit_scale * x / softcap) / temperature, without tanh where softcap is 0.
struct Scale {
  float temperature, softcap, logit_scale;

  bool capped() const { return softcap != 0; }
  float slope() const { return logit_scale / temperature; }

  /// In the order of operations that the reference has, and so with its rounding.
  float operator()(float x) const {
    if (logit_scale != 1) x *= logit_scale;
    if (capped() && x != -INFINITY) x = softcap * std::tanh(x / softcap);
    return temperature != 1 ? x / temperature : x;
  }
  /// The same without rounding, for differences of what stands at a level of hundreds.
  double wide(float x) const {
    double z = double(x) * logit_scale;
    if (capped() && x != -INFINITY) z = softcap * std::tanh(z / softcap);
    return z / temperature;
  }
  /// dz/dx
  float derivative(float x) const {
    if (!capped()) return slope();
    float t = std::tanh(x * logit_scale / softcap);
    return slope() * (1 - t * t);
  }
};

enum class Isa { portable, avx2, avx512 };

inline const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

inline Isa widest_isa() {
#if TDKD_X86
  static const Isa widest = [] {
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    __get_cpuid(1, &a, &b, &c, &d);  // clang 14 has no name for F16C
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C);
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
  }();
  return widest;
#else
  return Isa::portable;
#endif
}

/// The widest instruction set of this CPU, or the one that TDKD_CPU_CAPABILITY names.
inline Isa choose_isa() {
  const char* wanted = std::getenv("TDKD_CPU_CAPABILITY");
  if (!wanted || !*wanted) return widest_isa();
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (std::string_view(wanted) == name_of(isa) && isa <= widest_isa()) return isa;
  }
  throw std::runtime_error(
      std::string(
          "TDKD_CPU_CAPABILITY: expected portable, avx2 or avx512, and at most this CPU's ") +
      name_of(widest_isa()) + ", got " + wanted);
}

/// The body of `function` for an instruction set.
#if TDKD_X86
#define TDKD_BODY_FOR(isa, ...)                                \
  ((isa) == ::tdkd::Isa::avx512 ? &::tdkd::avx512::__VA_ARGS__ \
   : (isa) == ::tdkd::Isa::avx2 ? &::tdkd::avx2::__VA_ARGS__   \
                                : &::tdkd::portable::__VA_ARGS__)
#else
#define TDKD_BODY_FOR(isa, ...) (&::tdkd::portable::__VA_ARGS__)
#endif

/// Vectors in a block: what is between two looks at the maximum, and the size of a group.
constexpr int block_vectors = 16;

}  // namespace tdkd

#define TDKD_BODY "row_sum.h"
#include "every_isa.h"
