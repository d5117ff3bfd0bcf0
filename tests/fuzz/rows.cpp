// The row primitives of csrc/ against naive oracles in double precision, under libFuzzer: make
// fuzz.
//
// The bytes of an input give the primitive, the length of the row, the options and the bits of the
// numbers: NaN, infinities, subnormal and huge numbers, and ties. Every buffer is a vector of just
// the size that is asked for, so that AddressSanitizer sees a read past it. Each primitive runs in
// every instruction set of this CPU. A difference beyond what is allowed aborts.
//
// What is allowed is stated beside each comparison, in `eps` = 2^-23, twice the rounding of a
// float. Numbers that are finite and whose scaled value is not are outside what the kernels define:
// there only memory and the range of ids are checked.
#include <cstdarg>
#include <cstdio>

#include "select_actions.h"
#include "student_rows.h"

#define TDKD_BODY "soft_value_row.h"
#include "every_isa.h"
#define TDKD_BODY "head_row.h"
#include "every_isa.h"
#define TDKD_BODY "vectors.h"
#include "every_isa.h"

using namespace tdkd;

namespace {

constexpr double eps = FLT_EPSILON, infinity = INFINITY;

[[gnu::format(printf, 2, 3)]] void require(bool condition, const char* format, ...) {
  if (condition) return;
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputs("\n", stderr);
  std::abort();
}

std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512}) {
    if (isa <= widest_isa()) all.push_back(isa);
  }
  return all;
}

// ---- inputs ----

/// The bytes of an input, in order; zeros once they are spent.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data(data), left(size) {}

  bool spent() const { return left == 0; }

  template <class T>
  T take() {
    T x{};
    const size_t n = std::min(sizeof(T), left);
    std::memcpy(&x, data, n);
    data += n;
    left -= n;
    return x;
  }

  int64_t below(int64_t limit) { return take<uint16_t>() % limit; }

  /// A number of interest, or any bits.
  float number() {
    static constexpr float of_interest[] = {
        0.0f,      1.0f, -1.0f, 0.5f,   -3.0f,  10.0f,   -88.0f,  100.0f,     -1000.0f, 3e4f,
        -1e5f,     1e9f, -1e9f, 1e20f,  -1e20f, 3e38f,   -3e38f,  FLT_MAX,    -FLT_MAX, INFINITY,
        -INFINITY, NAN,  -0.0f, 1e-20f, 1e-40f, -1e-45f, FLT_MIN, FLT_EPSILON};
    const uint8_t which = take<uint8_t>();
    return which < std::size(of_interest) ? of_interest[which] : take<float>();
  }

  float finite() {
    const float x = number();
    return std::isfinite(x) ? x : 1.0f;
  }

  /// From 2^-12 to 2^12, half the time 1.
  float factor() {
    const uint8_t power = take<uint8_t>();
    if (power < 128) return 1.0f;
    return std::ldexp(1.0f + float(take<uint8_t>()) / 256.0f, power % 25 - 12);
  }

  Scale scale() {
    const float temperature = factor();
    const uint8_t cap = take<uint8_t>();
    const float softcap = cap < 128 ? 0.0f : float(cap - 127) * (cap & 1 ? 1.0f : 0.125f);
    return {temperature, softcap, factor()};
  }

  /// Most rows are short: their ends are what is delicate.
  int64_t length() {
    const uint8_t kind = take<uint8_t>();
    return kind < 160 ? below(300) : kind < 240 ? below(2500) : below(20'000);
  }

  /// A pattern, then single elements with bits of their own.
  template <class T>
  std::vector<T> row(int64_t n) {
    std::vector<T> x(n);
    const uint8_t kind = take<uint8_t>();
    const float level = number(), step = number();
    uint64_t state = take<uint32_t>() * 2 + 1;
    auto random = [&] {
      state ^= state << 13;
      state ^= state >> 7;
      return state ^= state << 17;
    };
    for (int64_t i = 0; i < n; ++i) {
      const float unit = float(random() >> 40) * 0x1p-23f - 1.0f;
      switch (kind % 6) {
        case 0:
          from_float(level, x[i]);
          break;
        case 1:
          from_float(level + step * float(i), x[i]);
          break;
        case 2:
          from_float(level + step * unit, x[i]);
          break;
        case 3:
          from_float(level + step * std::round(4 * unit), x[i]);
          break;
        case 4:
          std::memcpy(&x[i], &state, sizeof(T));
          break;
        case 5:
          x[i] = take<T>();
          break;
      }
    }
    for (int i = take<uint8_t>() % 64; n && i > 0 && !spent(); --i) {
      const int64_t at = below(n);
      if (take<uint8_t>() % 2) {
        x[at] = take<T>();
      } else {
        from_float(number(), x[at]);
      }
    }
    return x;
  }

 private:
  const uint8_t* data;
  size_t left;
};

