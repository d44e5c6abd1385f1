// Tensors to the torch-free problem descriptions, for the tensors of torch's stable C interface (the bindings) and for
// those of its C++ interface (csrc/torch_abi).
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "consistency_ops/precondition.h"

namespace consistency_ops::bindings {

template <typename Tensor>
DType dtype_of(const Tensor& tensor, const char* op, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, bfloat16 or float16");
  }
  return DType::kFloat32;
}

// Describes the dimensions >= first_dim of `tensor`, without skip_dim, as at most `limit` pairs (size, stride), the
// innermost last.  Adjacent dimensions that one stride serves are merged; unused leading pairs are (1, 0).  False if
// more than `limit` pairs remain.
template <typename Tensor>
bool collapse(const Tensor& tensor, int64_t skip_dim, int64_t first_dim, int limit, int64_t* size, int64_t* stride) {
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

template <typename Tensor>
void set_grad(PreconditionLayer& layer, const Tensor& grad, int64_t conv_groups, const char* op) {
  STD_TORCH_CHECK(grad.dim() >= 2 && grad.dim() <= 2 + kMaxTapDims, op, ": grad must have 2 to 5 dimensions, got ",
                  grad.dim());
  layer.units = grad.size(1);
  layer.outputs = grad.size(0) / conv_groups;
  layer.g_output_stride = grad.stride(0);
  layer.g_unit_stride = grad.stride(1);
  collapse(grad, -1, 2, kMaxTapDims, layer.g_tap_size, layer.g_tap_stride);
  layer.g_dtype = dtype_of(grad, op, "grad");
  layer.g = grad.mutable_data_ptr();
}

template <typename Tensor>
void set_bias(PreconditionLayer& layer, const Tensor& bias, const char* op) {
  STD_TORCH_CHECK(bias.dim() == 1, op, ": bias_grad must have 1 dimension, got ", bias.dim());
  layer.has_bias = true;
  layer.bias_stride = bias.stride(0);
  layer.bias_dtype = dtype_of(bias, op, "bias_grad");
  layer.bias_grad = bias.mutable_data_ptr();
}

inline void* after(void* data, int64_t bytes) { return data == nullptr ? nullptr : static_cast<char*>(data) + bytes; }

// The setters describe the first group of a convolution; from one to the next, of which there may be hundreds, only
// pointers move.  `bytes`: of the matrices of one group.
inline void to_next_group(PreconditionLayer& layer, int64_t bytes = 0) {
  layer.x = static_cast<const char*>(layer.x) + layer.units * layer.x_unit_stride * element_size(layer.x_dtype);
  layer.g = after(layer.g, layer.outputs * layer.g_output_stride * element_size(layer.g_dtype));
  layer.bias_grad = after(layer.bias_grad, layer.outputs * layer.bias_stride * element_size(layer.bias_dtype));
  layer.covariance = after(layer.covariance, bytes);
  layer.inverse = after(layer.inverse, bytes);
}

// Marks the layers that have the input, or the covariance, and the division of the one before them.
inline void find_same_inputs(std::vector<PreconditionLayer>& layers) {
  constexpr int kMostLayers = 64;  // with one input: the CUDA launcher takes kMaxLaunchLayers
  int run = 1;
  for (size_t l = 1; l < layers.size(); ++l) {
    PreconditionLayer& layer = layers[l];
    const PreconditionLayer& before = layers[l - 1];
    layer.same_input = run < kMostLayers && layer.x == before.x && layer.x_dtype == before.x_dtype &&
                       std::equal(layer.x_row_size, layer.x_row_size + kMaxRowDims, before.x_row_size) &&
                       std::equal(layer.x_row_stride, layer.x_row_stride + kMaxRowDims, before.x_row_stride) &&
                       layer.x_unit_stride == before.x_unit_stride && layer.covariance == before.covariance &&
                       layer.units == before.units && layer.has_bias == before.has_bias &&
                       layer.permutation == before.permutation && layer.row_count == before.row_count &&
                       layer.layer == before.layer && layer.group == before.group;
    run = layer.same_input ? run + 1 : 1;
  }
}

// Begin and end of the memory of gradients; returns whether two of them share some.
inline bool overlap(std::vector<std::pair<const char*, const char*>>& extents) {
  std::sort(extents.begin(), extents.end());
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i - 1].second > extents[i].first) return true;
  }
  return false;
}

}  // namespace consistency_ops::bindings
