// Batch RMS normalisation (arXiv 1708.00631): y = x / D with one D a channel, from the mean square over batch and
// pixels.
//
// Tensors are seen as [outer, channels, inner] with strides in elements; (N, C, *spatial) has inner = pixels, (N, C)
// has inner = 1.  One of the two inner strides must be 1, so channels-first and channels-last maps are both read in
// place.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops {

struct ChannelView {
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;
};

// The statistics and D:
//
//   v_c <- decay v_c + (1 - decay) mean_c(x^2)      (if x is given and not empty; counted in num_batches)
//   D_c  = sqrt(v_c / (1 - decay^num_batches) + eps max_k(v_k + 1e-6))
//
// Without num_batches, and as long as it is zero, v is not corrected.  Sums run in blocks that depend on the shape
// alone.
struct BatchRmsNormParams {
  const void* x;  // or nullptr: evaluation, nothing is updated
  ChannelView view;
  DType dtype;              // of x
  void* running_ms;         // [channels], v
  DType running_dtype;      // kFloat32 or kFloat64
  int64_t* num_batches;     // one counter, or nullptr
  void* denominator;        // [channels], D
  DType denominator_dtype;  // kFloat32 or kFloat64
  double decay, eps;        // [0, 1), > 0
};

// y = x / D.
struct ChannelDivideParams {
  const void* x;
  ChannelView x_view;
  void* y;  // may be x
  ChannelView y_view;
  DType dtype;              // of x and y
  const void* denominator;  // [channels]; kFloat64 if dtype is, else kFloat32
};

// kOutOfMemory: the partial sums (8 bytes a channel and block of 65536 elements) could not be allocated.
Status batch_rms_norm_denominator_cpu(const BatchRmsNormParams& params, const ThreadPool& pool);
Status channel_divide_cpu(const ChannelDivideParams& params, const ThreadPool& pool);

}  // namespace consistency_ops