// ---- oracles ----

double exact(const Scale& scale, float x) {
  double z = double(x) * scale.logit_scale;
  if (scale.capped() && x != -INFINITY) z = scale.softcap * std::tanh(z / scale.softcap);
  return z / scale.temperature;
}

double exact_derivative(const Scale& scale, float x) {
  const double slope = double(scale.logit_scale) / scale.temperature;
  if (!scale.capped()) return slope;
  // 1 - tanh^2 without the cancellation
  const double cosine = std::cosh(double(x) * scale.logit_scale / scale.softcap);
  return slope / (cosine * cosine);
}

/// Whether no finite number overflows a float on its way through the scale.
bool stays_finite(const Scale& scale, float x) {
  if (!std::isfinite(x)) return true;
  return std::abs(double(x) * scale.logit_scale) < FLT_MAX && std::abs(exact(scale, x)) < FLT_MAX;
}

struct Sum {
  double peak, total;

  /// NaN where there is NaN or +inf, -inf where there is nothing above it.
  double log() const { return total == 0 ? -infinity : peak + std::log(total); }
};

Sum sum_of_exp(const std::vector<double>& z) {
  Sum sum{-infinity, 0};
  for (double x : z) {
    if (std::isnan(x) || x == infinity) return {0, NAN};
    sum.peak = std::max(sum.peak, x);
  }
  if (sum.peak == -infinity) return sum;
  for (double x : z) sum.total += std::exp(x - sum.peak);
  return sum;
}

/// Equal, both NaN, within `allowed`, or the infinity that stands for what no float holds.
bool near(double got, double expected, double allowed) {
  return got == expected || (std::isnan(got) && std::isnan(expected)) ||
         std::abs(got - expected) <= allowed ||
         (std::isinf(got) && got * expected > 0 && std::abs(expected) + allowed >= FLT_MAX);
}

// ---- select_actions ----

