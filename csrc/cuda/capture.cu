// Row capture: sampled rows of a layer's input, in any strides, to rows of units side by side.
//
// Bound by memory, and by little of it: at most `capacity` rows a call.  What counts is whole sectors on both sides.  A
// warp reads along the dimension that is fast in x and writes along the units:
//
//   units fast (linear layers, channels-last maps)  a lane copies 16 bytes of a row, 512 bytes a warp
//   rows fast (NCHW maps)                           32 rows x 32 units turn around in shared memory; a warp reads 32
//                                                   samples of one channel, so a sector that holds several samples is
//                                                   fetched once.  Of s rows one is taken: 32 / s bytes or one element
//                                                   of a sector, which is the price of NCHW, 8 times the bytes at
//                                                   s >= 8 in float32.  Channels-last maps pay nothing.
//
// Calculated for 4096 rows of every convolution of ResNet-50 in bfloat16 at 4.3 TB/s: NCHW 690 us, channels-last 43.
// Runs of 16 neighbouring pixels would fill the sectors of NCHW too, with rows that are nearly alike; which rows are
// taken is one definition for all devices and layouts (random.h), so the cure is torch.channels_last.
//
// How many rows are due, and whether older ones must be thinned out first, stands in the state on the device.  Every
// CTA works it out from the old state (capture.h, as on the CPU); the last CTA to finish writes the new one, so one
// launch does everything and the host reads nothing.  Thinning is rare, once for every doubling of the rows of a step.
// Rows then move down within the buffer: a CTA that owns a slice of the units moves its slice of all rows, 64 at a
// time, and appends the new rows' slice itself, so that no other CTA can be in its way.
#include <algorithm>
#include <type_traits>

#include "consistency_ops/capture_cuda.h"
#include "cuda/convert.cuh"

