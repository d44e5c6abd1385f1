// Tensors to PreconditionLayer: what the bindings of the correction and of whitening share.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "bindings/cuda_scope.h"
#include "bindings/describe.h"
#include "bindings/layout.h"
#include "consistency_ops/precondition.h"

namespace consistency_ops::bindings {

using torch::headeronly::ScalarType;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

inline void set_input(PreconditionLayer& layer, Tensor& x, int64_t unit_dim, const char* op) {
  if (!collapse(x, unit_dim, 0, kMaxRowDims, layer.x_row_size, layer.x_row_stride)) {
    x = contiguous_copy(x);
    STD_TORCH_CHECK(collapse(x, unit_dim, 0, kMaxRowDims, layer.x_row_size, layer.x_row_stride), op,
                    ": inputs have too many dimensions");
  }
  layer.x_dtype = dtype_of(x, op, "inputs");
  layer.x_unit_stride = x.stride(unit_dim);
  layer.x = x.const_data_ptr();
}

// entries[i] belongs to layer owners[i]: the entry of every layer, or null.
inline std::vector<const Tensor*> spread(const Tensors& entries, const Ints& owners, size_t count, const char* op,
                                         const char* name) {
  std::vector<const Tensor*> of_layer(count, nullptr);
  STD_TORCH_CHECK(entries.size() == owners.size(), op, ": every entry of ", name, " needs the index of its layer");
  for (size_t i = 0; i < entries.size(); ++i) {
    STD_TORCH_CHECK(owners[i] >= 0 && owners[i] < static_cast<int64_t>(count), op, ": ", name, " belongs to layer ",
                    owners[i], ", which does not exist");
    of_layer[owners[i]] = &entries[i];
  }
  return of_layer;
}

// Refuses gradients that share memory, as far as their extents tell: views with gaps may interleave, and are for
// consistency_ops.ops to look at.
inline void check_overlap(const Tensors& grads, const Tensors& bias_grads, const char* op) {
  std::vector<std::pair<const char*, const char*>> extents;
  extents.reserve(grads.size() + bias_grads.size());
  for (const Tensors* tensors : {&grads, &bias_grads}) {
    for (const Tensor& tensor : *tensors) {
      if (tensor.numel() == 0 || !tensor.is_contiguous()) continue;
      const char* begin = static_cast<const char*>(tensor.const_data_ptr());
      extents.emplace_back(begin, begin + tensor.numel() * element_size(dtype_of(tensor, op, "grads")));
    }
  }
  STD_TORCH_CHECK(!overlap(extents), op, ": gradients must not overlap");
}

inline void set_permutation(PreconditionLayer& layer, const Tensor* permutation, const char* op) {
  if (permutation == nullptr) return;
  const int64_t units = layer.units + (layer.has_bias ? 1 : 0);
  STD_TORCH_CHECK(permutation->scalar_type() == ScalarType::Long && permutation->dim() == 1 &&
                      permutation->size(0) == units && permutation->is_contiguous(),
                  op, ": permutation must be a contiguous int64 tensor of ", units, " units");
  const int64_t* unit = permutation->const_data_ptr<int64_t>();
  layer.permutation = unit;
  if (on_cuda(*permutation)) return;  // _checks.py asserts on the device that it is a bijection
  std::vector<bool> seen(units, false);
  for (int64_t p = 0; p < units; ++p) {
    STD_TORCH_CHECK(unit[p] >= 0 && unit[p] < units && !seen[unit[p]], op, ": permutation must be a bijection of ",
                    units, " units, got ", unit[p], " at ", p);
    seen[unit[p]] = true;
  }
}

inline void set_row_count(PreconditionLayer& layer, const Tensor* row_count, const char* op) {
  if (row_count == nullptr) return;
  STD_TORCH_CHECK(row_count->scalar_type() == ScalarType::Long && row_count->numel() == 1, op,
                  ": row_count must be one int64, got ", row_count->numel(), " elements");
  layer.row_count = row_count->const_data_ptr<int64_t>();
}

inline PreconditionOptions make_options(int64_t chunk, int64_t max_rows, int64_t seed, int64_t step, const char* op) {
  STD_TORCH_CHECK(chunk >= 1 && chunk <= kMaxChunk, op, ": chunk must be in [1, ", kMaxChunk, "], got ", chunk);
  STD_TORCH_CHECK(max_rows >= 1, op, ": max_rows must be at least 1, got ", max_rows);
  PreconditionOptions options;
  options.chunk = static_cast<int32_t>(chunk);
  options.max_rows = max_rows;
  options.seed = static_cast<uint64_t>(seed);
  options.step = static_cast<uint64_t>(step);
  return options;
}

inline PreconditionLayer empty_layer(int64_t layer_index, int64_t group, int64_t chunk, const char* op) {
  STD_TORCH_CHECK(group >= 1 && group <= chunk, op, ": group must be in [1, chunk = ", chunk, "], got ", group);
  PreconditionLayer layer{};
  for (int64_t& size : layer.x_row_size) size = 1;
  for (int64_t& size : layer.g_tap_size) size = 1;
  layer.x_dtype = layer.g_dtype = layer.bias_dtype = DType::kFloat32;
  layer.layer = static_cast<uint32_t>(layer_index);
  layer.group = static_cast<int32_t>(group);
  return layer;
}

inline int64_t total_chunks(const std::vector<PreconditionLayer>& layers, const PreconditionOptions& options) {
  int64_t total = 0;
  for (const PreconditionLayer& layer : layers) total += num_chunks(layer, options);
  return total;
}

inline void set_outputs(std::vector<PreconditionLayer>& layers, const PreconditionOptions& options, int32_t* info,
                        float* used) {
  for (PreconditionLayer& layer : layers) {
    layer.info = info;
    layer.damping_used = used;
    info += num_chunks(layer, options);
    if (used != nullptr) used += num_chunks(layer, options);
  }
}

// Matrices of one layer, [groups * chunks, chunk, chunk]; returns the number of groups.
inline int64_t check_matrices(const Tensor& matrices, int64_t units, const PreconditionOptions& options,
                              const char* op) {
  const int64_t chunks = (units + options.chunk - 1) / options.chunk;
  STD_TORCH_CHECK(units > 0 && matrices.dim() == 3 && matrices.size(1) == options.chunk &&
                      matrices.size(2) == options.chunk && matrices.size(0) % chunks == 0 && matrices.is_contiguous(),
                  op, ": matrices of ", units, " units must be contiguous, (groups * ", chunks, ", ", options.chunk,
                  ", ", options.chunk, ")");
  STD_TORCH_CHECK((matrices.scalar_type() == ScalarType::Double) == options.float64 &&
                      (options.float64 || matrices.scalar_type() == ScalarType::Float),
                  op, ": matrices must all be float32 or all float64");
  return matrices.size(0) / chunks;
}

inline void check_info(const Tensor& info, const std::vector<PreconditionLayer>& layers,
                       const PreconditionOptions& options, const char* op) {
  STD_TORCH_CHECK(
      info.scalar_type() == ScalarType::Int && info.numel() == total_chunks(layers, options) && info.is_contiguous(),
      op, ": info must be int32 with one entry a chunk, ", total_chunks(layers, options), " in all");
}

// The layers of a call that corrects by given matrices: `member`, covariances to be factored or inverses.
inline std::vector<PreconditionLayer> matrix_layers(const Tensors& grads, const Tensors& bias_grads,
                                                    const Tensors& matrices, void* PreconditionLayer::* member,
                                                    const Tensors& permutations, const Ints& bias_layers,
                                                    const Ints& permutation_layers, const Ints& layer_indices,
                                                    const Ints& groups, PreconditionOptions& options, const char* op) {
  const size_t count = grads.size();
  STD_TORCH_CHECK(count > 0 && matrices.size() == count && layer_indices.size() == count && groups.size() == count, op,
                  ": got ", count, " grads, ", matrices.size(), " matrices and ", layer_indices.size(),
                  " layer indices");
  options.float64 = matrices[0].scalar_type() == ScalarType::Double;
  const auto bias = spread(bias_grads, bias_layers, count, op, "bias_grads");
  const auto permutation = spread(permutations, permutation_layers, count, op, "permutations");
  std::vector<PreconditionLayer> layers;
  for (size_t l = 0; l < count; ++l) {
    STD_TORCH_CHECK(grads[l].dim() >= 2, op, ": grad must have at least 2 dimensions, got ", grads[l].dim());
    const int64_t units = grads[l].size(1) + (bias[l] != nullptr ? 1 : 0);
    const int64_t conv_groups = check_matrices(matrices[l], units, options, op);
    STD_TORCH_CHECK(conv_groups > 0 && grads[l].size(0) % conv_groups == 0, op, ": ", conv_groups,
                    " groups do not divide ", grads[l].size(0), " outputs");
    STD_TORCH_CHECK(bias[l] == nullptr || bias[l]->numel() == grads[l].size(0), op, ": bias_grad must have ",
                    grads[l].size(0), " elements");
    const int64_t bytes = matrices[l].numel() / conv_groups * (options.float64 ? 8 : 4);
    PreconditionLayer layer = empty_layer(layer_indices[l], groups[l], options.chunk, op);
    set_grad(layer, grads[l], conv_groups, op);
    if (bias[l] != nullptr) set_bias(layer, *bias[l], op);
    set_permutation(layer, permutation[l], op);
    layer.*member = const_cast<void*>(matrices[l].const_data_ptr());
    for (int64_t g = 0; g < conv_groups; ++g) {
      layers.push_back(layer);
      to_next_group(layer, bytes);
    }
  }
  return layers;
}

}  // namespace consistency_ops::bindings