template <class T, bool capped>
void check_select(Bytes& in) {
  const Scale scale = in.scale();
  if (scale.capped() != capped) return;
  const int64_t n = in.length();
  const uint8_t how_many = in.take<uint8_t>();
  const int64_t k = how_many < 100   ? 1 + how_many
                    : how_many < 200 ? 1 + in.below(n + 40)
                                     : 1 + in.below(1024);
  const double top_p = in.take<uint8_t>() < 80 ? 1.0 : double(1 + in.take<uint8_t>()) / 256;
  const Selection how{k, top_p < 1 ? top_p * (1.0 - 1e-5) : 2.0, scale};
  const int64_t taken = n && in.take<uint8_t>() % 2 ? in.below(n) : -1;
  const std::vector<T> x = in.row<T>(n);
  // the row comes whole, or in panels, some of them empty
  std::vector<int64_t> ends(in.take<uint8_t>() % 4);
  for (int64_t& end : ends) end = in.below(n + 1);
  ends.push_back(n);
  std::sort(ends.begin(), ends.end());

  std::vector<int32_t> order;
  std::vector<double> z(n);
  bool usable = true, defined = true;
  double peak = -infinity;
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    usable = usable && value < INFINITY;  // false for NaN
    defined = defined && stays_finite(scale, value);
    z[i] = exact(scale, value);
    if (value > -INFINITY) order.push_back(int32_t(i));
    if (z[i] > peak) peak = z[i];
  }
  usable = usable && !order.empty();
  double log_z = 0;
  // probabilities are exp of differences: their error is that of the largest logit around
  double allowed = 0;
  std::vector<double> before(1, 0.0);
  if (usable) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return to_float(x[a]) > to_float(x[b]); });
    const Sum sum = sum_of_exp(z);
    log_z = sum.log();
    const int64_t most = std::min<int64_t>(k, int64_t(order.size()));
    order.resize(most);
    for (int32_t id : order) {
      before.push_back(before.back() + std::exp(z[id] - sum.peak) / sum.total);
    }
  }
  auto allowed_at = [&](double value) { return 4 * eps * (std::abs(value) + std::abs(peak) + 24); };
  for (int32_t id : order) {
    if (z[id] >= log_z - 40) allowed = std::max(allowed, allowed_at(z[id]));
  }
  // how many members the prefix may have: more than one number only where rounding decides
  const int64_t most = int64_t(before.size()) - 1;
  int64_t fewest_members = 0, most_members = 0;
  const double rounding = std::expm1(std::min(allowed, 700.0));
  while (fewest_members < most && before[fewest_members] * (1 + rounding) + 1e-15 < how.reach)
    ++fewest_members;
  while (most_members < most && before[most_members] * (1 - rounding) - 1e-15 < how.reach)
    ++most_members;
  if (how.reach > 1) fewest_members = most_members = most;
  if (usable && fewest_members == 0) fewest_members = 1;

  int64_t widest = ends[0];
  for (size_t panel = 1; panel < ends.size(); ++panel) {
    widest = std::max(widest, ends[panel] - ends[panel - 1]);
  }
  SelectScratch scratch(widest, std::min(k, n));
  for (Isa isa : isas()) {
    std::vector<int32_t> ids(k), count(1);
    std::vector<float> log_probs(k);
    Carry carry{};
    int64_t first = 0;
    for (size_t panel = 0; panel < ends.size(); ++panel) {
      const std::vector<T> columns(x.begin() + first, x.begin() + ends[panel]);
      TDKD_BODY_FOR(isa, select_row<T, capped>)
      (columns.data(), int64_t(columns.size()), first, panel + 1 == ends.size(), how, taken,
       scratch, carry, ids.data(), log_probs.data(), count.data());
      first = ends[panel];
    }
    const char* name = name_of(isa);
    if (!usable) {
      require(count[0] == 0, "%s: %d members of a row without a usable logit", name, count[0]);
      for (int64_t j = 0; j < k; ++j) {
        require(ids[j] == -1 && log_probs[j] == -INFINITY, "%s: slot %ld is not empty", name, j);
      }
      continue;
    }
    for (int32_t id : ids) require(id >= -1 && id < n, "%s: id %d of %ld", name, id, n);
    require(count[0] >= 0 && count[0] <= k, "%s: count %d", name, count[0]);
    if (!defined) continue;

    bool found = false;
    for (int64_t members = fewest_members; members <= most_members && !found; ++members) {
      std::vector<int32_t> expected(order.begin(), order.begin() + members);
      if (taken >= 0 && std::find(expected.begin(), expected.end(), taken) == expected.end()) {
        if (members == k) expected.pop_back();
        expected.push_back(int32_t(taken));
      }
      const int64_t size = int64_t(expected.size());
      expected.resize(k, -1);
      found = count[0] == size && ids == expected;
    }
    require(found, "%s: other ids, n=%ld k=%ld top_p=%g taken=%ld count=%d, expected %ld to %ld",
            name, n, k, top_p, taken, count[0], fewest_members, most_members);
    for (int64_t j = 0; j < k; ++j) {
      const double expected = ids[j] < 0 ? -infinity : z[ids[j]] - log_z;
      const double error = ids[j] < 0 ? 0 : allowed_at(z[ids[j]]);
      require(near(log_probs[j], expected, error), "%s: log-prob %ld is %.9g, expected %.9g +- %g",
              name, j, log_probs[j], expected, error);
    }
  }
}