namespace consistency_ops {
namespace {

constexpr int kThreads = 256;
constexpr int kCtas = 3;  // resident on an SM, by registers
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 64;                 // of a tile
constexpr int kSteps = kRows / kWarps;    // a warp takes so many rows of a tile,
constexpr int kInFlight = 4;              // and loads so many before it stores one
constexpr int kColumns = 32;              // of a tile that is turned around or moved
constexpr int kTurnPitch = kRows + 1;     // no bank conflicts between 32 units
constexpr int64_t kMaxCtas = 2048;        // some 8 for every SM; CTAs take further tiles in turn
constexpr int64_t kMaxRows = UINT32_MAX;  // of x
constexpr int64_t kMaxTasks = INT32_MAX;

struct CaptureParams {
  CaptureProblem problem;
  int32_t mode;  // what a launch does; see below
};
enum : int32_t { kCaptureRows = 0, kMark = 1, kMarkAndRestart = 2 };

// Elements of x and of the buffer in memory, and how many a lane takes where units are fast: 16 bytes of the wider.
template <typename From_, typename To_, int kWidth_>
struct CaptureTraits {
  using From = From_;
  using To = To_;
  static constexpr int kWidth = kWidth_;
  struct alignas(kWidth * sizeof(From)) FromVector {
    From element[kWidth];
  };
  struct alignas(kWidth * sizeof(To)) ToVector {
    To element[kWidth];
  };
};

// Storage: uint16_t is bfloat16 or float16, as `dtype` says, and copied as it is into a buffer of the same type. Floats
// become bfloat16.
template <typename From, typename To>
CO_DEVICE To converted(DType dtype, From value) {
  if constexpr (std::is_same_v<From, To>) {
    return value;
  } else if constexpr (std::is_same_v<From, uint16_t>) {
    return static_cast<To>(to_float<uint16_t>(dtype, value));
  } else if constexpr (std::is_same_v<To, uint16_t>) {
    return float_to_bfloat16(value);
  } else {
    return static_cast<To>(value);
  }
}

// Indices have 32 bits (the launcher sees to it), because a 64-bit division costs a call and its registers.
CO_DEVICE int64_t offset_of(const CaptureProblem& p, uint32_t index) {
  int64_t offset = 0;
  CO_NO_UNROLL
  for (int i = kMaxCaptureDims - 1; i > 0; --i) {
    const auto size = static_cast<uint32_t>(p.row_size[i]);
    if (size == 1) continue;
    const uint32_t outer = index / size;
    offset += static_cast<int64_t>(index - outer * size) * p.row_stride[i];
    index = outer;
  }
  return offset + static_cast<int64_t>(index) * p.row_stride[0];
}

struct CaptureShared {
  CapturePlan plan;
  int64_t offset[kRows];  // of the rows of a tile, in x
  int64_t source[kRows];  // of the rows of a block that moves, in the buffer
};

// One thread.
CO_DEVICE void make_plan(const CaptureParams& params, CaptureShared& shared) {
  const CaptureState& s = *params.problem.state;
  // Without `arrived`, which other CTAs may be counting up.
  const CaptureState old{s.used,    s.seen, s.stride, s.next,    s.mark, s.thinned,
                         s.forward, s.step, s.paused, s.skipped, 0};
  shared.plan =
      params.mode == kCaptureRows ? plan_capture(params.problem, old) : plan_mark(old, params.mode == kMarkAndRestart);
}

// Rows [row, row + kRows) of the ones to append, units [column, column + 32 kWidth): units are fast.
template <typename Traits>
CO_DEVICE void copy_rows(const CaptureProblem& p, const CaptureShared& shared, int64_t row, int64_t column) {
  using From = typename Traits::From;
  using To = typename Traits::To;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t unit = column + lane * Traits::kWidth;
  const From* x = static_cast<const From*>(p.x) + unit;
  To* rows = static_cast<To*>(p.rows) + (shared.plan.kept + row) * p.units + unit;
  CO_NO_UNROLL
  for (int first = warp; first < kRows; first += kInFlight * kWarps) {
    typename Traits::FromVector v[kInFlight];
    CO_UNROLL
    for (int s = 0; s < kInFlight; ++s) {
      const int r = first + s * kWarps;
      if (row + r < shared.plan.count && unit < p.units) {
        v[s] = *reinterpret_cast<const typename Traits::FromVector*>(x + shared.offset[r]);
      }
    }
    CO_UNROLL
    for (int s = 0; s < kInFlight; ++s) {
      const int r = first + s * kWarps;
      if (row + r >= shared.plan.count || unit >= p.units) continue;
      typename Traits::ToVector out;
      CO_UNROLL
      for (int e = 0; e < Traits::kWidth; ++e) out.element[e] = converted<From, To>(p.x_dtype, v[s].element[e]);
      *reinterpret_cast<typename Traits::ToVector*>(rows + r * p.units) = out;
    }
  }
}

// Rows [row, row + kRows), units [column, column + 32): rows are fast, or nothing is.
template <typename Traits>
CO_DEVICE void turn_rows(const CaptureProblem& p, const CaptureShared& shared, int64_t row, int64_t column,
                         typename Traits::To (&turned)[kColumns][kTurnPitch]) {
  using From = typename Traits::From;
  using To = typename Traits::To;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const From* x = static_cast<const From*>(p.x) + column * p.unit_stride;
  CO_UNROLL_4
  for (int s = 0; s < kSteps; ++s) {  // a warp takes half the rows of one unit
    const int u = (warp + s * kWarps) / 2, r = (warp + s * kWarps) % 2 * 32 + lane;
    if (row + r < shared.plan.count && column + u < p.units) {
      turned[u][r] = converted<From, To>(p.x_dtype, x[shared.offset[r] + u * p.unit_stride]);
    }
  }
  __syncthreads();
  To* rows = static_cast<To*>(p.rows) + (shared.plan.kept + row) * p.units + column;
  CO_UNROLL_4
  for (int s = 0; s < kSteps; ++s) {
    const int r = warp + s * kWarps;
    if (row + r < shared.plan.count && column + lane < p.units) rows[r * p.units + lane] = turned[lane][r];
  }
}

// Moves the slice of units [column, column + 32) of the kept rows down, in ascending order: what a block of 64 rows
// overwrites is read by no later block, so one barrier between reading and writing a block is enough.
template <typename To>
CO_DEVICE void move_slice(const CaptureProblem& p, CaptureShared& shared, int64_t column) {
  const CapturePlan& plan = shared.plan;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  To* rows = static_cast<To*>(p.rows) + column + lane;
  const bool inside = column + lane < p.units;
  CO_NO_UNROLL
  for (int64_t first = 0; first < plan.kept; first += kRows) {
    if (threadIdx.x < kRows && first + threadIdx.x < plan.kept) {
      shared.source[threadIdx.x] = plan.source_of(first + threadIdx.x);
    }
    __syncthreads();
    To value[kSteps];
    CO_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int64_t row = first + warp + s * kWarps;
      if (row < plan.kept && inside) value[s] = rows[shared.source[row - first] * p.units];
    }
    __syncthreads();
    CO_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      const int64_t row = first + warp + s * kWarps;
      if (row < plan.kept && inside) rows[row * p.units] = value[s];
    }
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, kCtas) capture_kernel(CO_KERNEL_PARAM(CaptureParams, params)) {
  using To = typename Traits::To;
  CO_SHARED(CaptureShared, shared_array, [1]);
  CO_SHARED(To, turned, [kColumns][kTurnPitch]);
  CaptureShared& shared = shared_array[0];
  const CaptureProblem& p = params.problem;
  if (threadIdx.x == 0) make_plan(params, shared);
  __syncthreads();
  const CapturePlan& plan = shared.plan;
  const bool units_fast = p.unit_stride == 1;
  const bool moves = plan.moves();
  // Without moves every tile is a task; with them every slice of units is, and its tiles are taken in turn.
  const int width = units_fast && !moves ? 32 * Traits::kWidth : kColumns;
  const auto slices = static_cast<uint32_t>((p.units + width - 1) / width);
  const auto tiles = static_cast<uint32_t>((plan.count + kRows - 1) / kRows);
  const uint32_t tasks = moves ? slices : slices * tiles;
  CO_NO_UNROLL
  for (uint32_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const uint32_t first = moves ? 0 : task / slices, end = moves ? tiles : first + 1;
    const int64_t column = int64_t{moves ? task : task - first * slices} * width;
    if (moves) move_slice<To>(p, shared, column);
    CO_NO_UNROLL
    for (uint32_t tile = first; tile < end; ++tile) {
      const int64_t row = int64_t{tile} * kRows;
      __syncthreads();  // the tile before has been read from shared memory
      if (threadIdx.x < kRows && row + threadIdx.x < plan.count) {
        shared.offset[threadIdx.x] = offset_of(p, static_cast<uint32_t>(plan.row_of_x(row + threadIdx.x)));
      }
      __syncthreads();
      if (units_fast && !moves) {
        copy_rows<Traits>(p, shared, row, column);
      } else {
        turn_rows<Traits>(p, shared, row, column, turned);
      }
    }
  }
  if (threadIdx.x != 0) return;                                    // the only one of this CTA that has read the state
  auto* arrived = reinterpret_cast<uint32_t*>(&p.state->arrived);  // little-endian: the low half
  if (add_acquire_release(arrived, 1) != gridDim.x - 1) return;
  *p.state = plan.after;  // with arrived = 0
}

bool on_vectors(const CaptureProblem& p, int64_t width) {
  if (p.unit_stride != 1 || p.units % width != 0) return false;
  for (int i = 0; i < kMaxCaptureDims; ++i) {
    if (p.row_size[i] > 1 && p.row_stride[i] % width != 0) return false;
  }
  const auto aligned = [width](const void* pointer, DType dtype) {
    return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(width * element_size(dtype)) == 0;
  };
  return aligned(p.x, p.x_dtype) && aligned(p.rows, p.rows_dtype);
}

template <typename From, typename To>
Status launch_capture(const CaptureParams& params, void* stream) {
  const CaptureProblem& p = params.problem;
  constexpr int kWidth = 16 / static_cast<int>(sizeof(To) > sizeof(From) ? sizeof(To) : sizeof(From));
  const bool wide = params.mode == kCaptureRows && on_vectors(p, kWidth);
  int64_t rows = 1;
  for (int i = 0; i < kMaxCaptureDims; ++i) rows *= p.row_size[i];
  if (params.mode == kCaptureRows && (rows == 0 || p.units == 0)) return Status::kOk;
  if (rows > kMaxRows || p.capacity / kRows + 1 > kMaxTasks / (p.units / kColumns + 1)) return Status::kInvalidArgument;
  // As many CTAs as there are tiles if nothing moves: how many rows are due only the device knows.
  const int64_t width = p.unit_stride == 1 ? 32 * (wide ? kWidth : 1) : kColumns;
  const int64_t slices = (p.units + width - 1) / width;
  const int64_t tiles = params.mode == kCaptureRows ? (std::min(rows, p.capacity) + kRows - 1) / kRows : 1;
  const int64_t ctas = params.mode == kMark ? 1 : std::max<int64_t>(1, std::min(slices * tiles, kMaxCtas));
  auto* kernel = wide ? capture_kernel<CaptureTraits<From, To, kWidth>> : capture_kernel<CaptureTraits<From, To, 1>>;
  return launch(kernel, dim3(static_cast<unsigned>(ctas)), dim3(kThreads), 0, stream, params);
}

Status launch_types(const CaptureParams& params, void* stream) {
  const DType from = params.problem.x_dtype, to = params.problem.rows_dtype;
  const bool half = from == DType::kBFloat16 || from == DType::kFloat16;
  if (to == DType::kFloat64) {
    if (from == DType::kFloat64) return launch_capture<double, double>(params, stream);
    return half ? launch_capture<uint16_t, double>(params, stream) : launch_capture<float, double>(params, stream);
  }
  if (to == DType::kFloat32 && from != DType::kFloat64) {
    return half ? launch_capture<uint16_t, float>(params, stream) : launch_capture<float, float>(params, stream);
  }
  if (from == DType::kFloat32 && to == DType::kBFloat16) return launch_capture<float, uint16_t>(params, stream);
  return from == to ? launch_capture<uint16_t, uint16_t>(params, stream) : Status::kInvalidArgument;
}

}  // namespace

Status capture_rows_cuda(const CaptureProblem& problem, void* stream) {
  if (problem.capacity < 1 || problem.units < 0) return Status::kInvalidArgument;
  return launch_types({problem, kCaptureRows}, stream);
}

Status capture_mark_cuda(const CaptureProblem& problem, bool restart, void* stream) {
  CaptureParams params{problem, restart ? kMarkAndRestart : kMark};
  params.problem.x_dtype = problem.rows_dtype;  // nothing is converted
  return launch_types(params, stream);
}

}  // namespace consistency_ops
