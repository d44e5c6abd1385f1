// The correction of every layer in one launch, rung V0: one CTA for every (layer, chunk).
//
// A CTA draws its chunk's units and rows from random.h, sums X^T X of its columns (gram.cuh), factors and inverts it in
// shared memory (factor.cuh) and multiplies its columns of G by the inverse (apply.cuh).  Nothing is written but G, the
// bias gradient, info and damping_used; there is no scratch memory, no flag and no order between CTAs.  The factor is
// bound by latency (128 dependent pivots for a chunk of 128), so many chunks must run side by side: 76 KiB of shared
// memory and 128 registers a thread let two CTAs share an SM, 264 chunks at once on the 132 SMs of an H200.
//
// Trace scaling needs the trace of a layer before any of its chunks can be factored.  Where a layer has several chunks
// its covariances go to the workspace first, in tasks of their own, and the correcting tasks wait for them.  CTAs take
// tasks in the order of a ticket counter and a task waits only for tickets smaller than its own, which running CTAs
// hold already: so there is progress at any number of resident CTAs, without a cooperative launch.  The last CTA resets
// the counters, so a replayed graph finds them as the first launch did.
//
// The price of V0, which the later rungs remove: one CTA reads all rows of a chunk and corrects all rows of G, so a
// layer with few chunks and much data (4096 x 4096: 32 chunks) leaves most of the device idle.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "consistency_ops/precondition_cuda.h"
#include "cuda/apply.cuh"
#include "cuda/chunk.cuh"
#include "cuda/factor.cuh"
#include "cuda/gram.cuh"
#include "cuda/precondition_plan.h"

namespace consistency_ops {
namespace {

constexpr int kMaxTries = 3;
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of X and of G: row indices have 32 bits, with room for the last stage

CO_HOST_DEVICE int64_t rows_of_x(const PreconditionLayer& layer) {
  return layer.x_row_size[0] * layer.x_row_size[1] * layer.x_row_size[2] * layer.x_row_size[3];
}

CO_HOST_DEVICE int64_t rows_of_g(const PreconditionLayer& layer) {
  return layer.outputs * layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2];
}

struct Counters {
  uint32_t ticket, finished;
  uint32_t ready[kMaxLaunchLayers];  // chunks of the layer whose covariance is in the workspace
};
static_assert(sizeof(Counters) <= kCudaCounterBytes, "the workspace begins with the counters");

struct PreconditionParams {
  PreconditionLayer layers[kMaxLaunchLayers];
  int32_t first_task[kMaxLaunchLayers + 1];  // running number of chunks: those before this layer
  int32_t first_wait[kMaxLaunchLayers + 1];  // the same, of layers that wait for their trace
  PreconditionOptions options;
  Counters* counters;  // null where no layer waits
  int32_t count;
  int32_t tile_floats, arena_floats, apply_rows;
};
static_assert(sizeof(PreconditionParams) <= 32764, "kernel parameters are limited to 32,764 bytes");

template <int kThreads_, int kGramBlocks_, int kCtas_>
struct PreconditionTraits {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGramBlocks = kGramBlocks_;  // of 16 x 32, a warp
  static constexpr int kCtas = kCtas_;              // resident on an SM, by registers
};
using UpTo128 = PreconditionTraits<256, 3, 2>;  // 20 blocks for 8 warps
using UpTo256 = PreconditionTraits<512, 5, 1>;  // 72 blocks for 16 warps

// The layer l with first[l] <= task < first[l + 1].
CO_DEVICE int find_layer(const int32_t (&first)[kMaxLaunchLayers + 1], int count, int task) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first[middle] <= task) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One thread: what this CTA has to do, and what it needs of random.h.
CO_DEVICE void begin_task(const PreconditionParams& params, ChunkShared& shared) {
  const int ticket = params.counters != nullptr ? static_cast<int>(atomicAdd(&params.counters->ticket, 1u))
                                                : static_cast<int>(blockIdx.x);
  const int first = params.first_wait[params.count];  // ticket of the first correcting task
  shared.publishes = ticket < first;
  if (shared.publishes) {
    shared.layer = find_layer(params.first_wait, params.count, ticket);
    shared.chunk = ticket - params.first_wait[shared.layer];
    shared.stages = kStageCovariance;
    shared.waits = false;
  } else {
    shared.layer = find_layer(params.first_task, params.count, ticket - first);
    shared.chunk = ticket - first - params.first_task[shared.layer];
    shared.waits = params.first_wait[shared.layer + 1] != params.first_wait[shared.layer];
    shared.stages = shared.waits ? params.options.stages & ~kStageCovariance : params.options.stages;
  }
  shared.failed_tries = 0;
  const PreconditionLayer& layer = params.layers[shared.layer];
  const PreconditionOptions& options = params.options;
  int64_t rows = rows_of_x(layer);
  if (layer.row_count != nullptr) rows = max(int64_t{0}, min(*layer.row_count, rows));
  shared.rows = sample_rows(rows, options.max_rows, options.seed, options.step, layer.layer);
  shared.division =
      make_division(layer.units + layer.has_bias, options.chunk, layer.group, options.seed, options.step, layer.layer);
  shared.size = static_cast<int32_t>(chunk_begin(shared.division.units, shared.division.chunks, shared.chunk + 1) -
                                     chunk_begin(shared.division.units, shared.division.chunks, shared.chunk));
  shared.x_stage = stage_rows(padded_units(shared.size), params.arena_floats);
}