/// threshold and Candidates by themselves.
void check_candidates(Bytes& in) {
  const int64_t n = in.length(), k = 1 + in.below(400);
  std::vector<float> x = in.row<float>(n);
  for (float& value : x) {
    if (!(value < INFINITY)) value = -INFINITY;
  }
  const float best = n ? *std::max_element(x.begin(), x.end()) : -INFINITY;
  if (best == -INFINITY) return;
  std::vector<int32_t> order;
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] > -INFINITY) order.push_back(int32_t(i));
  }
  const int64_t finite = int64_t(order.size());
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return x[a] > x[b]; });
  order.resize(std::min(finite, k));
  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    auto body = TDKD_BODY_FOR(isa, threshold);
    const float t = body(x.data(), n, k, best);
    int64_t above = 0, reach = 0;
    for (float value : x) {
      above += value > t;
      reach += value >= t;
    }
    require(finite < k ? t == -FLT_MAX : reach >= k && above <= k,
            "%s: threshold %g: %ld above it, %ld reach it, k=%ld", name, t, above, reach, k);

    Candidates found;
    found.reserve(above + std::min(k, reach - above));
    found.count = 0;
    found.ties = k;
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] >= t) found.push(x[i], int32_t(i), t);
    }
    if (found.count > k) found.keep(body(found.values.data(), found.count, k, best), k);
    found.sort();
    require(found.count == int64_t(order.size()), "%s: %ld candidates, expected %zu", name,
            found.count, order.size());
    for (size_t j = 0; j < order.size(); ++j) {
      require(found.ids[j] == order[j] && found.values[j] == x[order[j]],
              "%s: candidate %zu is %d, expected %d", name, j, found.ids[j], order[j]);
    }
  }
}

// ---- student_rows ----

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr double epsilon = 0x1p-24, least = 0x1p-149, most = FLT_MAX;
};
template <>
struct Limits<BFloat16> {
  static constexpr double epsilon = 0x1p-8, least = 0x1p-133, most = 0x1.fep127;
};
template <>
struct Limits<Half> {
  static constexpr double epsilon = 0x1p-11, least = 0x1p-24, most = 65504;
};

template <class T>
void check_gradient(const char* name, int64_t i, T got, double expected, double allowed,
                    double largest_factor) {
  allowed += std::abs(expected) * Limits<T>::epsilon * 1.01 + Limits<T>::least;
  const double value = to_float(got);
  // a gradient that overflows, or a factor of it that does, has no value to compare with
  if (std::abs(expected) + allowed > Limits<T>::most || largest_factor > FLT_MAX) return;
  require(near(value, expected, allowed), "%s: gradient %ld is %.9g, expected %.9g +- %g", name, i,
          value, expected, allowed);
}

