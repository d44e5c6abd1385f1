// Displacements of weights, a few outputs at a time: what unwhiten_cpu does around the products of a correction.
#pragma once

#include <cstdint>
#include <utility>

#include "consistency_ops/whitening.h"
#include "cpu/chunk_kernels.h"
#include "cpu/strided.h"

namespace consistency_ops::cpu {

inline void* element(void* base, DType dtype, int64_t offset) {
  return static_cast<char*>(base) + offset * element_size(dtype);
}

inline const void* element(const void* base, DType dtype, int64_t offset) {
  return static_cast<const char*>(base) + offset * element_size(dtype);
}

// Calls run(offset in G, stride, length) for all elements of some outputs, in runs as long as the strides allow.
template <typename Run>
void for_each_run(const PreconditionLayer& layer, int64_t first, int64_t outputs, Run run) {
  struct Dim {
    int64_t size, stride;
  };
  Dim dims[2 + kMaxTapDims];
  int count = 0, merged = 0;
  auto add = [&](int64_t size, int64_t stride) {
    if (size != 1) dims[count++] = {size, stride};
  };
  add(outputs, layer.g_output_stride);
  add(layer.units, layer.g_unit_stride);
  for (int d = 0; d < kMaxTapDims; ++d) add(layer.g_tap_size[d], layer.g_tap_stride[d]);
  for (int d = 1; d < count; ++d) {  // by falling stride; std::sort of five is larger than the rest of this file
    for (int e = d; e > 0 && dims[e - 1].stride < dims[e].stride; --e) std::swap(dims[e - 1], dims[e]);
  }
  for (int d = 0; d < count; ++d) {
    if (merged > 0 && dims[merged - 1].stride == dims[d].size * dims[d].stride) {
      dims[merged - 1] = {dims[merged - 1].size * dims[d].size, dims[d].stride};
    } else {
      dims[merged++] = dims[d];
    }
  }
  if (merged == 0) dims[merged++] = {1, 1};
  const Dim inner = dims[merged - 1];
  int64_t repeats = 1;
  for (int d = 0; d + 1 < merged; ++d) repeats *= dims[d].size;
  for (int64_t r = 0; r < repeats; ++r) {
    int64_t at = first * layer.g_output_stride, rest = r;
    for (int d = merged - 2; d >= 0; --d) {
      at += rest % dims[d].size * dims[d].stride;
      rest /= dims[d].size;
    }
    run(at, inner.stride, inner.size);
  }
}

// G <- G - before, and the bias likewise; returns the sum of the squares.
template <typename T>
double subtract(const PreconditionLayer& layer, const WhitenedLayer& whitened, int64_t first, int64_t outputs) {
  double sum = 0;
  const GatherKernels<T>* gather = isa_kernels<T>().gather;
  const GatherKernels<T>& of_g = gather[static_cast<int>(layer.g_dtype)];
  for_each_run(layer, first, outputs, [&](int64_t at, int64_t stride, int64_t count) {
    sum +=
        of_g.subtract(element(layer.g, layer.g_dtype, at), stride, element(whitened.before, layer.g_dtype, at), count);
  });
  if (layer.has_bias) {
    const int64_t at = first * layer.bias_stride;
    sum += gather[static_cast<int>(layer.bias_dtype)].subtract(
        element(layer.bias_grad, layer.bias_dtype, at), layer.bias_stride,
        element(whitened.bias_before, layer.bias_dtype, at), outputs);
  }
  return sum;
}

template <typename T>
double sum_of_squares(const PreconditionLayer& layer, int64_t first, int64_t outputs) {
  double sum = 0;
  const GatherKernels<T>* gather = isa_kernels<T>().gather;
  const GatherKernels<T>& of_g = gather[static_cast<int>(layer.g_dtype)];
  for_each_run(layer, first, outputs, [&](int64_t at, int64_t stride, int64_t count) {
    sum += of_g.sum_of_squares(element(layer.g, layer.g_dtype, at), stride, count);
  });
  if (layer.has_bias) {
    sum += gather[static_cast<int>(layer.bias_dtype)].sum_of_squares(
        element(layer.bias_grad, layer.bias_dtype, first * layer.bias_stride), layer.bias_stride, outputs);
  }
  return sum;
}

// G <- before + scale * G, and the bias likewise.
template <typename T>
void add_scaled(const PreconditionLayer& layer, const WhitenedLayer& whitened, int64_t first, int64_t outputs,
                T scale) {
  const GatherKernels<T>* gather = isa_kernels<T>().gather;
  const GatherKernels<T>& of_g = gather[static_cast<int>(layer.g_dtype)];
  for_each_run(layer, first, outputs, [&](int64_t at, int64_t stride, int64_t count) {
    of_g.add_scaled(element(layer.g, layer.g_dtype, at), stride, element(whitened.before, layer.g_dtype, at), count,
                    scale);
  });
  if (layer.has_bias) {
    const int64_t at = first * layer.bias_stride;
    gather[static_cast<int>(layer.bias_dtype)].add_scaled(
        element(layer.bias_grad, layer.bias_dtype, at), layer.bias_stride,
        element(whitened.bias_before, layer.bias_dtype, at), outputs, scale);
  }
}

inline bool is_finite(const PreconditionLayer& layer) {
  const GatherKernels<double>* gather = isa_kernels<double>().gather;
  const GatherKernels<double>& of_g = gather[static_cast<int>(layer.g_dtype)];
  bool finite = true;
  for_each_run(layer, 0, layer.outputs, [&](int64_t at, int64_t stride, int64_t count) {
    finite = finite && of_g.all_finite(element(layer.g, layer.g_dtype, at), stride, count);
  });
  if (layer.has_bias && finite) {
    finite = gather[static_cast<int>(layer.bias_dtype)].all_finite(layer.bias_grad, layer.bias_stride, layer.outputs);
  }
  return finite;
}

// Whether a gradient has an element that is not 0; looks no further than the first.
inline bool has_gradient(const PreconditionLayer& layer) {
  const GatherKernels<double>* gather = isa_kernels<double>().gather;
  const GatherKernels<double>& of_g = gather[static_cast<int>(layer.g_dtype)];
  bool found = false;
  for (int64_t o = 0; o < layer.outputs && !found; ++o) {
    for_each_run(layer, o, 1, [&](int64_t at, int64_t stride, int64_t count) {
      found = found || of_g.any_nonzero(element(layer.g, layer.g_dtype, at), stride, count);
    });
  }
  if (layer.has_bias && !found) {
    found = gather[static_cast<int>(layer.bias_dtype)].any_nonzero(layer.bias_grad, layer.bias_stride, layer.outputs);
  }
  return found;
}

}  // namespace consistency_ops::cpu
