// The random orthogonal additive recurrence (arXiv 2210.01245), all steps in one call:
//
//   s_t = x_t + W_t h_{t-1},    h_t = alpha O_t h_{t-1} + beta phi(s_t),    t = 1, ..., steps
//
// x is the drive, h_0 is given.  W and O may be one matrix for all steps (a recurrent network) or one a step (the
// layers of a feed-forward network).  The rows of h are independent sequences, so they are what is shared among
// threads, and what a row becomes does not depend on the others.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops {

// What `kept` holds of a step: phi(s), from which phi' follows, but for the modulus s itself.  The derivative of the
// modulus is -1 below zero, else +1.
enum class Activation : int32_t { kIdentity = 0, kTanh, kSigmoid, kRelu, kSoftsign, kModulus };
constexpr int32_t kActivations = 6;

// Matrices are row-major.  A step stride of 0: one for all steps.
struct RoaScanMaps {
  const void* weight;  // [steps, units, units]
  int64_t weight_step;
  const int64_t* index;  // [steps, units]: (O h)_j = h[index_j], a permutation; nullptr: see filter
  int64_t index_step;
  const void* filter;  // [steps, units, units]; with neither, O is the identity
  int64_t filter_step;
  double alpha, beta;
  Activation activation;
};

struct RoaScanParams {
  DType dtype;  // of every tensor; float64 is computed in float64, all others in float32, h_t between steps too
  int64_t steps, rows, units;
  RoaScanMaps maps;
  const void* drive;  // [steps, rows, units], the units next to each other
  int64_t drive_step, drive_row;
  const void* initial;  // [rows, units]
  void* states;         // [steps, rows, units]: h_1, ...
  void* last;           // [rows, units]: h of the last step
  void* kept;           // [steps, rows, units], or nullptr
};

// Backwards through the steps, from g = the gradient of the last state:
//
//   g += grad_states_t,    delta_t = beta g phi'(s_t) = dL/ds_t,    g <- alpha O_t^T g + W_t^T delta_t
//
// and what is left of g is the gradient of h_0.  That of W_t is delta_t^T h_{t-1}, one product for the caller.
struct RoaScanBackwardParams {
  DType dtype;
  int64_t steps, rows, units;
  RoaScanMaps maps;         // `index` of the inverse permutation; `filter` as it was
  const void* grad_states;  // [steps, rows, units], the units next to each other; or nullptr
  int64_t grad_step, grad_row;
  const void* grad_last;  // [rows, units], or nullptr
  const void* kept;       // [steps, rows, units]
  void* delta;            // [steps, rows, units]
  void* grad_initial;     // [rows, units]
};

// kInvalidArgument: a size is negative, or an index is outside of [0, units); nothing was written.  kOutOfMemory: no
// room for the packed matrices, two a thread, and three states a row.
Status roa_scan_cpu(const RoaScanParams& params, const ThreadPool& pool);
Status roa_scan_backward_cpu(const RoaScanBackwardParams& params, const ThreadPool& pool);

}  // namespace consistency_ops
