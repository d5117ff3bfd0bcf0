// Tensors of the stable ABI, as rows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <vector>

#include "rows.h"

namespace tdkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
    STD_TORCH_CHECK(
        tensor.scalar_type() == ScalarType::Int || tensor.scalar_type() == ScalarType::Long,
        "expected int32 or int64");
    wide = tensor.scalar_type() == ScalarType::Long;
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
    STD_TORCH_CHECK(id < 0, name, ": expected ids below ", size, ", got ", id);
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
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

/// Rows that give a thread enough to do.
inline int64_t grain(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
}

}  // namespace tdkd
