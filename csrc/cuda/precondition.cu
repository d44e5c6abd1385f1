// The correction of every layer in one launch.
//
// A chunk of units passes four steps: its share of X becomes X^T X (gram.cuh), which is factored and inverted in shared
// memory (factor.cuh) and multiplied from the right on its columns of G (apply.cuh).  The factor is bound by latency: a
// chunk of 128 has 128 dependent pivots, some 10 us with the inverse, whatever the device.  So chunks run side by side,
// and 76 KiB of shared memory and 128 registers a thread let two CTAs share an SM, 264 at once on the 132 SMs of an
// H200.  Everything else is bound by memory: the floor of a launch is the time to read X once and to read and write G.
//
// Three rungs, one kernel; they differ in how many CTAs work on a chunk and how these meet (heuristics.h
// chooses).  All times here are estimates: nothing has been measured on a GPU.
//
//   V0  One CTA a chunk reads all rows of X and corrects all rows of G.  Nothing is written but G, info and damping;
//       no scratch, no order between CTAs.  A 4096 x 4096 layer has 32 chunks: 32 of 264 places taken.
//   V1  A cluster of up to 8 CTAs a chunk.  Each sums its share of the rows; the partial covariances, 41 KiB for 128
//       units, are added in the order of the ranks through distributed shared memory (1 to 2 us, against 3 to 4 through
//       L2).  Then every CTA factors the same matrix (a broadcast would wait as long as the factor takes) and corrects
//       its share of G.  No scratch, no spin.  For launches whose chunks do not fill the device.
//   V2  Tickets (scheduler.cuh).  Shares of X, one factor a chunk, and shares of G are tasks of their own that meet in
//   the
//       workspace: the device stays full whatever the shapes, and one factor a chunk costs 504 chunks some 20 us of a
//       full device where eight would cost 150.  A CTA that waits for an inverse asks L2 for its rows of G meanwhile.
//
// What all rungs pay: the random cyclic offset of random.h counts units, so groups of one sector straddle two, and a
// CTA touches up to twice the bytes of its own columns.  Neighbouring chunks run at the same time on the same rows
// (V2), so the other half is usually an L2 hit and DRAM sees every sector once; L2 traffic is what doubles.  For
// group = 1 a gather moves 4 to 15 times the bytes through L2, so V2 permutes the rows of large matrices first, which
// makes that 3 (permute.cuh).
#include <algorithm>
#include <cmath>

#include "consistency_ops/precondition_cuda.h"
#include "cuda/precondition/apply.cuh"
#include "cuda/precondition/chunk.cuh"
#include "cuda/precondition/chunk_io.cuh"
#include "cuda/precondition/factor.cuh"
#include "cuda/precondition/gram.cuh"
#include "cuda/precondition/heuristics.h"
#include "cuda/precondition/permute.cuh"
#include "cuda/precondition/scheduler.cuh"

