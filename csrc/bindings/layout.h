// Memory layout of stable tensors: what torch::stable lacks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/allocation.h"
#include "bindings/describe.h"

namespace consistency_ops::bindings {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::Tensor;

// An uninitialised tensor on the device of `like`.
inline Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides,
                            torch::headeronly::ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  int64_t bytes = element_bytes(dtype);
  for (int64_t size : sizes) bytes *= size;
  return allocating(like, bytes, [&] {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                                 like.get_device_index(), &handle));
    return Tensor(handle);
  });
}

// torch::stable::empty_like, without the dispatcher for the common case.
inline Tensor empty_like_of(const Tensor& x) {
  if (x.is_contiguous()) return empty_strided(x, x.sizes(), x.strides(), x.scalar_type());
  return allocating(x, x.numel() * element_bytes(x.scalar_type()), [&] { return torch::stable::empty_like(x); });
}

inline Tensor empty_contiguous(const Tensor& like, const std::vector<int64_t>& sizes,
                               torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  return empty_strided(like, sizes, strides, dtype);
}

// Before torch 2.13 sizes() have no operator ==.
inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

// Whether two tensors of one shape have their elements in the same places; the stride of a dimension of size 1 says
// nothing.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), left = a.strides(), right = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1 && left[d] != right[d]) return false;
  }
  return true;
}

// Whether the elements fill one block of memory without gaps; the dimensions may lie in any order.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) dims.emplace_back(strides[d], sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace consistency_ops::bindings
