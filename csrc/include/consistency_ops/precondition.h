// Layer-wise second-order correction of all layers of a network in one call (arXiv 1708.00631).
//
//     A_c = X_c^T X_c / n      G[:, c] <- G[:, c] (A_c + damping I)^-1      for every chunk c of units
//
// This is the one problem description of the CPU, CUDA and test paths: an array of PreconditionLayer and one
// PreconditionOptions, plain data, no ownership.  types.h says what holds for all launchers: ownership, streams,
// workspaces, threads, errors.  tests/cpp/train.cpp is a complete program.
#pragma once

#include "consistency_ops/random.h"
#include "consistency_ops/types.h"

namespace consistency_ops {

constexpr int kMaxRowDims = 4;
constexpr int kMaxTapDims = 3;

struct PreconditionLayer {
  // X: `rows` = product of x_row_size; element (r, u) is x[sum_i r_i * x_row_stride[i] + u * x_unit_stride], where r_i
  // are the digits of r, the last one fastest.  Unused row dimensions have size 1.
  const void* x;
  int64_t x_row_size[kMaxRowDims];
  int64_t x_row_stride[kMaxRowDims];
  int64_t x_unit_stride;
  int64_t units;  // without the bias
  // G: outputs x taps rows of `units` elements; tap (k0, k1, k2) as above.  A linear layer has one tap.  May be null
  // for chunked_covariance.
  void* g;
  int64_t outputs;
  int64_t g_output_stride;
  int64_t g_unit_stride;
  int64_t g_tap_size[kMaxTapDims];
  int64_t g_tap_stride[kMaxTapDims];
  // The bias gradient, one element an output, or null.  It is one more unit, with input 1, at index `units`; with
  // several taps every row sees a copy of it and the copies are averaged afterwards.
  void* bias_grad;
  int64_t bias_stride;
  DType x_dtype, g_dtype, bias_dtype;
  // With `has_bias` the covariance has the bias unit; set without bias_grad only where there is no G.
  bool has_bias;
  // This layer has the rows, the division and so the inverse of the layer before it in the array; any number of such
  // layers may follow one another (query, key and value; gate and up).  The covariance is summed and factored once, and
  // the G of all of them are corrected where they lie.  `units` and `has_bias` must be those of the layer before; x and
  // its sizes, strides and dtype, permutation, row_count, layer, group, covariance and inverse are not looked at; info
  // and damping_used get what those of the first layer get.
  bool same_input;
  // A bijection of the units (with the bias), or null: the division is drawn from (seed, step, layer).
  const int64_t* permutation;
  // Only the first *row_count rows of X are used (fewer than `rows`, read when the kernel runs); null: all.
  const int64_t* row_count;
  uint32_t layer;  // third argument of the random division
  int32_t group;   // consecutive units that are dealt together, 1 .. chunk
  // One entry a chunk, may be null.  info: 0, or the order of the leading minor of the damped chunk that is not
  // positive definite in the last try (the gradient of that chunk is then unchanged).  damping_used: the last damping
  // tried.
  int32_t* info;
  float* damping_used;
  // Stages that are run apart (running averages, reuse of an inverse, all-reduce) keep their matrices here, in the
  // compute type: [chunks, chunk, chunk] row-major, the tail of smaller chunks zero.  Null in the fused call.
  void* covariance;
  void* inverse;
};

enum PreconditionStage : int32_t {
  kStageCovariance = 1,  // X -> covariance
  kStageFactor = 2,      // covariance -> inverse, info, damping_used
  kStageApply = 4,       // inverse, G -> G
  kStageAll = 7,
};

struct PreconditionOptions {
  double damping = 1.0;
  bool trace_scaling = false;  // (A / tau + damping I)^-1, tau = trace(A) / units of the layer
  bool float64 = false;        // the compute type, also of `covariance` and `inverse`: double instead of float
  int32_t chunk = 128;         // 1 .. kMaxChunk
  int64_t max_rows = 10000;
  uint64_t seed = 0, step = 0;
  int32_t stages = kStageAll;
  // The matrices between the factor and the apply stage are triangular, not symmetric: with A = L L^T (damped) the
  // factor stage writes L^-1, and the apply stage multiplies G by whatever matrices it is given (L^-T whitens a
  // gradient, L^-1 maps a displacement back).  On CUDA these must be lower triangular.  Only with one of these two
  // stages: others are refused.
  bool triangular = false;
};

// Number of chunks of a layer; the length of info and damping_used.
inline int64_t num_chunks(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int64_t units = layer.units + (layer.has_bias ? 1 : 0);
  return (units + options.chunk - 1) / options.chunk;
}

// CPU.  Reads every X once, reads and writes every G once.  Extra memory: see precondition_workspace_cpu.
//
// kInvalidArgument: chunk not in 1 .. kMaxChunk; a group not in 1 .. chunk; max_rows < 1; damping negative or NaN;
// stages not a combination of neighbouring stages; covariance, inverse or info null where the stages need it; has_bias
// without bias_grad where there is a G to correct; a negative size; 2^31 - 1 or more units or outputs; same_input of
// the first layer, or with other units or has_bias than the layer before.  Pointers, strides and dtypes are taken as
// they are; set float64 where any of the data are float64.
Status precondition_cpu(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                        const ThreadPool& pool);

// Bytes that precondition_cpu allocates at its peak: the chunks of the largest layer, plus, a thread, at most 512 KiB
// for a packed row block (and the chunks of further layers where it is smaller) and the scratch of a few chunks.
int64_t precondition_workspace_cpu(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                   int32_t threads);

}  // namespace consistency_ops
