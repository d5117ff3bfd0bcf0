// Tensors of the stable ABI, as rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "rows.h"

namespace tdkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// Refuses with these words alone; STD_TORCH_CHECK adds where the source lay when it was compiled.
template <class... Words>
void require(bool holds, const Words&... words) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << words);
  throw std::runtime_error(text.str());
}

inline Scale make_scale(double temperature, std::optional<double> softcap, double logit_scale) {
  return {float(temperature), float(softcap.value_or(0)), float(logit_scale)};
}

/// Logits [..., V] with any strides over the leading dims.
class LogitRows {
 public:
  explicit LogitRows(const Tensor& logits)
      : tensor(logits.dim() && logits.size(-1) > 1 && logits.stride(-1) != 1
                   ? torch::stable::contiguous(logits)
                   : logits),
        columns(tensor.size(-1)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        item(int64_t(tensor.element_size())) {
    for (int64_t d = 0; d + 1 < tensor.dim(); ++d) {
      sizes.push_back(tensor.size(d));
      strides.push_back(tensor.stride(d));
      count *= tensor.size(d);
    }
  }

  template <class T>
  const T* row(int64_t i) const {
    int64_t offset = 0;
    for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
      offset += i % sizes[d] * strides[d];
      i /= sizes[d];
    }
    return reinterpret_cast<const T*>(data + offset * item);
  }

  /// [..., size], or [...] without a size.
  std::vector<int64_t> shape(std::optional<int64_t> size = std::nullopt) const {
    std::vector<int64_t> out = sizes;
    if (size) out.push_back(*size);
    return out;
  }

  Tensor tensor;
  int64_t columns, count = 1;

 private:
  const char* data;
  int64_t item;
  std::vector<int64_t> sizes, strides;
};

/// A contiguous int32 or int64 tensor, read as int64.
class Integers {
 public:
  explicit Integers(const Tensor& x)
      : tensor(torch::stable::contiguous(x)), data(tensor.const_data_ptr()) {
    wide = tensor.scalar_type() == ScalarType::Long;
    require(wide || tensor.scalar_type() == ScalarType::Int, "expected int32 or int64");
  }
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }

 private:
  Tensor tensor;
  const void* data;
  bool wide;
};

/// Remembers an id that does not fit, from any thread; `check` refuses it afterwards.
class Bound {
 public:
  explicit Bound(int64_t size) : size(size) {}
  bool holds(int64_t id) {
    if (id < size) return true;
    misfit.store(id, std::memory_order_relaxed);
    return false;
  }
  void check(const char* name) const {
    int64_t id = misfit.load();
    require(id < 0, name, ": expected ids below ", size, ", got ", id);
  }

 private:
  int64_t size;
  std::atomic<int64_t> misfit{-1};
};

/// Calls f with a value of the element type.
template <class F>
void with_type(const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Half());
    default:
      require(false, "expected float32, bfloat16 or float16");
  }
}

/// Rows that give a thread enough to do.
inline int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
}

}  // namespace tdkd
