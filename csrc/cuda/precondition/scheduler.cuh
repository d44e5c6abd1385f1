// Which task a CTA does, what it waits for and what waits for it.
//
// Layer l has up to three kinds of tasks: sums (a share of the rows of X -> a partial covariance in the workspace),
// finishing tasks (one a chunk: covariance -> inverse -> G) and slabs (a share of the rows of G, with the inverse that
// a finishing task left in the workspace).  LayerShares says how many; V0 and V1 have finishing tasks only, and sums
// where the trace of a layer must be known before its first chunk is factored.  Three more kinds serve the exact
// division (permute.cuh), each with a share of the rows and all chunks: pack X for the sums, permute G for the slabs,
// and restore G after them.
//
// Layers with the same input are one run.  The first has all the tasks; those that work on G take the G of the whole
// run for one, so that a share may begin in one layer and end in another.
//
// Tasks are numbered in rounds: round r packs X of layer r, sums layer r - 1, finishes layer r - 2 and permutes its G,
// has the slabs of layer r - 3, and restores G of layer r - 4; so the factors of one layer, which are bound by latency,
// run beside the reads of the next.  In a round the share counts slowest: CTAs that run side by side read the same rows
// for different chunks, whose units share sectors.  Two places in the workspace hold packed X: a layer waits until the
// sums of the last but one have read theirs.
//
// Where tasks wait, CTAs take numbers from a ticket counter when they start, so every smaller number is held by a CTA
// that runs or has run; and a task waits for smaller numbers only.  So there is progress at any number of resident
// CTAs, without a cooperative launch.  The last CTA resets the counters: the next launch and a replayed graph find them
// as the first launch did.  They lie in the library's own device memory, which is zero when it is loaded, so that no
// call has to fill anything with zeros first; counter_slots.h says which of the 256 slots a launch uses.
#pragma once

#include "cuda/precondition/chunk.cuh"

