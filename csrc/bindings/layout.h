// Memory layout of stable tensors: what torch::stable lacks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/allocation.h"

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

// Describes the dimensions >= first_dim of `tensor`, without skip_dim, as at most `limit` pairs (size, stride), the
// innermost last.  Adjacent dimensions that one stride serves are merged; unused leading pairs are (1, 0).  False if
// more than `limit` pairs remain.
inline bool collapse(const Tensor& tensor, int64_t skip_dim, int64_t first_dim, int limit, int64_t* size,
                     int64_t* stride) {
  int dims = 0;
  for (int64_t d = first_dim; d < tensor.dim(); ++d) {
    const int64_t n = tensor.size(d), s = tensor.stride(d);
    if (d == skip_dim || n == 1) continue;
    if (dims > 0 && stride[dims - 1] == n * s) {
      size[dims - 1] *= n;
      stride[dims - 1] = s;
      continue;
    }
    if (dims == limit) return false;
    size[dims] = n;
    stride[dims++] = s;
  }
  std::copy_backward(size, size + dims, size + limit);
  std::copy_backward(stride, stride + dims, stride + limit);
  std::fill(size, size + limit - dims, 1);
  std::fill(stride, stride + limit - dims, 0);
  return true;
}

}  // namespace consistency_ops::bindings