CO_DEVICE int64_t covariance_offset(const PreconditionOptions& options, int chunk, int row, int column) {
  return (static_cast<int64_t>(chunk) * options.chunk + row) * options.chunk + column;
}

// Calls f(row, column, address) for the lower tiles, whose diagonal ones are complete.
template <typename F>
CO_DEVICE void for_each_element(const Chunk& chunk, int threads, F&& f) {
  int i = 0, j = 0;
  CO_NO_UNROLL
  for (int tile = 0; tile < lower_tiles(chunk.side()); ++tile) {
    CO_NO_UNROLL
    for (int e = static_cast<int>(threadIdx.x); e < kTile * kTile; e += threads) {
      f(i * kTile + e / kTile, j * kTile + e % kTile,
        chunk.tiles + tile * kTileFloats + e / kTile * kTilePitch + e % kTile);
    }
    if (++j > i) {
      ++i;
      j = 0;
    }
  }
}

// tiles * scale -> [chunk, chunk] row-major, both triangles; zeros past the chunk's own units, and everywhere if scale
// is 0.
CO_DEVICE void store_matrix(const PreconditionOptions& options, const Chunk& chunk, float* matrices, float scale,
                            int threads) {
  CO_NO_UNROLL
  for (int e = static_cast<int>(threadIdx.x); e < options.chunk * options.chunk; e += threads) {
    const int row = e / options.chunk, column = e % options.chunk;
    const int i = max(row, column), j = min(row, column);
    const float value = lower_tile(chunk.tiles, min(i, chunk.padded() - 1) / kTile,
                                   min(j, chunk.padded() - 1) / kTile)[i % kTile * kTilePitch + j % kTile];
    const bool inside = i < chunk.size() && scale != 0.0f;
    matrices[covariance_offset(options, chunk.shared.chunk, row, column)] = inside ? value * scale : 0.0f;
  }
}

CO_DEVICE void load_matrix(const PreconditionOptions& options, const Chunk& chunk, const float* matrices, int threads) {
  for_each_element(chunk, threads, [&](int row, int column, float* element) {
    const bool inside = row < chunk.size() && column < chunk.size();
    *element = inside ? matrices[covariance_offset(options, chunk.shared.chunk, row, column)] : 0.0f;
  });
  __syncthreads();
}

// Mean of the finite diagonal elements of the layer, 0 if there is none: from `covariance`, or from this chunk's own
// tiles where that is the whole layer.  The order of the sum depends on the layer's shape alone.
CO_DEVICE float layer_trace(const PreconditionOptions& options, const Chunk& chunk, const float* covariance,
                            int threads) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const Division& division = chunk.shared.division;
  float sum = 0.0f;
  int32_t count = 0;
  const auto add = [&](float value) {
    if (!is_finite(value)) return;
    sum += value;
    ++count;
  };
  if (covariance == nullptr) {
    for (int u = thread; u < chunk.size(); u += threads) {
      add(lower_tile(chunk.tiles, u / kTile, u / kTile)[u % kTile * (kTilePitch + 1)]);
    }
  } else {
    CO_NO_UNROLL
    for (int64_t e = thread; e < division.chunks * options.chunk; e += threads) {
      const int c = static_cast<int>(e / options.chunk), u = static_cast<int>(e % options.chunk);
      const int64_t size =
          chunk_begin(division.units, division.chunks, c + 1) - chunk_begin(division.units, division.chunks, c);
      if (u < size) add(covariance[covariance_offset(options, c, u, u)]);
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    count += __shfl_xor_sync(0xffffffffu, count, lanes);
  }
  if (lane == 0) {
    chunk.shared.warp_sum[warp] = sum;
    chunk.shared.warp_count[warp] = count;
  }
  __syncthreads();
  sum = 0.0f;
  count = 0;
  CO_NO_UNROLL
  for (int w = 0; w < threads / 32; ++w) {
    sum += chunk.shared.warp_sum[w];
    count += chunk.shared.warp_count[w];
  }
  return count > 0 ? sum / static_cast<float>(count) : 0.0f;
}

