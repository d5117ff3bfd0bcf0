// The row bodies without torch: what a profiler or an instruction counter should see.
//
//   rows OP ISA DTYPE V K ROWS      OP: select, student, backward; DTYPE: float32, bfloat16,
//   float16
//
// Prints the seconds that the rows took and a checksum.
#include <chrono>
#include <cstdio>
#include <random>

#include "select_actions.h"
#include "student_rows.h"

using namespace tdkd;

template <class T>
double run(const std::string& op, Isa isa, int64_t n, int64_t k, int64_t rows) {
  const int64_t distinct = std::min<int64_t>(rows, 64);
  std::mt19937 generator(0);
  std::normal_distribution<float> normal(0, 2.5f);
  std::vector<T> x(distinct * n), grad(n);
  for (int64_t i = 0; i < distinct; ++i) {
    for (int64_t j = 0; j < n; ++j) from_float(normal(generator), x[i * n + j]);
    for (int j = 0; j < 20; ++j) from_float(15.0f, x[i * n + generator() % n]);
  }
  std::vector<int32_t> ids(k), count(1);
  std::vector<float> values(k), of_slots(k), grad_z(k, 0.5f);
  std::vector<Slot> slots;
  for (int32_t j = 0; j < k; ++j) slots.push_back({int32_t(generator() % n), j});
  std::sort(slots.begin(), slots.end());
  const Scale scale{1, 0, 1};
  const Selection how{k, 0.8, scale};
  SelectScratch scratch(n, k);
  double rest = 0;
  double checksum = 0;

  auto select = TDKD_BODY_FOR(isa, select_row<T, false>);
  auto student = TDKD_BODY_FOR(isa, student_row<T, false>);
  auto backward = TDKD_BODY_FOR(isa, student_row_backward<T, false>);
  auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x.data() + i % distinct * n;
    if (op == "select") {
      Carry carry{};
      select(row, n, 0, true, how, -1, scratch, carry, ids.data(), values.data(), count.data());
      checksum += count[0];
    } else if (op == "student") {
      student(row, nullptr, n, scale, slots, values.data(), &rest);
      checksum += rest;
    } else {
      backward(row, nullptr, n, scale, slots, 15.0, grad_z.data(), 1.0f, of_slots.data(),
               grad.data());
      checksum += to_float(grad[i % n]);
    }
  }
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%g\n", seconds.count());
  return checksum;
}

int main(int argc, char** argv) {
  if (argc != 7) return std::fprintf(stderr, "usage: rows OP ISA DTYPE V K ROWS\n"), 2;
  const std::string op = argv[1], isa_name = argv[2], dtype = argv[3];
  const Isa isa = isa_name == "avx512" ? Isa::avx512
                  : isa_name == "avx2" ? Isa::avx2
                                       : Isa::portable;
  const int64_t n = std::atoll(argv[4]), k = std::atoll(argv[5]), rows = std::atoll(argv[6]);
  const double checksum = dtype == "float32"    ? run<float>(op, isa, n, k, rows)
                          : dtype == "bfloat16" ? run<BFloat16>(op, isa, n, k, rows)
                                                : run<Half>(op, isa, n, k, rows);
  std::fprintf(stderr, "%g\n", checksum);
}
