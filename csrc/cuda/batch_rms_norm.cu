// Mean squares of channels, the denominators made from them, and the division.
//
// Both passes over x are bound by memory: 16 bytes a lane and load where a map allows it, at least four loads in
// flight.  A tensor in either memory format is [outer, a, b] with b contiguous: b is the pixels of a channel, or the
// channels of a pixel.
//
// The sums have two steps, so that they are the same on every run.  A CTA leaves one float a channel for a part of at
// most 16,384 elements (channels first) or 256 pixels (channels last): no chain of float additions is longer than 64.
// Then one CTA adds the parts in their order in double, which is a fraction of a percent of the traffic.
#include <algorithm>
#include <cmath>

#include "consistency_ops/batch_rms_norm_cuda.h"
#include "cuda/convert.cuh"

namespace consistency_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPartElements = 16384;  // of one channel, channels first
constexpr int kPartRows = 256;        // pixels, channels last
constexpr int kVectors = 4;           // of the division, a thread
constexpr int kFinishThreads = 1024;
constexpr int64_t kMaxGridY = 65535;
constexpr float kSmallest = 1e-6f;  // added to v under the maximum

// [outer, a, b], b contiguous.
struct Layout {
  int64_t outer, a, b, outer_stride, a_stride;
  bool channels_last;  // b is the channels, else a is
};

Layout layout_of(const ChannelView& v) {
  if (v.channel_stride == 1 && v.inner_stride != 1) {
    return {v.outer, v.inner, v.channels, v.outer_stride, v.inner_stride, true};
  }
  return {v.outer, v.channels, v.inner, v.outer_stride, v.channel_stride, false};
}

struct SquaresParams {
  const void* x;
  float* parts;  // [number of parts, channels]
  Layout layout;
  DType dtype;
  int64_t first;  // channel, or 32 vectors of channels, of the first CTA of grid.y, which ends at 65,535
};

struct FinishParams {
  const float* parts;  // null: nothing to add
  int64_t num_parts, channels;
  double count;  // elements of a channel
  float *running_ms, *denominator;
  int64_t* num_batches;
  double decay, eps;
};

struct DivideParams {
  const void* x;
  void* y;
  Layout x_layout, y_layout;
  const float* denominator;
  DType dtype;
};

// kElements neighbours of type Raw: 16 bytes, or one element where rows do not start on 16 bytes.
template <typename Raw_, bool kWide>
struct RmsTraits {
  using Raw = Raw_;
  static constexpr int kElements = kWide ? 16 / sizeof(Raw) : 1;
  struct alignas(kElements * sizeof(Raw)) Vector {
    Raw element[kElements];
  };
};

// Of non-negative numbers.  A 64-bit division would take more instructions than the memory traffic leaves time for.
CO_DEVICE int64_t divide(int64_t number, int64_t divisor) {
  if ((number | divisor) >> 31 == 0) return static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor);
  return number / divisor;
}