// tiles <- tiles * scale + damping I, and the identity past the chunk's own units.
CO_DEVICE void damp(const Chunk& chunk, float scale, float damping, int threads) {
  for_each_element(chunk, threads, [&](int row, int column, float* element) {
    const float one = row == column ? 1.0f : 0.0f;
    *element = row < chunk.size() && column < chunk.size() ? fma(*element, scale, one * damping) : one;
  });
}

// tiles <- the covariance summed from X and not yet divided by the rows, or a given one.
template <typename Traits>
CO_DEVICE void load_covariance(const PreconditionParams& params, const PreconditionLayer& layer, const Chunk& chunk) {
  if (!(chunk.shared.stages & kStageCovariance)) {
    load_matrix(params.options, chunk, static_cast<const float*>(layer.covariance), Traits::kThreads);
  } else if (layer.x_dtype == DType::kFloat32) {
    gram<Traits::kWarps, Traits::kGramBlocks, uint32_t>(layer, chunk);
  } else {
    gram<Traits::kWarps, Traits::kGramBlocks, uint16_t>(layer, chunk);
  }
}

// tiles <- L L^T = A scaled + damping I, with up to three dampings; shared.failed_minor is info.  A failed try destroys
// the covariance, so the next one sums or loads it again: that is rare, and cheaper than a copy in shared memory.
// Without the factor stage only the covariance is written.
template <typename Traits>
CO_DEVICE void damped_factor(const PreconditionParams& params, const PreconditionLayer& layer, const Chunk& chunk) {
  for (;;) {
    load_covariance<Traits>(params, layer, chunk);
    const bool summed = chunk.shared.stages & kStageCovariance;
    float scale = summed ? 1.0f / static_cast<float>(chunk.shared.rows.count) : 1.0f;
    if (summed && layer.covariance != nullptr) {
      store_matrix(params.options, chunk, static_cast<float*>(layer.covariance), scale, Traits::kThreads);
    }
    if (!(chunk.shared.stages & kStageFactor)) return;
    if (params.options.trace_scaling) {
      // Of several chunks the trace is that of the matrices in memory, which are divided by the rows already.
      const bool whole = chunk.shared.division.chunks == 1;
      const float* all = whole ? nullptr : static_cast<const float*>(layer.covariance);
      const float trace = layer_trace(params.options, chunk, all, Traits::kThreads) * (whole ? scale : 1.0f);
      if (trace > 0.0f) scale /= trace;
    }
    __syncthreads();  // the covariance has been read from the tiles, for the trace and for memory
    float damping = static_cast<float>(params.options.damping);
    for (int failed = 0; failed < chunk.shared.failed_tries; ++failed) damping *= 10.0f;
    damp(chunk, scale, damping, Traits::kThreads);
    factor<Traits::kWarps>(chunk);
    if (chunk.shared.failed_minor == 0 || chunk.shared.failed_tries == kMaxTries - 1) {
      if (threadIdx.x == 0) {
        if (layer.info != nullptr) layer.info[chunk.shared.chunk] = chunk.shared.failed_minor;
        if (layer.damping_used != nullptr) layer.damping_used[chunk.shared.chunk] = damping;
      }
      return;
    }
    __syncthreads();  // every thread has read failed_tries and failed_minor
    if (threadIdx.x == 0) ++chunk.shared.failed_tries;
  }
}

template <typename Traits>
CO_DEVICE void run_task(const PreconditionParams& params, const Chunk& chunk) {
  const PreconditionOptions& options = params.options;
  const PreconditionLayer& layer = params.layers[chunk.shared.layer];
  if (chunk.shared.stages & (kStageCovariance | kStageFactor)) damped_factor<Traits>(params, layer, chunk);
  if (chunk.shared.stages & kStageFactor) {
    if (chunk.shared.failed_minor == 0) invert<Traits::kWarps>(chunk);
    if (layer.inverse != nullptr) {  // zeros where it failed
      const float scale = chunk.shared.failed_minor == 0 ? 1.0f : 0.0f;
      store_matrix(options, chunk, static_cast<float*>(layer.inverse), scale, Traits::kThreads);
    }
  } else if (chunk.shared.stages & kStageApply) {
    if (threadIdx.x == 0) chunk.shared.failed_minor = layer.info[chunk.shared.chunk];
    load_matrix(options, chunk, static_cast<const float*>(layer.inverse), Traits::kThreads);
  }
  if (!(chunk.shared.stages & kStageApply) || chunk.shared.failed_minor != 0) return;
  if (layer.g_dtype == DType::kFloat32) {
    apply<Traits::kWarps, uint32_t>(layer, chunk, params.apply_rows);
  } else {
    apply<Traits::kWarps, uint16_t>(layer, chunk, params.apply_rows);
  }
}