namespace consistency_ops {

enum TaskRole : int32_t {
  kPackTask = 0,
  kSumTask = 1,
  kFinishTask = 2,
  kPermuteTask = 3,
  kSlabTask = 4,
  kRestoreTask = 5,
};
constexpr int kRoles = 6, kRounds = 5;

CO_HOST_DEVICE constexpr int layers_behind(int role) { return role < kPermuteTask ? role : role - 1; }

struct Counters {
  uint32_t ticket, finished;
  // CTAs of a layer that have written their part
  uint32_t packed[kMaxLaunchLayers];     // of X
  uint32_t summed[kMaxLaunchLayers];     // of the covariances
  uint32_t inverted[kMaxLaunchLayers];   // of the inverses, and of the permuted G
  uint32_t corrected[kMaxLaunchLayers];  // of the permuted G
};
static_assert(sizeof(Counters) <= kCudaCounterBytes, "the workspace begins with the counters");

struct PreconditionParams {
  PreconditionLayer layers[kMaxLaunchLayers];
  int32_t first_task[kMaxLaunchLayers + kRounds];  // of every round
  LayerShares shares[kMaxLaunchLayers];
  uint32_t records[kMaxLaunchLayers];  // where a layer's part of the workspace begins, in units of 16 bytes
  uint32_t packed[kMaxLaunchLayers];   // and its packed X
  PreconditionOptions options;
  char* workspace;   // null where no task waits
  int32_t counters;  // CudaTuning
  int32_t count, cluster;
  int32_t tile_floats, arena_floats, apply_rows, shared_bytes;
  bool tf32;
};
static_assert(sizeof(PreconditionParams) <= 32764, "kernel parameters are limited to 32,764 bytes");

CO_DEVICE_MEMORY Counters counter_slots[kCudaCounterSlots];

// Null where no task waits.
CO_DEVICE Counters* counters_of(const PreconditionParams& params) {
  if (params.workspace == nullptr) return nullptr;
  return params.counters < 0 ? reinterpret_cast<Counters*>(params.workspace) : counter_slots + params.counters;
}

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

// Layers with the input of the first of `layers`.
CO_HOST_DEVICE inline int run_length(const PreconditionLayer* layers, int64_t count) {
  int length = 1;
  while (length < count && layers[length].same_input) ++length;
  return length;
}

// Chunks that are tasks of this layer.
CO_HOST_DEVICE inline int64_t own_chunks(const PreconditionLayer& layer, const PreconditionOptions& options) {
  return layer.same_input ? 0 : count_chunks(layer, options);
}

constexpr int kStatusFloats = 4;  // failed_minor after the inverse, and what keeps the next record on 16 bytes

// Elements of a packed row of X, which begins on 16 bytes.
CO_HOST_DEVICE inline int64_t packed_pitch(const PreconditionLayer& layer) {
  const int64_t vector = 16 / element_size(layer.x_dtype);
  return (all_units(layer) + vector - 1) / vector * vector;
}

// Tasks of a layer.
CO_HOST_DEVICE inline int64_t count_tasks(const LayerShares& shares, int64_t chunks, int32_t stages, int role) {
  if (role == kPackTask) return shares.packs;
  if (role == kPermuteTask || role == kRestoreTask) return shares.moves;
  if (role == kSumTask) return chunks * shares.sums;
  if (role == kSlabTask) return chunks * shares.slabs;
  return stages == kStageApply && shares.slabs > 0 ? 0 : chunks;
}

// The round r with first_task[r] <= task < first_task[r + 1].
CO_DEVICE int find_round(const PreconditionParams& params, int task) {
  int low = 0, high = params.count + kRounds - 1;
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

// One thread: which CTAs a task of layer l waits for, and where it says that it is done.
CO_DEVICE void link_task(const PreconditionParams& params, ChunkShared& shared, int l, uint32_t ctas) {
  Counters* const counters = counters_of(params);
  shared.awaited = 0;
  shared.counter = shared.published = nullptr;
  if (counters == nullptr) return;
  if (shared.role == kPackTask) {
    int user = l - 1;  // of the same place in the workspace
    while (user >= 0 && (params.shares[user].packs == 0 || params.packed[user] != params.packed[l])) --user;
    if (user >= 0) {
      shared.awaited = static_cast<uint32_t>(count_chunks(params.layers[user], params.options)) *
                       static_cast<uint32_t>(params.shares[user].sums);
      shared.counter = &counters->summed[user];
    }
    shared.published = &counters->packed[l];
  } else if (shared.role == kSumTask) {
    shared.awaited = static_cast<uint32_t>(shared.packs);
    shared.counter = &counters->packed[l];
    shared.published = &counters->summed[l];
  } else if (shared.role == kFinishTask) {
    shared.awaited = ctas * static_cast<uint32_t>(shared.sums);
    shared.counter = &counters->summed[l];
    if (shared.slabs > 0) shared.published = &counters->inverted[l];
  } else if (shared.role == kPermuteTask) {
    shared.published = &counters->inverted[l];
  } else if (shared.role == kSlabTask) {
    shared.awaited = static_cast<uint32_t>(shared.moves);
    if (params.options.stages != kStageApply) shared.awaited += ctas;
    shared.counter = &counters->inverted[l];
    if (shared.moves > 0) shared.published = &counters->corrected[l];
  } else {
    shared.awaited = ctas * static_cast<uint32_t>(shared.slabs);
    shared.counter = &counters->corrected[l];
  }
}

struct OutputRange {
  int64_t begin, end;
};

// The outputs of member `member` of the run that this CTA corrects.
CO_DEVICE OutputRange outputs_of(const PreconditionLayer* members, int member, const ChunkShared& shared) {
  int64_t before = 0;
  CO_NO_UNROLL
  for (int m = 0; m < member; ++m) before += members[m].outputs;
  const int64_t begin = shared.first_output - before;
  return {max(int64_t{0}, begin), min(members[member].outputs, begin + shared.outputs)};
}

// One thread: the task of number shared.ticket, and what it needs of random.h.
CO_DEVICE void begin_task(const PreconditionParams& params, ChunkShared& shared) {
  const PreconditionOptions& options = params.options;
  const int round = find_round(params, shared.ticket);
  int task = shared.ticket - params.first_task[round], role = kPackTask, l = round, chunks = 1;
  for (; role < kRoles; ++role) {
    l = round - layers_behind(role);
    if (l < 0 || l >= params.count) continue;
    chunks = static_cast<int>(own_chunks(params.layers[l], options));
    const int tasks = static_cast<int>(count_tasks(params.shares[l], chunks, options.stages, role));
    if (task < tasks) break;
    task -= tasks;
  }
  const PreconditionLayer& layer = params.layers[l];
  const bool whole_rows = role == kPackTask || role == kPermuteTask || role == kRestoreTask;
  shared.role = role;
  shared.layer = l;
  shared.members = run_length(params.layers + l, params.count - l);
  shared.chunk = whole_rows ? 0 : task % chunks;
  shared.part = whole_rows ? task : task / chunks;
  shared.sums = params.shares[l].sums;
  shared.slabs = params.shares[l].slabs;
  shared.packs = params.shares[l].packs;
  shared.moves = params.shares[l].moves;
  shared.cluster = params.cluster;
  shared.tf32 = params.tf32;
  shared.failed_tries = shared.failed_minor = 0;
  shared.stages = options.stages;
  if (whole_rows) {
    shared.stages = 0;
  } else if (role == kSumTask) {
    shared.stages = kStageCovariance;
  } else if (role == kSlabTask) {
    shared.stages = kStageApply;
  } else if (shared.slabs > 0) {
    shared.stages &= ~kStageApply;
  }
  link_task(params, shared, l, static_cast<uint32_t>(chunks * params.cluster));

  int64_t rows = rows_of_x(layer);
  if (layer.row_count != nullptr) rows = max(int64_t{0}, min(*layer.row_count, rows));
  shared.rows = sample_rows(rows, options.max_rows, options.seed, options.step, layer.layer);
  shared.all_rows = shared.rows.count;
  const int part = shared.part * params.cluster + shared.rank;
  const int x_parts = role == kSumTask ? shared.sums : role == kPackTask ? shared.packs : 1;
  const int g_parts = role == kSlabTask ? shared.slabs : whole_rows && role != kPackTask ? shared.moves : 1;
  int64_t first;
  share_of(shared.all_rows, part, x_parts * params.cluster, first, shared.rows.count);
  int64_t all_outputs = 0, all_rows_of_g = 0;
  for (int m = 0; m < shared.members; ++m) {
    all_outputs += params.layers[l + m].outputs;
    all_rows_of_g += rows_of_g(params.layers[l + m]);
  }
  shared.empty = layer.units == 0 || ((options.stages & kStageCovariance) && shared.all_rows == 0) ||
                 ((options.stages & kStageApply) && all_rows_of_g == 0);
  share_of(all_outputs, part, g_parts * params.cluster, shared.first_output, shared.outputs);
  shared.rows.offset += first * shared.rows.stride;
  shared.x = layer.x;
  shared.x_unit_stride = layer.x_unit_stride;
  shared.x_rows_are_fast =
      rows_are_fast(layer.x_row_stride[kMaxRowDims - 1], layer.x_row_size[kMaxRowDims - 1], layer.x_unit_stride);
  if (shared.packs > 0) {
    shared.packed_pitch = packed_pitch(layer);
    shared.packed = params.workspace + static_cast<int64_t>(params.packed[l]) * 16;
    if (role == kPackTask) {
      shared.packed += first * shared.packed_pitch * element_size(layer.x_dtype);
    } else {
      shared.x = shared.packed;
      shared.x_unit_stride = 1;
      shared.x_rows_are_fast = false;
      shared.rows.offset = first;
      shared.rows.stride = 1;
    }
  }

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
  Counters* counters = counters_of(params);
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
CO_DEVICE void wait_for_others(const ChunkShared& shared) {
  if (threadIdx.x == 0 && shared.awaited != 0) {
    while (load_acquire(shared.counter) < shared.awaited) __nanosleep(64);
  }
  __syncthreads();
}

// Publishes what others wait for.
CO_DEVICE void end_task(const PreconditionParams& params, const ChunkShared& shared) {
  Counters* counters = counters_of(params);
  if (counters == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (shared.published != nullptr) add_release(shared.published, 1);
  if (add_acquire_release(&counters->finished, 1) != gridDim.x - 1) return;
  for (int l = 0; l < params.count; ++l) {
    counters->packed[l] = counters->summed[l] = counters->inverted[l] = counters->corrected[l] = 0;
  }
  counters->ticket = 0;
  atomicExch(&counters->finished, 0u);
}

}  // namespace consistency_ops