// Channels first: CTA (part, channel).
template <typename Traits>
__global__ void __launch_bounds__(kThreads) squares_of_maps_kernel(CO_KERNEL_PARAM(SquaresParams, params)) {
  CO_SHARED(float, warp_sum, [kWarps]);
  using Raw = typename Traits::Raw;
  const Layout& x = params.layout;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t count = x.outer * x.b, first = int64_t{blockIdx.x} * kPartElements;
  const Raw* map = static_cast<const Raw*>(params.x) + (params.first + blockIdx.y) * x.a_stride;
  float sum = 0.0f;
  CO_UNROLL_4
  for (int e = thread * Traits::kElements; e < kPartElements; e += kThreads * Traits::kElements) {
    if (first + e >= count) continue;
    const int64_t o = divide(first + e, x.b), i = first + e - o * x.b;
    const auto v = *reinterpret_cast<const typename Traits::Vector*>(map + o * x.outer_stride + i);
    CO_UNROLL
    for (int j = 0; j < Traits::kElements; ++j) {
      const float value = to_float<Raw>(params.dtype, v.element[j]);
      sum = fma(value, value, sum);
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (thread % 32 == 0) warp_sum[thread / 32] = sum;
  __syncthreads();
  if (thread != 0) return;
  sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += warp_sum[w];
  params.parts[int64_t{blockIdx.x} * x.a + params.first + blockIdx.y] = sum;
}

// Channels last: CTA (part, 32 vectors of channels); a warp takes every 8th pixel of the part.
template <typename Traits>
__global__ void __launch_bounds__(kThreads) squares_of_pixels_kernel(CO_KERNEL_PARAM(SquaresParams, params)) {
  CO_SHARED(float, warp_sum, [kWarps][32 * Traits::kElements]);
  using Raw = typename Traits::Raw;
  const Layout& x = params.layout;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t channel = ((params.first + blockIdx.y) * 32 + lane) * Traits::kElements;
  const int64_t rows = x.outer * x.a, first = int64_t{blockIdx.x} * kPartRows;
  const Raw* at = static_cast<const Raw*>(params.x) + channel;
  float sum[Traits::kElements] = {};
  CO_UNROLL_4
  for (int r = warp; r < kPartRows; r += kWarps) {
    if (first + r >= rows || channel >= x.b) continue;
    const int64_t o = divide(first + r, x.a), i = first + r - o * x.a;
    const auto v = *reinterpret_cast<const typename Traits::Vector*>(at + o * x.outer_stride + i * x.a_stride);
    CO_UNROLL
    for (int j = 0; j < Traits::kElements; ++j) {
      const float value = to_float<Raw>(params.dtype, v.element[j]);
      sum[j] = fma(value, value, sum[j]);
    }
  }
  CO_UNROLL
  for (int j = 0; j < Traits::kElements; ++j) warp_sum[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < 32 * Traits::kElements; e += kThreads) {
    const int64_t c = ((params.first + blockIdx.y) * 32 + e % 32) * Traits::kElements + e / 32;
    if (c >= x.b) continue;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += warp_sum[w][e];
    params.parts[int64_t{blockIdx.x} * x.b + c] = total;
  }
}

// The larger, or NaN if one of them is.
CO_DEVICE float larger(float a, float b) { return a >= b || a != a ? a : b; }

// One CTA.  D is made from the stored v, rounded as it is, so that evaluation repeats the last training call.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(CO_KERNEL_PARAM(FinishParams, params)) {
  CO_SHARED(float, warp_largest, [kFinishThreads / 32]);
  CO_SHARED(double, correction, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  float largest = 0.0f;
  for (int64_t c = thread; c < params.channels; c += kFinishThreads) {
    float v = params.running_ms[c];
    if (params.parts != nullptr) {
      double sum = 0.0;
      CO_UNROLL_4
      for (int64_t p = 0; p < params.num_parts; ++p) sum += static_cast<double>(params.parts[p * params.channels + c]);
      v = static_cast<float>(params.decay * static_cast<double>(v) + (1.0 - params.decay) * (sum / params.count));
      params.running_ms[c] = v;
    }
    largest = larger(largest, v);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
  if (thread % 32 == 0) warp_largest[thread / 32] = largest;
  if (thread == 0) {
    int64_t batches = 0;
    if (params.num_batches != nullptr) {
      batches = *params.num_batches + (params.parts != nullptr ? 1 : 0);
      *params.num_batches = batches;
    }
    correction[0] = batches > 0 ? 1.0 - pow(params.decay, static_cast<double>(batches)) : 1.0;
  }
  __syncthreads();
  for (int w = 0; w < kFinishThreads / 32; ++w) largest = larger(largest, warp_largest[w]);
  const double floor = params.eps * (static_cast<double>(largest) + static_cast<double>(kSmallest));
  for (int64_t c = thread; c < params.channels; c += kFinishThreads) {
    const double v = static_cast<double>(params.running_ms[c]) / correction[0] + floor;
    params.denominator[c] = static_cast<float>(sqrt(v));
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads) channel_divide_kernel(CO_KERNEL_PARAM(DivideParams, params)) {
  using Raw = typename Traits::Raw;
  using Vector = typename Traits::Vector;
  const Layout &x = params.x_layout, &y = params.y_layout;
  const int64_t vectors_b = x.b / Traits::kElements, total = x.outer * x.a * vectors_b;
  const int64_t first = int64_t{blockIdx.x} * kThreads * kVectors + threadIdx.x;
  Vector v[kVectors];
  int64_t row[kVectors], b[kVectors];
  CO_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    const int64_t index = first + u * kThreads;
    if (index >= total) continue;
    row[u] = divide(index, vectors_b);
    b[u] = (index - row[u] * vectors_b) * Traits::kElements;
    const int64_t o = divide(row[u], x.a), a = row[u] - o * x.a;
    v[u] = *reinterpret_cast<const Vector*>(static_cast<const Raw*>(params.x) + o * x.outer_stride + a * x.a_stride +
                                            b[u]);
  }
  CO_UNROLL
  for (int u = 0; u < kVectors; ++u) {
    if (first + u * kThreads >= total) continue;
    const int64_t o = divide(row[u], y.a), a = row[u] - o * y.a;
    CO_UNROLL
    for (int j = 0; j < Traits::kElements; ++j) {
      const float d = params.denominator[x.channels_last ? b[u] + j : a];
      v[u].element[j] = from_float<Raw>(params.dtype, to_float<Raw>(params.dtype, v[u].element[j]) / d);
    }
    *reinterpret_cast<Vector*>(static_cast<Raw*>(params.y) + o * y.outer_stride + a * y.a_stride + b[u]) = v[u];
  }
}

// Every row of b starts on 16 bytes and is a whole number of them.
bool is_wide(const void* base, const Layout& layout, DType dtype) {
  const int64_t elements = 16 / element_size(dtype);
  const bool strides =
      (layout.outer == 1 || layout.outer_stride % elements == 0) && (layout.a == 1 || layout.a_stride % elements == 0);
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && strides && layout.b % elements == 0;
}

bool valid(const ChannelView& view, DType dtype) {
  return dtype != DType::kFloat64 && view.outer >= 0 && view.channels >= 0 && view.inner >= 0 &&
         (view.inner_stride == 1 || view.channel_stride == 1 || view.inner <= 1 || view.channels <= 1);
}

int64_t blocks_for(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Calls f with RmsTraits of the type and width.
template <typename F>
Status with_traits(DType dtype, bool wide, F&& f) {
  if (dtype == DType::kFloat32) return wide ? f(RmsTraits<uint32_t, true>()) : f(RmsTraits<uint32_t, false>());
  return wide ? f(RmsTraits<uint16_t, true>()) : f(RmsTraits<uint16_t, false>());
}

int64_t num_parts(const BatchRmsNormParams& params) {
  if (params.x == nullptr) return 0;
  const int64_t count = params.view.outer * params.view.inner;
  return blocks_for(count, layout_of(params.view).channels_last ? kPartRows : kPartElements);
}

Status launch_squares(const BatchRmsNormParams& params, float* parts, void* stream) {
  SquaresParams squares{params.x, parts, layout_of(params.view), params.dtype, 0};
  return with_traits(params.dtype, is_wide(params.x, squares.layout, params.dtype), [&](auto traits) {
    using Traits = decltype(traits);
    const bool pixels = squares.layout.channels_last;
    const int64_t across = pixels ? blocks_for(params.view.channels, 32 * Traits::kElements) : params.view.channels;
    auto* kernel = pixels ? squares_of_pixels_kernel<Traits> : squares_of_maps_kernel<Traits>;
    for (; squares.first < across; squares.first += kMaxGridY) {
      const dim3 grid(static_cast<unsigned>(num_parts(params)),
                      static_cast<unsigned>(std::min(kMaxGridY, across - squares.first)));
      const Status status = launch(kernel, grid, dim3(kThreads), 0, stream, squares);
      if (status != Status::kOk) return status;
    }
    return Status::kOk;
  });
}

}  // namespace

int64_t batch_rms_norm_workspace_cuda(const BatchRmsNormParams& params) {
  return num_parts(params) * params.view.channels * static_cast<int64_t>(sizeof(float));
}

Status batch_rms_norm_denominator_cuda(const BatchRmsNormParams& params, void* workspace, void* stream) {
  if (!valid(params.view, params.x == nullptr ? DType::kFloat32 : params.dtype) ||
      params.running_dtype != DType::kFloat32 || params.denominator_dtype != DType::kFloat32 ||
      !(params.decay >= 0 && params.decay < 1) || !(params.eps > 0)) {
    return Status::kInvalidArgument;
  }
  const int64_t channels = params.view.channels, parts = num_parts(params);
  if (channels == 0) return Status::kOk;
  if (parts > 0) {
    if (workspace == nullptr) return Status::kInvalidArgument;
    const Status status = launch_squares(params, static_cast<float*>(workspace), stream);
    if (status != Status::kOk) return status;
  }
  const FinishParams finish{parts > 0 ? static_cast<const float*>(workspace) : nullptr,
                            parts,
                            channels,
                            static_cast<double>(params.view.outer * params.view.inner),
                            static_cast<float*>(params.running_ms),
                            static_cast<float*>(params.denominator),
                            params.num_batches,
                            params.decay,
                            params.eps};
  return launch(finish_kernel, dim3(1), dim3(kFinishThreads), 0, stream, finish);
}

Status channel_divide_cuda(const ChannelDivideParams& params, void* stream) {
  const ChannelView &x = params.x_view, &y = params.y_view;
  const DivideParams divide{
      params.x, params.y, layout_of(x), layout_of(y), static_cast<const float*>(params.denominator), params.dtype};
  if (!valid(x, params.dtype) || !valid(y, params.dtype) || x.outer != y.outer || x.channels != y.channels ||
      x.inner != y.inner || divide.x_layout.channels_last != divide.y_layout.channels_last) {
    return Status::kInvalidArgument;
  }
  const int64_t elements = x.outer * x.channels * x.inner;
  if (elements == 0) return Status::kOk;
  const bool wide =
      is_wide(params.x, divide.x_layout, params.dtype) && is_wide(params.y, divide.y_layout, params.dtype);
  return with_traits(params.dtype, wide, [&](auto traits) {
    using Traits = decltype(traits);
    const int64_t blocks = blocks_for(elements / Traits::kElements, kThreads * kVectors);
    if (blocks > INT32_MAX) return Status::kInvalidArgument;
    return launch(channel_divide_kernel<Traits>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream,
                  divide);
  });
}

}  // namespace consistency_ops