template <class T, bool capped>
void check_student(Bytes& in) {
  const Scale scale = in.scale();
  if (scale.capped() != capped) return;
  const int64_t n = in.length();
  std::vector<Slot> slots;
  const int32_t k = in.take<uint8_t>() % 48;
  for (int32_t j = 0; j < k && n; ++j) {
    const int64_t id = in.below(n + 1) - 1;
    if (id >= 0) slots.push_back({int32_t(id), j});
  }
  std::sort(slots.begin(), slots.end());
  const bool weighted = in.take<uint8_t>() % 3 == 0;
  const float grad_rest = in.finite();
  std::vector<float> grad_z(k);
  for (float& g : grad_z) g = in.finite();
  const std::vector<T> x = in.row<T>(n);
  const std::vector<float> weight = in.row<float>(weighted ? n : 0);
  const float* log_weight = weighted ? weight.data() : nullptr;

  // scaled and weighted, and -inf in the set
  std::vector<double> outside(n), size(n);
  bool defined = true, nan_weight = false;
  for (int64_t i = 0; i < n; ++i) {
    const double z = exact(scale, to_float(x[i])), w = weighted ? weight[i] : 0;
    outside[i] = z + w;
    size[i] = std::abs(z) + std::abs(w);
    nan_weight |= !(w < infinity);
    defined = defined && stays_finite(scale, to_float(x[i])) &&
              (!std::isfinite(size[i]) || size[i] < FLT_MAX);
  }
  for (Slot s : slots) outside[s.id] = -infinity;
  const double expected_rest = sum_of_exp(outside).log();
  double peak = -infinity, largest = 0;
  for (double v : outside) peak = std::max(peak, v);
  for (int64_t i = 0; i < n; ++i) {
    if (outside[i] >= peak - 100) largest = std::max(largest, size[i]);
  }

  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    std::vector<float> z(k, -INFINITY);
    double log_rest = -INFINITY;
    TDKD_BODY_FOR(isa, student_row<T, capped>)
    (x.data(), log_weight, n, scale, slots, z.data(), &log_rest);
    std::vector<float> of_slots(k);
    std::vector<T> grad(n), in_place = x;
    auto backward = TDKD_BODY_FOR(isa, student_row_backward<T, capped>);
    backward(x.data(), log_weight, n, scale, slots, log_rest, grad_z.data(), grad_rest,
             of_slots.data(), grad.data());
    backward(in_place.data(), log_weight, n, scale, slots, log_rest, grad_z.data(), grad_rest,
             of_slots.data(), in_place.data());
    require(!n || !std::memcmp(grad.data(), in_place.data(), n * sizeof(T)),
            "%s: another gradient in the place of the logits", name);
    if (!defined) continue;

    for (Slot s : slots) {
      const double expected = exact(scale, to_float(x[s.id]));
      require(near(z[s.slot], expected, 3 * eps * std::abs(expected) + 1e-37),
              "%s: z is %.9g, expected %.9g", name, z[s.slot], expected);
    }
    const double error = 4 * eps * (largest + 24);
    require(near(log_rest, expected_rest, error), "%s: log_rest is %.9g, expected %.9g +- %g", name,
            log_rest, expected_rest, error);

    std::vector<char> member(n);
    for (size_t s = 0; s < slots.size();) {
      const int32_t id = slots[s].id;
      member[id] = 1;
      double total = 0, absolute = 0;
      float as_float = 0;
      for (; s < slots.size() && slots[s].id == id; ++s) {
        total += grad_z[slots[s].slot];
        absolute += std::abs(double(grad_z[slots[s].slot]));
        as_float += grad_z[slots[s].slot];
      }
      if (!std::isfinite(as_float)) continue;
      const double derivative = as_float == 0 ? 0 : exact_derivative(scale, to_float(x[id]));
      const double slope = exact_derivative({scale.temperature, 0, scale.logit_scale}, 0);
      check_gradient(name, id, grad[id], total == 0 ? 0 : total * derivative,
                     slope * eps * (48 * absolute + 8 * std::abs(total)), slope * absolute);
    }
    if (std::isnan(log_rest) || nan_weight) continue;
    const bool none = grad_rest == 0 || log_rest == -infinity;
    for (int64_t i = 0; i < n; ++i) {
      if (member[i]) continue;
      if (none) {
        require(to_float(grad[i]) == 0, "%s: a gradient from nothing", name);
        continue;
      }
      const double distance = outside[i] - log_rest;
      const double slope = exact_derivative({scale.temperature, 0, scale.logit_scale}, 0);
      const double share = grad_rest * std::exp(std::min(distance, 700.0));
      // exp of a difference: the rounding of what is subtracted
      const double rounded = std::isfinite(size[i]) ? size[i] : 0;
      const double relative =
          4 * eps * (rounded + std::abs(log_rest) + std::min(std::abs(distance), 200.0) + 4);
      if (relative > 0.05 && distance + relative > -200) {
        require(!std::isnan(to_float(grad[i])), "%s: NaN of finite logits", name);
        continue;
      }
      const double expected =
          outside[i] == -infinity ? 0 : share * exact_derivative(scale, to_float(x[i]));
      const double cap = capped ? 8 * eps * std::abs(share) * slope : 0;
      check_gradient(name, i, grad[i], expected,
                     std::abs(expected) * std::expm1(std::min(relative, 1.0)) + cap +
                         std::abs(double(grad_rest)) * slope * 4 * 0x1p-126,
                     std::abs(double(grad_rest)) * std::max(1.0, slope));
    }
  }
}

// ---- soft_value ----