namespace consistency_ops {
namespace {

constexpr int kMaxTries = 3;
constexpr int64_t kMaxRows = int64_t{1} << 30;  // of X and of G: row indices have 32 bits, with room for the last stage

template <int kThreads_, int kGramBlocks_, int kCtas_>
struct PreconditionTraits {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGramBlocks = kGramBlocks_;  // of 16 x 32, a warp
  static constexpr int kCtas = kCtas_;              // resident on an SM, by registers
};
using UpTo128 = PreconditionTraits<256, 3, 2>;  // 20 blocks for 8 warps
using UpTo256 = PreconditionTraits<512, 5, 1>;  // 72 blocks for 16 warps

// The same for all layers with the same input.
CO_DEVICE void report(const PreconditionParams& params, const ChunkShared& shared, int32_t info, float damping) {
  if (threadIdx.x != 0 || shared.rank != 0) return;
  CO_NO_UNROLL
  for (int m = 0; m < shared.members; ++m) {
    const PreconditionLayer& layer = params.layers[shared.layer + m];
    if (layer.info != nullptr) layer.info[shared.chunk] = info;
    if (layer.damping_used != nullptr) layer.damping_used[shared.chunk] = damping;
  }
}

// tiles <- the covariance, not yet divided by the rows, of this task's rows or of all; or a given one.
template <typename Traits>
CO_DEVICE void load_covariance(const PreconditionParams& params, const PreconditionLayer& layer, const Chunk& chunk) {
  if (!(chunk.shared.stages & kStageCovariance)) {
    load_matrix(params.options, chunk, static_cast<const float*>(layer.covariance), Traits::kThreads);
    return;
  }
  if (chunk.shared.role == kFinishTask && chunk.shared.sums > 0) {
    const int64_t first = static_cast<int64_t>(chunk.shared.chunk) * chunk.shared.sums * chunk.shared.record;
    load_tiles(chunk, chunk.shared.sum_records + first, chunk.shared.sums, Traits::kThreads);
    return;
  }
  if (layer.x_dtype == DType::kFloat32) {
    gram<Traits::kWarps, Traits::kGramBlocks, uint32_t>(layer, chunk);
  } else {
    gram<Traits::kWarps, Traits::kGramBlocks, uint16_t>(layer, chunk);
  }
  if (chunk.shared.cluster > 1) sum_over_cluster(chunk, Traits::kThreads);
}

// tiles <- L L^T = A scaled + damping I, with up to three dampings; shared.failed_minor is info.  A failed try destroys
// the covariance, so the next one sums or loads it again: that is rare, and cheaper than a copy in shared memory.  The
// CTAs of a cluster hold the same numbers and fail alike.  Without the factor stage only the covariance is written.
template <typename Traits>
CO_DEVICE void damped_factor(const PreconditionParams& params, const PreconditionLayer& layer, const Chunk& chunk) {
  for (;;) {
    load_covariance<Traits>(params, layer, chunk);
    if (chunk.shared.role == kSumTask) {
      const int64_t at = static_cast<int64_t>(chunk.shared.chunk) * chunk.shared.sums + chunk.shared.part;
      store_tiles(chunk, chunk.shared.sum_records + at * chunk.shared.record, Traits::kThreads);
      return;
    }
    const bool summed = chunk.shared.stages & kStageCovariance;
    float scale = summed ? 1.0f / static_cast<float>(chunk.shared.all_rows) : 1.0f;
    if (summed && layer.covariance != nullptr) {
      store_matrix(params.options, chunk, static_cast<float*>(layer.covariance), scale, Traits::kThreads);
    }
    if (!(chunk.shared.stages & kStageFactor)) return;
    if (params.options.trace_scaling) {
      const float* given = summed ? nullptr : static_cast<const float*>(layer.covariance);
      const float trace = layer_trace(params.options, chunk, given, Traits::kThreads) * scale;
      if (trace > 0.0f) scale /= trace;
    }
    __syncthreads();  // the covariance has been read from the tiles, for the trace and for memory
    float damping = static_cast<float>(params.options.damping);
    for (int failed = 0; failed < chunk.shared.failed_tries; ++failed) damping *= 10.0f;
    damp(chunk, scale, damping, Traits::kThreads);
    factor<Traits::kWarps>(chunk);
    if (chunk.shared.failed_minor == 0 || chunk.shared.failed_tries == kMaxTries - 1) {
      report(params, chunk.shared, chunk.shared.failed_minor, damping);
      return;
    }
    __syncthreads();  // every thread has read failed_tries and failed_minor
    if (threadIdx.x == 0) ++chunk.shared.failed_tries;
  }
}

// tiles <- A^-1 where it is needed, from this CTA, from another one or from the caller.
template <typename Traits>
CO_DEVICE void load_inverse(const PreconditionParams& params, const PreconditionLayer& layer, const Chunk& chunk) {
  int32_t* status = reinterpret_cast<int32_t*>(chunk.shared.inverse_record + chunk.shared.record);
  if (chunk.shared.role == kSlabTask && (params.options.stages & kStageFactor)) {
    if (threadIdx.x == 0) chunk.shared.failed_minor = *status;
    load_tiles(chunk, chunk.shared.inverse_record, 1, Traits::kThreads);
  } else if (!(chunk.shared.stages & kStageFactor)) {
    if (threadIdx.x == 0) chunk.shared.failed_minor = layer.info[chunk.shared.chunk];
    load_matrix(params.options, chunk, static_cast<const float*>(layer.inverse), Traits::kThreads);
  } else {
    if (chunk.shared.failed_minor == 0) invert<Traits::kWarps>(chunk);
    if (layer.inverse != nullptr) {  // zeros where it failed
      const float scale = chunk.shared.failed_minor == 0 ? 1.0f : 0.0f;
      store_matrix(params.options, chunk, static_cast<float*>(layer.inverse), scale, Traits::kThreads);
    }
    if (chunk.shared.slabs > 0) {
      if (threadIdx.x == 0) *status = chunk.shared.failed_minor;
      store_tiles(chunk, chunk.shared.inverse_record, Traits::kThreads);
    }
  }
}

template <typename Traits>
CO_DEVICE void run_task(const PreconditionParams& params, const Chunk& chunk) {
  const PreconditionLayer& layer = params.layers[chunk.shared.layer];
  if (chunk.shared.stages == 0) {
    const DType dtype = chunk.shared.role == kPackTask ? layer.x_dtype : layer.g_dtype;
    if (dtype == DType::kFloat32) {
      permute_rows<Traits::kThreads, uint32_t>(&layer, chunk, params.shared_bytes);
    } else {
      permute_rows<Traits::kThreads, uint16_t>(&layer, chunk, params.shared_bytes);
    }
    return;
  }
  if (chunk.shared.stages & (kStageCovariance | kStageFactor)) damped_factor<Traits>(params, layer, chunk);
  if (chunk.shared.stages & (kStageFactor | kStageApply)) load_inverse<Traits>(params, layer, chunk);
  if (!(chunk.shared.stages & kStageApply) || chunk.shared.failed_minor != 0) return;
  const PreconditionLayer* members = params.layers + chunk.shared.layer;
  CO_NO_UNROLL
  for (int m = 0; m < chunk.shared.members; ++m) {
    const OutputRange outputs = outputs_of(members, m, chunk.shared);
    if (members[m].g_dtype == DType::kFloat32) {
      apply<Traits::kWarps, uint32_t>(members[m], chunk, outputs, params.apply_rows);
    } else {
      apply<Traits::kWarps, uint16_t>(members[m], chunk, outputs, params.apply_rows);
    }
  }
}

// Where the unit at a position of the chunk lies in the rows that this task reads.
CO_DEVICE int32_t unit_of(const PreconditionLayer& layer, const Chunk& chunk, int position) {
  if (position >= chunk.size()) return kNoUnit;
  const Division& division = chunk.shared.division;
  const int64_t at = chunk_begin(division.units, division.chunks, chunk.shared.chunk) + position;
  if (chunk.shared.role == kSumTask && chunk.shared.packs > 0) return static_cast<int32_t>(at);
  const int64_t unit = unit_at_position(layer, chunk, at);
  if (unit == layer.units) return kBiasUnit;
  if (chunk.shared.role != kSlabTask || chunk.shared.moves == 0) return static_cast<int32_t>(unit);
  return at < layer.units ? static_cast<int32_t>(at) : chunk.shared.bias_position;
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    precondition_kernel(CO_KERNEL_PARAM(PreconditionParams, params)) {
  CO_DYNAMIC_SHARED(float, dynamic);
  CO_SHARED(ChunkShared, shared_array, [1]);
  ChunkShared& shared = shared_array[0];
  take_task(params, shared);
  const PreconditionLayer& layer = params.layers[shared.layer];
  const Chunk chunk{shared, dynamic, dynamic + params.tile_floats};
  if (shared.role == kSlabTask && shared.moves > 0 && layer.has_bias && shared.chunk == shared.division.chunks - 1) {
    find_bias(layer, chunk, Traits::kThreads);
    __syncthreads();
  }
  if (const int thread = fresh_thread(); thread < chunk.padded()) shared.unit[thread] = unit_of(layer, chunk, thread);
  if (shared.awaited != 0 && shared.moves == 0 && (shared.stages & kStageApply)) {
    __syncthreads();  // the units
    int member = 0;   // the first that this CTA corrects
    OutputRange outputs = outputs_of(params.layers + shared.layer, member, shared);
    while (outputs.begin >= outputs.end && ++member < shared.members) {
      outputs = outputs_of(params.layers + shared.layer, member, shared);
    }
    if (member < shared.members) prefetch_g<Traits::kWarps>(params.layers[shared.layer + member], chunk, outputs);
  }
  wait_for_others(shared);

  if (!shared.empty) {
    run_task<Traits>(params, chunk);
  } else if (shared.stages & kStageFactor) {
    report(params, shared, 0, static_cast<float>(params.options.damping));
  }
  end_task(params, shared);
}

// The layer's trace is needed before any of its chunks can be factored, and all chunks are summed in this launch.
bool waits_for_trace(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int32_t both = kStageCovariance | kStageFactor;
  return options.trace_scaling && (options.stages & both) == both && num_chunks(layer, options) > 1;
}

bool valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
           const CudaTuning& tuning) {
  if (count < 0 || (count > 0 && layers == nullptr) || options.float64) return false;
  if (options.chunk < 1 || options.chunk > kMaxChunk || options.max_rows < 1 || !(options.damping >= 0)) return false;
  if (options.stages < 1 || options.stages > kStageAll) return false;
  if (options.stages == (kStageCovariance | kStageApply)) return false;
  if (tuning.ctas < 0 || tuning.ctas > (tuning.rung == PreconditionRung::kV1 ? kMaxCluster : kMaxShares)) return false;
  if (tuning.counters < -1 || tuning.counters >= kCudaCounterSlots) return false;
  int run = 0;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    if (layer.units < 0 || layer.units >= INT32_MAX || layer.outputs < 0) return false;
    if (rows_of_g(layer) > kMaxRows) return false;
    if (layer.g_dtype == DType::kFloat64 || layer.bias_dtype == DType::kFloat64) return false;
    if (options.stages & kStageApply && layer.outputs > 0 && layer.has_bias && layer.bias_grad == nullptr) return false;
    run = layer.same_input ? run + 1 : 1;
    if (layer.same_input) {
      if (l == 0 || run > kMaxLaunchLayers) return false;
      if (layer.units != layers[l - 1].units || layer.has_bias != layers[l - 1].has_bias) return false;
      continue;
    }
    if (layer.group < 1 || layer.group > options.chunk) return false;
    if (rows_of_x(layer) > kMaxRows || layer.x_dtype == DType::kFloat64) return false;
    if (options.stages == kStageCovariance && layer.covariance == nullptr) return false;
    if (options.stages == kStageFactor && (layer.covariance == nullptr || layer.inverse == nullptr)) return false;
    if (options.stages == kStageApply && (layer.inverse == nullptr || layer.info == nullptr)) return false;
    if (options.stages == (kStageFactor | kStageApply) && layer.covariance == nullptr) return false;
  }
  return true;
}

// How the tasks of one launch are cut, and where they meet.
struct Launch {
  LaunchShape shape;
  LayerShares shares[kMaxLaunchLayers];
  uint32_t records[kMaxLaunchLayers], packed[kMaxLaunchLayers];  // as in PreconditionParams
  int64_t slab_bytes;                                            // of shared memory
  int64_t bytes;                                                 // of the workspace
};

RowMatrix matrix_of_x(const PreconditionLayer& layer, const PreconditionOptions& options) {
  const int64_t rows = options.stages & kStageCovariance ? std::min(rows_of_x(layer), options.max_rows) : 0;
  const int64_t bytes = element_size(layer.x_dtype), run = layer.permutation != nullptr ? 1 : layer.group;
  return {rows, layer.units, num_chunks(layer, options), run * bytes, bytes, layer.x_unit_stride == 1};
}

// Of the G of `members` layers with the same input.
RowMatrix matrix_of_g(const PreconditionLayer* layers, int members, const PreconditionOptions& options) {
  const int64_t bytes = element_size(layers->g_dtype), run = layers->permutation != nullptr ? 1 : layers->group;
  RowMatrix matrix{0, layers->units, num_chunks(*layers, options), run * bytes, bytes, true};
  for (int m = 0; (options.stages & kStageApply) && m < members; ++m) {
    const PreconditionLayer& layer = layers[m];
    const bool one_tap = rows_of_g(layer) == layer.outputs;
    matrix.rows += rows_of_g(layer);
    matrix.unit_rows = matrix.unit_rows && layer.g_unit_stride == 1 && one_tap && layer.g_dtype == layers->g_dtype;
  }
  return matrix;
}

// Of the first of `layers` and those that have its input; nothing for one of those.
LayerWork work_of(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                  const CudaTuning& tuning) {
  if (layers->same_input) return {};
  const RowMatrix x = matrix_of_x(*layers, options), g = matrix_of_g(layers, run_length(layers, count), options);
  return {x.chunks, x.rows, g.rows, waits_for_trace(*layers, options), permutes(x, tuning), permutes(g, tuning)};
}

// False if the workspace would be larger than 64 GiB.
bool cut(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options, const CudaTuning& tuning,
         bool clusters, Launch& launch) {
  int64_t chunks = 0, longest = 0, permuted = 0;
  for (int64_t l = 0; l < count; ++l) {
    const LayerWork work = work_of(layers + l, count - l, options, tuning);
    chunks += work.chunks;
    if (work.chunks > 0) longest = std::max({longest, work.x_rows, work.g_rows});
    if (work.packs_x) permuted += work.x_rows * layers[l].units * element_size(layers[l].x_dtype);
    if (work.permutes_g) permuted += work.g_rows * layers[l].units * element_size(layers[l].g_dtype);
  }
  launch.shape = choose_rung(chunks, longest, permuted, clusters, tuning);
  launch.bytes = launch.slab_bytes = 0;
  int64_t packed_layers = 0, packed_bytes = 0;
  bool meet = false;
  for (int64_t l = 0; l < count; ++l) {
    const PreconditionLayer& layer = layers[l];
    const LayerWork work = work_of(layers + l, count - l, options, tuning);
    const LayerShares shares = launch.shares[l] = share_layer(work, launch.shape, tuning);
    launch.records[l] = launch.packed[l] = 0;
    const auto want_slab = [&](int64_t element_bytes) {
      const int64_t row = slab_bytes(layer.units, element_bytes, 1), rows = slab_bytes(layer.units, element_bytes, 0);
      launch.slab_bytes = std::max(launch.slab_bytes, std::max(row, rows + kWantedSlabBytes));
    };
    if (shares.moves > 0) want_slab(element_size(layer.g_dtype));
    if (shares.packs > 0) {
      want_slab(element_size(layer.x_dtype));
      packed_bytes = std::max(packed_bytes, work.x_rows * packed_pitch(layer) * element_size(layer.x_dtype));
      ++packed_layers;
    }
    if (work.chunks == 0 || (shares.sums == 0 && shares.slabs == 0)) continue;
    meet = true;
    const int64_t at = kCudaCounterBytes + launch.bytes, record = record_floats(all_units(layer), work.chunks);
    if (at / 16 > UINT32_MAX) return false;
    launch.records[l] = static_cast<uint32_t>(at / 16);
    const int64_t floats = shares.sums * record + (shares.slabs > 0 ? record + kStatusFloats : 0);
    launch.bytes += work.chunks * floats * static_cast<int64_t>(sizeof(float));
  }
  if (meet) launch.bytes += kCudaCounterBytes;
  for (int64_t l = 0, turn = 0; l < count; ++l) {
    if (launch.shares[l].packs == 0) continue;
    const int64_t at = launch.bytes + turn++ % 2 * packed_bytes;
    if (at / 16 > UINT32_MAX) return false;
    launch.packed[l] = static_cast<uint32_t>(at / 16);
  }
  launch.bytes += std::min<int64_t>(packed_layers, 2) * packed_bytes;
  launch.slab_bytes = std::min<int64_t>(launch.slab_bytes, kMaxSlabBytes);
  return true;
}

// Large layers first, because the last CTAs to start decide when the launch ends; layers that wait go last.  Layers
// with the same input stay together.
void put_in_order(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                  const CudaTuning& tuning, PreconditionLayer* ordered) {
  int64_t firsts[kMaxLaunchLayers], runs = 0;
  LayerWork works[kMaxLaunchLayers];
  for (int64_t l = 0; l < count; l += run_length(layers + l, count - l)) {
    firsts[runs++] = l;
    works[l] = work_of(layers + l, count - l, options, tuning);
  }
  std::stable_sort(firsts, firsts + runs, [&](int64_t a, int64_t b) {
    if (works[a].waits_for_trace != works[b].waits_for_trace) return works[b].waits_for_trace;
    return works[a].x_rows + works[a].g_rows > works[b].x_rows + works[b].g_rows;
  });
  for (int64_t r = 0; r < runs; ++r) {
    ordered = std::copy_n(layers + firsts[r], run_length(layers + firsts[r], count - firsts[r]), ordered);
  }
}

// Layers of the next launch: as many as it can describe, without parting those with the same input.
int64_t next_launch(const PreconditionLayer* layers, int64_t count) {
  int64_t length = 0;
  while (length < count) {
    const int run = run_length(layers + length, count - length);
    if (length + run > kMaxLaunchLayers) break;
    length += run;
  }
  return length;
}

Status launch_layers(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                     const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
  static thread_local PreconditionParams params;  // 32 KB: not on the caller's stack
  static thread_local Launch cuts;
  put_in_order(layers, count, options, tuning, params.layers);
  if (!cut(params.layers, count, options, tuning, device.compute_capability >= 90, cuts)) {
    return Status::kInvalidArgument;
  }
  params.options = options;
  params.workspace = cuts.bytes > 0 ? static_cast<char*>(workspace) : nullptr;
  params.counters = tuning.counters;
  params.count = static_cast<int32_t>(count);
  params.cluster = cuts.shape.cluster;
  params.tf32 = tuning.tf32;
  std::copy(cuts.shares, cuts.shares + count, params.shares);
  std::copy(cuts.records, cuts.records + count, params.records);
  std::copy(cuts.packed, cuts.packed + count, params.packed);
  int64_t tasks = 0, units = 1;
  for (int64_t round = 0; round < count + kRounds - 1; ++round) {
    params.first_task[round] = static_cast<int32_t>(tasks);
    for (int role = 0; role < kRoles; ++role) {
      const int64_t l = round - layers_behind(role);
      if (l < 0 || l >= count) continue;
      const int64_t chunks = own_chunks(params.layers[l], options);
      if (chunks > 0) units = std::max(units, (all_units(params.layers[l]) + chunks - 1) / chunks);
      tasks += count_tasks(params.shares[l], chunks, options.stages, role);
      if (tasks * params.cluster > INT32_MAX) return Status::kInvalidArgument;
    }
  }
  params.first_task[count + kRounds - 1] = static_cast<int32_t>(tasks);
  if (tasks == 0) return Status::kOk;
  const PreconditionPlan plan =
      plan_precondition(static_cast<int>(units), device.shared_bytes, static_cast<int>(cuts.slab_bytes));
  if (plan.threads == 0) return Status::kInvalidArgument;
  params.tile_floats = plan.tile_floats;
  params.arena_floats = plan.arena_floats;
  params.apply_rows = plan.apply_rows;
  params.shared_bytes = plan.shared_bytes;
  auto* kernel = plan.threads == UpTo128::kThreads ? precondition_kernel<UpTo128> : precondition_kernel<UpTo256>;
  return launch(kernel, dim3(static_cast<unsigned>(tasks * params.cluster)), dim3(static_cast<unsigned>(plan.threads)),
                static_cast<size_t>(plan.shared_bytes), stream, params, params.cluster);
}

}  // namespace

int64_t precondition_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                    const CudaTuning& tuning) {
  static thread_local Launch cuts;
  int64_t largest = 0;
  for (int64_t first = 0, length; first < count; first += length) {
    length = next_launch(layers + first, count - first);
    if (length == 0) return 0;  // refused by precondition_cuda
    for (const bool clusters : {false, true}) {
      cut(layers + first, length, options, tuning, clusters, cuts);
      largest = std::max(largest, cuts.bytes);
    }
  }
  return largest;
}

Status precondition_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                         const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
  if (!valid(layers, count, options, tuning)) return Status::kInvalidArgument;
  if (workspace == nullptr && precondition_workspace_cuda(layers, count, options, tuning) > 0) {
    return Status::kInvalidArgument;
  }
  for (int64_t first = 0, length; first < count; first += length) {
    length = next_launch(layers + first, count - first);
    const Status status = launch_layers(layers + first, length, options, device, workspace, stream, tuning);
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace consistency_ops