// Nothing was seen, or there is nothing to correct: everything stays as it is.
CO_DEVICE bool is_empty(const PreconditionOptions& options, const PreconditionLayer& layer, const RowSample& rows) {
  return layer.units == 0 || ((options.stages & kStageCovariance) && rows.count == 0) ||
         ((options.stages & kStageApply) && rows_of_g(layer) == 0);
}

CO_DEVICE int32_t unit_of(const PreconditionLayer& layer, const Chunk& chunk, int position) {
  if (position >= chunk.size()) return kNoUnit;
  const Division& division = chunk.shared.division;
  const int64_t at = chunk_begin(division.units, division.chunks, chunk.shared.chunk) + position;
  const int64_t unit = layer.permutation != nullptr ? layer.permutation[at] : unit_at(division, at);
  return unit == layer.units ? kBiasUnit : static_cast<int32_t>(unit);
}

// Publishes a covariance that others wait for; the last CTA of the launch leaves the counters as it found them.
CO_DEVICE void end_task(const PreconditionParams& params, const ChunkShared& shared) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  Counters* counters = params.counters;
  if (shared.publishes) add_release(&counters->ready[shared.layer], 1);
  if (add_acquire_release(&counters->finished, 1) != gridDim.x - 1) return;
  for (int l = 0; l < params.count; ++l) counters->ready[l] = 0;
  counters->ticket = 0;
  atomicExch(&counters->finished, 0u);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    precondition_kernel(CO_KERNEL_PARAM(PreconditionParams, params)) {
  CO_DYNAMIC_SHARED(float, dynamic);
  CO_SHARED(ChunkShared, shared_array, [1]);
  ChunkShared& shared = shared_array[0];
  if (threadIdx.x == 0) begin_task(params, shared);
  __syncthreads();
  const PreconditionLayer& layer = params.layers[shared.layer];
  const Chunk chunk{shared, dynamic, dynamic + params.tile_floats};
  if (const int thread = fresh_thread(); thread < chunk.padded()) shared.unit[thread] = unit_of(layer, chunk, thread);
  if (shared.waits && threadIdx.x == 0) {
    const uint32_t* ready = &params.counters->ready[shared.layer];
    while (load_acquire(ready) < static_cast<uint32_t>(shared.division.chunks)) __nanosleep(64);
  }
  __syncthreads();

  if (!is_empty(params.options, layer, shared.rows)) {
    run_task<Traits>(params, chunk);
  } else if (threadIdx.x == 0 && (shared.stages & kStageFactor)) {
    if (layer.info != nullptr) layer.info[shared.chunk] = 0;
    if (layer.damping_used != nullptr) layer.damping_used[shared.chunk] = static_cast<float>(params.options.damping);
  }
  if (params.counters != nullptr) end_task(params, shared);
}

// The layer's trace is needed before any of its chunks can be factored, and all chunks are summed in this launch.
bool waits_for_trace(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int32_t both = kStageCovariance | kStageFactor;
  return options.trace_scaling && (options.stages & both) == both && num_chunks(layer, options) > 1;
}

int64_t all_units(const PreconditionLayer& layer) { return layer.units + (layer.has_bias ? 1 : 0); }

int64_t scratch_bytes(const PreconditionLayer& layer, const PreconditionOptions& options) {
  if (!waits_for_trace(layer, options) || layer.covariance != nullptr) return 0;
  return num_chunks(layer, options) * options.chunk * options.chunk * static_cast<int64_t>(sizeof(float));
}

bool valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options) {
  if (count < 0 || (count > 0 && layers == nullptr) || options.float64) return false;
  if (options.chunk < 1 || options.chunk > kMaxChunk || options.max_rows < 1 || !(options.damping >= 0)) return false;
  if (options.stages < 1 || options.stages > kStageAll) return false;
  if (options.stages == (kStageCovariance | kStageApply)) return false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    if (layer.units < 0 || layer.units >= INT32_MAX || layer.outputs < 0) return false;
    if (layer.group < 1 || layer.group > options.chunk) return false;
    if (rows_of_x(layer) > kMaxRows || rows_of_g(layer) > kMaxRows) return false;
    if (layer.x_dtype == DType::kFloat64 || layer.g_dtype == DType::kFloat64 || layer.bias_dtype == DType::kFloat64) {
      return false;
    }
    if (options.stages == kStageCovariance && layer.covariance == nullptr) return false;
    if (options.stages == kStageFactor && (layer.covariance == nullptr || layer.inverse == nullptr)) return false;
    if (options.stages == kStageApply && (layer.inverse == nullptr || layer.info == nullptr)) return false;
    if (options.stages == (kStageFactor | kStageApply) && layer.covariance == nullptr) return false;
    if (options.stages & kStageApply && layer.has_bias && layer.bias_grad == nullptr) return false;
  }
  return true;
}