void check_soft_value(Bytes& in) {
  const int64_t k = in.length();
  const float grad_value = in.finite();
  const std::vector<float> x = in.row<float>(k);
  const std::vector<double> z(x.begin(), x.end());
  const Sum sum = sum_of_exp(z);
  const double expected = sum.log();
  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    const float value = TDKD_BODY_FOR(isa, soft_value_row)(x.data(), k);
    // the rounding of the value, and that of the sum
    require(near(value, expected, eps * std::abs(expected) + 12 * eps),
            "%s: soft value %.9g, expected %.9g", name, value, expected);
    std::vector<float> grad(k);
    TDKD_BODY_FOR(isa, soft_value_row_backward)(x.data(), k, grad_value, grad.data());
    for (int64_t j = 0; j < k; ++j) {
      const double share = sum.total == 0 ? 0 : std::exp(z[j] - sum.peak) / sum.total;
      const double relative = 4 * eps * (std::min(100.0, std::abs(z[j] - sum.peak)) + 12);
      // what is 87 nats below the largest counts as nothing
      const double tiny = std::abs(double(grad_value)) * 0x1p-125;
      if (std::isnan(expected)) {
        require(std::isnan(grad[j]), "%s: %g of a row with NaN", name, grad[j]);
      } else {
        check_gradient(name, j, grad[j], grad_value * share,
                       relative * std::abs(grad_value * share) + tiny, 0);
      }
    }
  }
}

// ---- products with a head ----

template <class T>
void check_head(Bytes& in) {
  const int64_t n = in.length();
  const float a = in.number();
  const std::vector<float> h = in.row<float>(n);
  const std::vector<T> w = in.row<T>(n);
  double expected = 0, absolute = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double product = double(h[i]) * to_float(w[i]);
    expected += product;
    absolute += std::abs(product);
  }
  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    const float got = TDKD_BODY_FOR(isa, dot<T>)(h.data(), w.data(), n);
    // a sum that overflows on its way has no value to compare with
    if (!std::isfinite(absolute) || absolute < FLT_MAX) {
      require(near(got, expected, double(n + 2) * (eps * absolute + 0x1p-149)),
              "%s: product %.9g, expected %.9g", name, got, expected);
    }
    std::vector<float> y = h;
    TDKD_BODY_FOR(isa, add_scaled<T>)(a, w.data(), n, y.data());
    for (int64_t i = 0; i < n; ++i) {
      const double product = double(a) * to_float(w[i]), sum = product + h[i];
      const double most = std::abs(product) + std::abs(double(h[i]));
      if (std::isfinite(product) &&
          std::max(std::abs(product), std::isfinite(most) ? most : 0) >= FLT_MAX)
        continue;
      require(near(y[i], sum, eps * most + 0x1p-149), "%s: sum %.9g, expected %.9g", name, y[i],
              sum);
    }
  }
}

// ---- numbers and vectors ----

/// The double that a number stands for; infinity stands one step past the largest.
template <class T>
double place(uint32_t magnitude) {
  T x;
  x.bits = uint16_t(magnitude);
  if (std::isfinite(to_float(x))) return to_float(x);
  T last, other;
  last.bits = uint16_t(magnitude - 1);
  other.bits = uint16_t(magnitude - 2);
  return 2.0 * to_float(last) - to_float(other);
}

/// Whether y is x rounded to the nearest, ties to even.
template <class T>
void check_rounding(const char* name, float x, T y) {
  const float back = to_float(y);
  if (std::isnan(x)) return require(std::isnan(back), "%s: NaN became %g", name, back);
  require(std::signbit(x) == std::signbit(back), "%s: %g became %g", name, x, back);
  if (std::isinf(x)) return require(std::isinf(back), "%s: %g became %g", name, x, back);
  const uint32_t magnitude = y.bits & 0x7fff;
  const double target = std::abs(double(x)), error = std::abs(target - place<T>(magnitude));
  auto no_nearer = [&](uint32_t neighbour) {
    const double other = std::abs(target - place<T>(neighbour));
    require(error < other || (error == other && magnitude % 2 == 0), "%s: %.9g became %.9g", name,
            x, back);
  };
  if (magnitude > 0) no_nearer(magnitude - 1);
  if (!std::isinf(back)) no_nearer(magnitude + 1);
}

