// The damping of a chunk and the trace scale of a layer: one definition for CPU and CUDA, mirrored in reference.py.
//
// A chunk is factored as A / tau + damping I.  tau is 1, or with PreconditionOptions::trace_scaling the mean of the
// layer's diagonal.  If that matrix is not positive definite, the chunk is tried again with ten and a hundred times the
// damping; after kMaxTries its gradient stays as it is.
#pragma once

#include <cstdint>

#include "consistency_ops/types.h"

namespace consistency_ops {

constexpr int kMaxTries = 3;

// The damping of a try after `failed` others.
template <typename T>
CO_HOST_DEVICE inline T damping_of_try(double damping, int failed) {
  T value = static_cast<T>(damping);
  for (int i = 0; i < failed; ++i) value *= T(10);
  return value;
}

// tau of a layer: the mean of the finite elements of the diagonal of A, or 1 if that is not positive (all are zero, or
// none is finite).  A is `multiplier` times the stored matrix; `sum` and `count` are of the finite elements of the
// stored diagonal, over all chunks of the layer.
template <typename T, typename Count>
CO_HOST_DEVICE inline T trace_scale(T sum, Count count, T multiplier) {
  const T tau = sum / static_cast<T>(count) * multiplier;
  return tau > T(0) ? tau : T(1);  // not positive: also NaN, where nothing was counted
}

}  // namespace consistency_ops
