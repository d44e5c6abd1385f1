// The structs of the C interface as those of the C++ interface, for the C launchers of both devices.
#pragma once

#include <algorithm>
#include <exception>
#include <vector>

#include "consistency_ops/batch_rms_norm.h"
#include "consistency_ops/c_api.h"
#include "consistency_ops/modulus.h"
#include "consistency_ops/precondition.h"

namespace consistency_ops::c_api {

inline int code(Status status) {
  switch (status) {
    case Status::kOk:
      return 0;
    case Status::kOutOfMemory:
      return CO_ERROR_OUT_OF_MEMORY;
    case Status::kLaunchFailed:
      return CO_ERROR_LAUNCH_FAILED;
    default:
      return CO_ERROR_INVALID_ARGUMENT;
  }
}

inline bool known(int32_t dtype) { return 0 <= dtype && dtype <= CO_FLOAT16; }
inline DType type(int32_t dtype) { return static_cast<DType>(dtype); }

inline PreconditionLayer layer_of(const co_precondition_layer& from) {
  PreconditionLayer to{};
  // Every field by name: one that only the C++ struct has is a compile error here.
  auto& [x, x_row_size, x_row_stride, x_unit_stride, units, g, outputs, g_output_stride, g_unit_stride, g_tap_size,
         g_tap_stride, bias_grad, bias_stride, x_dtype, g_dtype, bias_dtype, has_bias, same_input, permutation,
         row_count, layer, group, info, damping_used, covariance, inverse] = to;
  x = from.x;
  std::copy_n(from.x_row_size, kMaxRowDims, x_row_size);
  std::copy_n(from.x_row_stride, kMaxRowDims, x_row_stride);
  x_unit_stride = from.x_unit_stride;
  units = from.units;
  g = from.g;
  outputs = from.outputs;
  g_output_stride = from.g_output_stride;
  g_unit_stride = from.g_unit_stride;
  std::copy_n(from.g_tap_size, kMaxTapDims, g_tap_size);
  std::copy_n(from.g_tap_stride, kMaxTapDims, g_tap_stride);
  bias_grad = from.bias_grad;
  bias_stride = from.bias_stride;
  x_dtype = type(from.x_dtype);
  g_dtype = type(from.g_dtype);
  bias_dtype = type(from.bias_dtype);
  has_bias = from.has_bias;
  same_input = from.same_input;
  permutation = from.permutation;
  row_count = from.row_count;
  layer = from.layer;
  group = from.group;
  info = from.info;
  damping_used = from.damping_used;
  covariance = from.covariance;
  inverse = from.inverse;
  return to;
}

// run(layers, options) -> a code or a number of bytes.
template <typename Result, typename Run>
Result with_layers(const co_precondition_layer* layers, int64_t count, const co_precondition_options* options,
                   const Run& run) {
  if (count < 0 || (count > 0 && layers == nullptr) || options == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  PreconditionOptions chosen;
  auto& [damping, trace_scaling, float64, chunk, max_rows, seed, step, stages, triangular] = chosen;
  damping = options->damping;
  trace_scaling = options->trace_scaling;
  float64 = options->float64;
  chunk = options->chunk;
  max_rows = options->max_rows;
  seed = options->seed;
  step = options->step;
  stages = options->stages;
  triangular = options->triangular;
  try {
    std::vector<PreconditionLayer> described;
    described.reserve(static_cast<size_t>(count));
    for (const co_precondition_layer* layer = layers; layer != layers + count; ++layer) {
      if (!known(layer->x_dtype) || !known(layer->g_dtype) || !known(layer->bias_dtype)) {
        return CO_ERROR_INVALID_ARGUMENT;
      }
      described.push_back(layer_of(*layer));
    }
    return run(described.data(), chosen);
  } catch (const std::exception&) {  // bad_alloc, or length_error for an absurd count
    return CO_ERROR_OUT_OF_MEMORY;
  }
}

inline ChannelView view_of(const co_channel_view& view) {
  return {view.outer, view.channels, view.inner, view.outer_stride, view.channel_stride, view.inner_stride};
}

}  // namespace consistency_ops::c_api