template <class T>
void check_conversion(Bytes& in) {
  std::vector<float> numbers(16);
  std::vector<T> given(16);
  for (float& x : numbers) x = in.number();
  for (T& x : given) x = in.take<T>();
  for (float x : numbers) {
    T y;
    from_float(x, y);
    check_rounding("scalar", x, y);
  }
  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    const int lanes = isa == Isa::avx512 ? avx512::lanes : 8;
    std::vector<T> narrow(lanes);
    std::vector<float> wide(lanes);
    for (int first = 0; first < 16; first += lanes) {
      TDKD_BODY_FOR(isa, narrow<T>)(numbers.data() + first, narrow.data());
      TDKD_BODY_FOR(isa, widen<T>)(given.data() + first, wide.data());
      for (int i = 0; i < lanes; ++i) {
        check_rounding(name, numbers[first + i], narrow[i]);
        const float expected = to_float(given[first + i]);
        require(std::isnan(expected)
                    ? std::isnan(wide[i])
                    : std::bit_cast<uint32_t>(wide[i]) == std::bit_cast<uint32_t>(expected),
                "%s: bits %x became %g, expected %g", name, given[first + i].bits, wide[i],
                expected);
      }
    }
  }
}

void check_mathematics(Bytes& in) {
  const Scale scale = in.scale();
  const float slope = in.factor() * 1.44269504f, lowest = -126.0f / slope;
  std::vector<float> numbers(16);
  for (float& x : numbers) x = in.number();
  for (float x : numbers) {
    if (!stays_finite(scale, x)) continue;
    const double z = exact(scale, x), slope_of = exact_derivative(scale, x);
    require(near(scale(x), z, 3 * eps * std::abs(z) + 1e-37), "scale: %.9g, expected %.9g",
            scale(x), z);
    // 1 - tanh^2: an absolute error
    if (std::isnan(x) && !scale.capped()) continue;
    require(near(scale.derivative(x), slope_of, 8 * eps * scale.slope()),
            "derivative: %.9g, expected %.9g", scale.derivative(x), slope_of);
  }
  for (Isa isa : isas()) {
    const char* name = name_of(isa);
    const int lanes = isa == Isa::avx512 ? avx512::lanes : 8;
    std::vector<float> e(lanes), t(lanes);
    for (int first = 0; first < 16; first += lanes) {
      TDKD_BODY_FOR(isa, exp_each)(numbers.data() + first, slope, lowest, e.data());
      TDKD_BODY_FOR(isa, tanh_each)(numbers.data() + first, t.data());
      for (int i = 0; i < lanes; ++i) {
        const float x = numbers[first + i];
        // without a fused product, its rounding too: half a last place of the exponent
        const double exponent = double(std::max(x, lowest)) * slope;
        const double unfused = isa == Isa::portable ? 0.35 * eps * std::abs(exponent) : 0;
        if (std::isnan(x)) {
          require(std::isnan(e[i]) && std::isnan(t[i]), "%s: NaN became a number", name);
          continue;
        }
        const double tanh = std::tanh(double(x));
        require(near(t[i], tanh, 2e-7 * std::abs(tanh) + 1e-37),
                "%s: tanh %.9g is %.9g, expected %.9g", name, x, t[i], tanh);
        if (exponent > 126) continue;
        const double exp = std::exp2(exponent);
        require(near(e[i], exp, (2e-7 + unfused) * exp), "%s: 2^%.9g is %.9g, expected %.9g", name,
                exponent, e[i], exp);
      }
    }
  }
}

template <class T>
void check(uint8_t primitive, Bytes& in) {
  switch (primitive % 10) {
    case 0:
    case 1:
      return check_select<T, false>(in);
    case 2:
      return check_select<T, true>(in);
    case 3:
    case 4:
      return check_student<T, false>(in);
    case 5:
      return check_student<T, true>(in);
    case 6:
      return check_candidates(in);
    case 7:
      return check_soft_value(in);
    case 8:
      return check_head<T>(in);
    case 9:
      if constexpr (!std::is_same_v<T, float>) return check_conversion<T>(in);
      return check_mathematics(in);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  const uint8_t primitive = in.take<uint8_t>();
  switch (in.take<uint8_t>() % 3) {
    case 0:
      check<float>(primitive, in);
      break;
    case 1:
      check<BFloat16>(primitive, in);
      break;
    case 2:
      check<Half>(primitive, in);
      break;
  }
  return 0;
}