// Large layers first, because the last CTAs to start decide when the launch ends; layers that wait go last.
void launch_order(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options, int64_t* order) {
  std::iota(order, order + count, int64_t{0});
  const auto work = [&](int64_t l) {
    const PreconditionLayer& layer = layers[l];
    return std::min(rows_of_x(layer), options.max_rows) + rows_of_g(layer);
  };
  std::stable_sort(order, order + count, [&](int64_t a, int64_t b) {
    const bool wait_a = waits_for_trace(layers[a], options), wait_b = waits_for_trace(layers[b], options);
    return wait_a != wait_b ? wait_b : work(a) > work(b);
  });
}

Status launch_layers(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                     const CudaDevice& device, void* workspace, void* stream) {
  static thread_local PreconditionParams params;  // 32 KB: not on the caller's stack
  int64_t order[kMaxLaunchLayers];
  launch_order(layers, count, options, order);
  params.options = options;
  params.count = static_cast<int32_t>(count);
  params.counters = nullptr;
  params.first_task[0] = params.first_wait[0] = 0;
  char* scratch = static_cast<char*>(workspace) + kCudaCounterBytes;
  int64_t tasks = 0, waiting = 0, units = 1;
  for (int64_t l = 0; l < count; ++l) {
    PreconditionLayer& layer = params.layers[l] = layers[order[l]];
    const int64_t chunks = num_chunks(layer, options);
    if (chunks > 0) units = std::max(units, (all_units(layer) + chunks - 1) / chunks);
    tasks += chunks;
    if (waits_for_trace(layer, options)) {
      waiting += chunks;
      params.counters = static_cast<Counters*>(workspace);
      if (const int64_t bytes = scratch_bytes(layer, options)) {
        layer.covariance = scratch;
        scratch += bytes;
      }
    }
    if (tasks + waiting > (int64_t{1} << 31) - 1) return Status::kInvalidArgument;
    params.first_task[l + 1] = static_cast<int32_t>(tasks);
    params.first_wait[l + 1] = static_cast<int32_t>(waiting);
  }
  if (tasks == 0) return Status::kOk;
  const PreconditionPlan plan = plan_precondition(static_cast<int>(units), device.shared_bytes);
  if (plan.threads == 0) return Status::kInvalidArgument;
  params.tile_floats = plan.tile_floats;
  params.arena_floats = plan.arena_floats;
  params.apply_rows = plan.apply_rows;
  auto* kernel = plan.threads == UpTo128::kThreads ? precondition_kernel<UpTo128> : precondition_kernel<UpTo256>;
  return launch(kernel, dim3(static_cast<unsigned>(tasks + waiting)), dim3(static_cast<unsigned>(plan.threads)),
                static_cast<size_t>(plan.shared_bytes), stream, params);
}

}  // namespace

int64_t precondition_workspace_cuda(const PreconditionLayer* layers, int64_t count,
                                    const PreconditionOptions& options) {
  int64_t largest = 0;
  bool waits = false;
  for (int64_t first = 0; first < count; first += kMaxLaunchLayers) {
    int64_t bytes = 0;
    for (int64_t l = first; l < std::min(count, first + kMaxLaunchLayers); ++l) {
      bytes += scratch_bytes(layers[l], options);
      waits = waits || waits_for_trace(layers[l], options);
    }
    largest = std::max(largest, bytes);
  }
  return waits ? kCudaCounterBytes + largest : 0;
}

Status precondition_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                         const CudaDevice& device, void* workspace, void* stream) {
  if (!valid(layers, count, options)) return Status::kInvalidArgument;
  if (workspace == nullptr && precondition_workspace_cuda(layers, count, options) > 0) return Status::kInvalidArgument;
  for (int64_t first = 0; first < count; first += kMaxLaunchLayers) {
    const Status status = launch_layers(layers + first, std::min<int64_t>(kMaxLaunchLayers, count - first), options,
                                        device, workspace, stream);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace consistency_ops
