// Which task a CTA does, what it waits for and what waits for it.
//
// Layer l has up to three kinds of tasks: sums (a share of the rows of X -> a partial covariance in the workspace),
// finishing tasks (one a chunk: covariance -> inverse -> G) and slabs (a share of the rows of G, with the inverse that
// a finishing task left in the workspace).  LayerShares says how many; V0 and V1 have finishing tasks only, and sums
// where the trace of a layer must be known before its first chunk is factored.
//
// Tasks are numbered in rounds: round r has the sums of layer r, then the finishing tasks of layer r - 1, then the
// slabs of layer r - 2, so that the factors of one layer, which are bound by latency, run beside the reads of the next.
// In a round the share counts slowest: CTAs that run side by side read the same rows for different chunks, whose units
// share sectors.
//
// Where tasks wait, CTAs take numbers from a ticket counter when they start, so every smaller number is held by a CTA
// that runs or has run; and a task waits for smaller numbers only.  So there is progress at any number of resident
// CTAs, without a cooperative launch.  The last CTA resets the counters: a replayed graph finds them as the first
// launch did.
#pragma once

#include "cuda/chunk.cuh"

namespace consistency_ops {

enum TaskRole : int32_t { kSumTask = 0, kFinishTask = 1, kSlabTask = 2 };

struct Counters {
  uint32_t ticket, finished;
  uint32_t summed[kMaxLaunchLayers];    // CTAs of the layer that have written their part of the covariances
  uint32_t inverted[kMaxLaunchLayers];  // and of the inverses
};
static_assert(sizeof(Counters) <= kCudaCounterBytes, "the workspace begins with the counters");

struct PreconditionParams {
  PreconditionLayer layers[kMaxLaunchLayers];
  int32_t first_task[kMaxLaunchLayers + 3];  // of every round
  LayerShares shares[kMaxLaunchLayers];
  uint32_t records[kMaxLaunchLayers];  // where a layer's part of the workspace begins, in units of 16 bytes
  PreconditionOptions options;
  char* workspace;  // null where no task waits; begins with the counters
  int32_t count, cluster;
  int32_t tile_floats, arena_floats, apply_rows;
  bool tf32;
};
static_assert(sizeof(PreconditionParams) <= 32764, "kernel parameters are limited to 32,764 bytes");

CO_HOST_DEVICE inline int64_t all_units(const PreconditionLayer& layer) {
  return layer.units + (layer.has_bias ? 1 : 0);
}

CO_HOST_DEVICE inline int64_t rows_of_x(const PreconditionLayer& layer) {
  return layer.x_row_size[0] * layer.x_row_size[1] * layer.x_row_size[2] * layer.x_row_size[3];
}

CO_HOST_DEVICE inline int64_t rows_of_g(const PreconditionLayer& layer) {
  return layer.outputs * layer.g_tap_size[0] * layer.g_tap_size[1] * layer.g_tap_size[2];
}

CO_HOST_DEVICE inline int64_t count_chunks(const PreconditionLayer& layer, const PreconditionOptions& options) {
  return (all_units(layer) + options.chunk - 1) / options.chunk;
}

// Floats of the tiles of a layer's largest chunk.
CO_HOST_DEVICE inline int32_t record_floats(int64_t units, int64_t chunks) {
  return lower_tiles(padded_units(static_cast<int>((units + chunks - 1) / chunks)) / kTile) * kTileFloats;
}

constexpr int kStatusFloats = 4;  // failed_minor after the inverse, and what keeps the next record on 16 bytes

// Tasks of a layer, a chunk.
CO_HOST_DEVICE inline int tasks_per_chunk(const LayerShares& shares, int32_t stages, int role) {
  if (role == kSumTask) return shares.sums;
  if (role == kSlabTask) return shares.slabs;
  return stages == kStageApply && shares.slabs > 0 ? 0 : 1;
}

// The round r with first_task[r] <= task < first_task[r + 1].
CO_DEVICE int find_round(const PreconditionParams& params, int task) {
  int low = 0, high = params.count + 2;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (params.first_task[middle] <= task) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// [first, first + count): share `part` of `parts` of n things, as equal as they can be made.
CO_DEVICE void share_of(int64_t n, int part, int parts, int64_t& first, int64_t& count) {
  const int64_t size = (n + parts - 1) / parts;
  first = min(n, size * part);
  count = min(n, first + size) - first;
}

// One thread: the task of number shared.ticket, and what it needs of random.h.
CO_DEVICE void begin_task(const PreconditionParams& params, ChunkShared& shared) {
  const PreconditionOptions& options = params.options;
  const int round = find_round(params, shared.ticket);
  int task = shared.ticket - params.first_task[round], role = kSumTask, l = round, chunks = 1;
  for (; role <= kSlabTask; ++role, --l) {
    if (l >= params.count) continue;
    chunks = static_cast<int>(count_chunks(params.layers[l], options));
    const int tasks = chunks * tasks_per_chunk(params.shares[l], options.stages, role);
    if (task < tasks) break;
    task -= tasks;
  }
  const PreconditionLayer& layer = params.layers[l];
  shared.role = role;
  shared.layer = l;
  shared.chunk = task % chunks;
  shared.part = task / chunks;
  shared.sums = params.shares[l].sums;
  shared.slabs = params.shares[l].slabs;
  shared.cluster = params.cluster;
  shared.tf32 = params.tf32;
  shared.failed_tries = shared.failed_minor = 0;
  shared.awaited = 0;
  shared.stages = options.stages;
  const uint32_t ctas = static_cast<uint32_t>(chunks * params.cluster);
  if (role == kSumTask) {
    shared.stages = kStageCovariance;
  } else if (role == kSlabTask) {
    shared.stages = kStageApply;
    if (options.stages != kStageApply) shared.awaited = ctas;
  } else {
    if (shared.slabs > 0) shared.stages &= ~kStageApply;
    shared.awaited = ctas * static_cast<uint32_t>(shared.sums);
  }

  int64_t rows = rows_of_x(layer);
  if (layer.row_count != nullptr) rows = max(int64_t{0}, min(*layer.row_count, rows));
  shared.rows = sample_rows(rows, options.max_rows, options.seed, options.step, layer.layer);
  shared.all_rows = shared.rows.count;
  int64_t first;
  share_of(shared.all_rows, shared.part * params.cluster + shared.rank,
           role == kSumTask ? shared.sums * params.cluster : params.cluster, first, shared.rows.count);
  shared.rows.offset += first * shared.rows.stride;
  share_of(layer.outputs, shared.part * params.cluster + shared.rank,
           role == kSlabTask ? shared.slabs * params.cluster : params.cluster, shared.first_output, shared.outputs);

  shared.division =
      make_division(layer.units + layer.has_bias, options.chunk, layer.group, options.seed, options.step, layer.layer);
  shared.size = static_cast<int32_t>(chunk_begin(shared.division.units, shared.division.chunks, shared.chunk + 1) -
                                     chunk_begin(shared.division.units, shared.division.chunks, shared.chunk));
  const int elements = params.arena_floats * (layer.x_dtype == DType::kFloat32 ? 1 : 2);
  shared.x_stage = stage_rows(padded_units(shared.size), elements);  // at least 16 rows of 16-bit numbers
  shared.record = record_floats(shared.division.units, shared.division.chunks);
  shared.sum_records = reinterpret_cast<float*>(params.workspace + static_cast<int64_t>(params.records[l]) * 16);
  shared.inverse_record = shared.sum_records + static_cast<int64_t>(chunks) * shared.sums * shared.record +
                          static_cast<int64_t>(shared.chunk) * (shared.record + kStatusFloats);
}

// All threads of the cluster: takes the next ticket.
CO_DEVICE void take_task(const PreconditionParams& params, ChunkShared& shared) {
  Counters* counters = reinterpret_cast<Counters*>(params.workspace);
  if (threadIdx.x == 0) {
    shared.rank = static_cast<int>(blockIdx.x) % params.cluster;
    shared.ticket = static_cast<int>(blockIdx.x) / params.cluster;
    if (counters != nullptr && shared.rank == 0) shared.ticket = static_cast<int>(atomicAdd(&counters->ticket, 1u));
  }
  if (counters != nullptr && params.cluster > 1) {
    cluster_barrier();  // rank 0 has its ticket
    if (threadIdx.x == 0 && shared.rank != 0) shared.ticket = load_cluster(&shared.ticket, 0);
    cluster_barrier();  // which all have read, so that rank 0 may exit
  }
  if (threadIdx.x == 0) begin_task(params, shared);
  __syncthreads();
}

// Until the tasks that this one needs have published.  Ends with a barrier.
CO_DEVICE void wait_for_others(const PreconditionParams& params, const ChunkShared& shared) {
  if (threadIdx.x == 0 && shared.awaited != 0) {
    Counters* counters = reinterpret_cast<Counters*>(params.workspace);
    const uint32_t* counter =
        shared.role == kFinishTask ? &counters->summed[shared.layer] : &counters->inverted[shared.layer];
    while (load_acquire(counter) < shared.awaited) __nanosleep(64);
  }
  __syncthreads();
}

// Publishes what others wait for.
CO_DEVICE void end_task(const PreconditionParams& params, const ChunkShared& shared) {
  if (params.workspace == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Counters* counters = reinterpret_cast<Counters*>(params.workspace);
  if (shared.role == kSumTask) add_release(&counters->summed[shared.layer], 1);
  if (shared.role == kFinishTask && shared.slabs > 0) add_release(&counters->inverted[shared.layer], 1);
  if (add_acquire_release(&counters->finished, 1) != gridDim.x - 1) return;
  for (int l = 0; l < params.count; ++l) counters->summed[l] = counters->inverted[l] = 0;
  counters->ticket = 0;
  atomicExch(&counters->finished, 0u);
}

}  // namespace consistency_ops
