// An optimizer's step in whitened coordinates of every layer's inputs, in two calls for all layers.  CPU;
// whitening_cuda.h has the same for CUDA.
//
//   whiten_cpu     before the step: A <- decay A + (1 - decay) X_c^T X_c / n, L L^T = A / tau + damping I by chunks,
//                  and G[:, c] <- G[:, c] L^-T.  With stages = kStageApply by factors that are kept, without rows.
//   unwhiten_cpu   after it, with D = W - before:  W <- before + s D L^-1, where s keeps the norm of D, of a layer.
//
// The layers are those of precondition.h: x, g, bias_grad, info, damping_used and the division mean what they mean
// there, `inverse` is L^-1, lower triangular, and same_input must be false.
#pragma once

#include "consistency_ops/precondition.h"

namespace consistency_ops {

// What whitening needs of a layer beside its PreconditionLayer; matrices and weights in the compute type.
struct WhitenedLayer {
  // whiten_cpu.  The running sum of covariances, laid out as PreconditionLayer::covariance, and the sum of the weights
  // in it, both in place; null where decay is 0.  Rows enter where they, G and the bias gradient are finite.
  void* average = nullptr;
  void* average_weight = nullptr;
  int32_t* has_gradient = nullptr;  // becomes 1 if G or the bias gradient has an element that is not 0; may be null

  // unwhiten_cpu: g and bias_grad are the weight and the bias after the step.  What they were before it, with decoupled
  // weight decay, in their dtypes and with their strides.
  const void* before = nullptr;
  const void* bias_before = nullptr;
  bool moves = true;  // false: the weight keeps what the optimizer made of it
  // The layers up to the next `first` are groups of one convolution, and have one norm.
  bool first = true;
};

struct WhiteningOptions {
  double decay = 0;
  bool keep_norm = true;  // false: s = 1
  // false: D L^-1 is left in W, for the caller to scale and add, who knows the norm of what other processes hold.
  bool finish = true;
};

// options: stages kStageAll or kStageApply, triangular true.  kInvalidArgument as for precondition_cpu.
Status whiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                  const PreconditionOptions& options, const WhiteningOptions& whitening, const ThreadPool& pool);

// options: stages kStageApply, triangular true.  squares: [2] a layer, |D|^2 and |D L^-1|^2; of groups, the first's.
Status unwhiten_cpu(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                    const PreconditionOptions& options, const WhiteningOptions& whitening, double* squares,
                    const ThreadPool& pool);

}  // namespace consistency_ops
