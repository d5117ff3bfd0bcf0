// tdkd::td_target and its backward on CPU: one step, or the TD(lambda) return as a scan along each
// chain of successors. Float32 and flat; O(N) and serial, since N is a number of positions.
#include <tuple>

#include "tensors.h"

namespace tdkd {
namespace {

/// Rows in an order in which each comes after its successor.
std::vector<int64_t> last_first(const Integers& successor, int64_t n) {
  std::vector<int64_t> order, path;
  order.reserve(n);
  std::vector<char> seen(n);  // 1: on the path, 2: in the order
  Bound bound(n);
  for (int64_t i = n - 1; i >= 0; --i) {
    int64_t row = i;
    while (row >= 0 && bound.holds(row) && !seen[row]) {
      seen[row] = 1;
      path.push_back(row);
      row = successor[row];
    }
    bound.check("successor");
    require(row < 0 || seen[row] == 2,
            "successor: expected chains that end, got a cycle through row ", row);
    for (; !path.empty(); path.pop_back()) {
      seen[path.back()] = 2;
      order.push_back(path.back());
    }
  }
  return order;
}

Tensor td_target(const Tensor& value, const Tensor& successor, const std::optional<Tensor>& reward,
                 double gamma, std::optional<double> lam) {
  const int64_t n = value.numel();
  const Tensor values = torch::stable::contiguous(value);
  const float* v = static_cast<const float*>(values.const_data_ptr());
  std::optional<Tensor> rewards;
  if (reward) rewards = torch::stable::contiguous(*reward);
  const float* r = rewards ? static_cast<const float*>(rewards->const_data_ptr()) : nullptr;
  const Integers next(successor);
  Tensor target = torch::stable::new_empty(value, value.sizes());
  float* out = static_cast<float*>(target.mutable_data_ptr());
  const float discount = float(gamma), carry = float(lam.value_or(0));
  for (int64_t i : last_first(next, n)) {
    const float now = r ? r[i] : 0.0f;
    if (next[i] == -2) {
      out[i] = v[i];
    } else if (next[i] < 0 || discount == 0) {
      out[i] = now;
    } else {
      // a weight of zero keeps an infinite value out
      float ahead = carry < 1 ? (1 - carry) * v[next[i]] : 0.0f;
      if (carry > 0) ahead += carry * out[next[i]];
      out[i] = now + discount * ahead;
    }
  }
  return target;
}

std::tuple<Tensor, Tensor> td_target_backward(const Tensor& grad_target, const Tensor& successor,
                                              double gamma, std::optional<double> lam) {
  const int64_t n = grad_target.numel();
  const Tensor given = torch::stable::contiguous(grad_target);
  const float* g = static_cast<const float*>(given.const_data_ptr());
  const Integers next(successor);
  Tensor value = torch::stable::new_zeros(grad_target, grad_target.sizes());
  Tensor reward = torch::stable::new_zeros(grad_target, grad_target.sizes());
  float* dv = static_cast<float*>(value.mutable_data_ptr());
  float* dr = static_cast<float*>(reward.mutable_data_ptr());
  const float discount = float(gamma), carry = float(lam.value_or(0));
  std::vector<float> adjoint(g, g + n);
  const std::vector<int64_t> order = last_first(next, n);
  for (auto row = order.rbegin(); row != order.rend(); ++row) {
    const int64_t i = *row;
    if (next[i] == -2) {
      dv[i] += adjoint[i];
      continue;
    }
    dr[i] = adjoint[i];
    if (next[i] < 0 || discount == 0) continue;
    if (carry < 1) dv[next[i]] += discount * (1 - carry) * adjoint[i];
    if (carry > 0) adjoint[next[i]] += discount * carry * adjoint[i];
  }
  return {value, reward};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tdkd, CPU, m) {
  m.impl("td_target", TORCH_BOX(&td_target));
  m.impl("td_target_backward", TORCH_BOX(&td_target_backward));
}

}  // namespace tdkd
