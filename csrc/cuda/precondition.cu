// The correction of every layer in one launch.
//
// A chunk of units passes four steps: its share of X becomes X^T X (gram.cuh), which is factored and inverted on the SM
// (sweep.cuh; factor.cuh above 128 units) and multiplied from the right on its columns of G (apply.cuh).  The factor is
// bound by latency: a chunk of 128 has 128 dependent pivots, whatever the device.  So chunks run side by side, and 76
// KiB of shared memory and 128 registers a thread let two CTAs share an SM, 264 at once on the 132 SMs of an H200.  The
// rest is bound by the instructions that an SM can issue and by memory, whose floor is the time to read X once and to
// read and write G. benchmarks/model counts both from the compiled code (docs/developer/kernel-model.md).
//
// Three rungs, one kernel.  They differ in how many CTAs work on a chunk and how these exchange what they have
// (heuristics.h chooses).  All times here are estimates: nothing has been measured on a GPU.
//
//   one CTA     It reads all rows of X and corrects all rows of G.  Nothing is written but G, info and damping; no
//               scratch, no order between CTAs.  A 4096 x 4096 layer has 32 chunks: 32 of 264 places taken.
//   cluster     Up to 8 CTAs a chunk.  Each sums its part of the rows; the partial covariances, 41 KiB for 128 units,
//               are added in the order of the ranks through distributed shared memory (1 to 2 us, against 3 to 4
//               through L2).  Then every CTA factors the same matrix (a broadcast would wait as long as the factor
//               takes) and corrects its part of G.  No scratch, no spin.  For launches whose chunks do not fill the
//               device.
//   task queue  Tickets (scheduler.cuh).  Parts of X, one factor a chunk, and parts of G are tasks of their own that
//               meet in the workspace: the device stays full whatever the shapes, and one factor a chunk costs 504
//               chunks some 20 us of a full device where eight would cost 150.  A CTA that waits for an inverse asks
//               L2 for its rows of G meanwhile.
//
// What all rungs pay: the random cyclic offset of random.h is a multiple of half a group, so in every second step
// groups of one sector straddle two, and a CTA touches twice the bytes of its own columns.  Neighbouring chunks run at
// the same time on the same rows (task queue), so the other half is usually an L2 hit and DRAM sees every sector once;
// L2 traffic is what doubles. For group = 1 a gather moves 4 to 15 times the bytes through L2, so the task queue
// permutes the rows of large matrices first, which makes that 3 (permute.cuh).
#include <algorithm>
#include <cmath>

#include "consistency_ops/damping.h"
#include "consistency_ops/precondition_cuda.h"
#include "consistency_ops/whitening_cuda.h"
#include "cuda/precondition/apply.cuh"
#include "cuda/precondition/chunk.cuh"
#include "cuda/precondition/chunk_io.cuh"
#include "cuda/precondition/factor.cuh"
#include "cuda/precondition/gram.cuh"
#include "cuda/precondition/permute.cuh"
#include "cuda/precondition/plan.h"
#include "cuda/precondition/scheduler.cuh"
#include "cuda/precondition/sweep.cuh"
#include "cuda/precondition/whitening.cuh"

namespace consistency_ops {
namespace {

// kWhitens: the code of whitening too, which has a kernel of its own, so that a correction does not pay for it.
template <int kThreads_, bool kWhitens_, int kGramBlocks_, int kCtas_>
struct PreconditionTraits {
  static constexpr int kThreads = kThreads_;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kGramBlocks = kGramBlocks_;  // of 16 x 32, a warp
  static constexpr int kCtas = kCtas_;              // resident on an SM, by registers
  static constexpr bool kWhitens = kWhitens_;
  static constexpr bool kSweeps = kWarps == 8 && !kWhitens;  // the inverse comes with the factor (sweep.cuh)
};
template <bool kWhitens>
using UpTo128 = PreconditionTraits<256, kWhitens, 3, 2>;  // 20 blocks for 8 warps
template <bool kWhitens>
using UpTo256 = PreconditionTraits<512, kWhitens, 5, 1>;  // 72 blocks for 16 warps

// Writes info and damping_used of this chunk for every layer of the run, which share one factorisation.  Thread 0 of
// CTA 0 of the cluster does it.
CO_DEVICE void record_outcome(const PreconditionParams& params, const Task& task, int32_t info, float damping) {
  if (threadIdx.x != 0 || task.rank != 0) return;
  CO_NO_UNROLL
  for (int m = 0; m < task.members; ++m) {
    const PreconditionLayer& layer = params.layers[task.layer + m];
    if (layer.info != nullptr) layer.info[task.chunk] = info;
    if (layer.damping_used != nullptr) layer.damping_used[task.chunk] = damping;
  }
}

// The first layer of the task's run.  Read anew where it is needed: a register that lives through the factorisation
// would be spilled.
CO_DEVICE const PreconditionLayer& layer_of(const PreconditionParams& params, const Chunk& chunk) {
  return params.layers[chunk.task.layer];
}

// tiles <- the covariance, not yet divided by the number of rows, of this task's rows or of all; or a given one.
template <typename Traits>
CO_DEVICE void load_covariance(const PreconditionParams& params, const Chunk& chunk) {
  const PreconditionLayer& layer = layer_of(params, chunk);
  if (!(chunk.task.stages & kStageCovariance)) {
    load_matrix(params.options, chunk, static_cast<const float*>(layer.covariance), Traits::kThreads);
    return;
  }
  if (chunk.task.role == kFactorTask && chunk.task.of_layer.gram_tasks > 0) {
    const int64_t first =
        static_cast<int64_t>(chunk.task.chunk) * chunk.task.of_layer.gram_tasks * chunk.records.floats;
    load_tiles(chunk, chunk.records.gram + first, chunk.task.of_layer.gram_tasks, Traits::kThreads);
    return;
  }
  if (layer.x_dtype == DType::kFloat32) {
    gram<Traits::kWarps, Traits::kGramBlocks, uint32_t>(layer, chunk);
  } else {
    gram<Traits::kWarps, Traits::kGramBlocks, uint16_t>(layer, chunk);
  }
  if (chunk.task.cluster > 1) sum_over_cluster(chunk, Traits::kThreads);
}

// What makes the tiles A / tau: their covariance is written where it is wanted, and may be read until the next barrier.
template <typename Traits>
CO_DEVICE float covariance_scale(const PreconditionParams& params, const Chunk& chunk) {
  const PreconditionLayer& layer = layer_of(params, chunk);
  const bool summed = chunk.task.stages & kStageCovariance;
  float scale = summed ? 1.0f / static_cast<float>(chunk.input.all_rows) : 1.0f;
  if (summed && layer.covariance != nullptr) {
    store_matrix(params.options, chunk, static_cast<float*>(layer.covariance), scale, Traits::kThreads);
  }
  if (params.options.trace_scaling && (chunk.task.stages & kStageFactor)) {
    const float* given = summed ? nullptr : static_cast<const float*>(layer.covariance);
    scale /= layer_trace_scale(params.options, chunk, given, scale, Traits::kThreads);
  }
  return scale;
}

// The same where a layer is whitened; -1 if no rows were ever seen.
template <typename Traits>
CO_DEVICE float whitening_scale(const PreconditionParams& params, const Chunk& chunk) {
  if (layer_of(params, chunk).covariance != nullptr) return load_average(params, chunk, Traits::kThreads);
  return chunk.input.all_rows > 0 ? covariance_scale<Traits>(params, chunk) : -1.0f;
}

// tiles <- the factor L of A scaled + damping I = L L^T, or the inverse at once (kSweeps), with up to three dampings;
// failed_minor is info.  A failed try destroys the covariance, so the next one sums or loads it again: that is rare,
// and cheaper than a copy in shared memory.  The CTAs of a cluster hold the same numbers and fail alike.  Without the
// factor stage only the covariance is written.
template <typename Traits>
CO_DEVICE void damped_factor(const PreconditionParams& params, const Chunk& chunk) {
  for (;;) {
    load_covariance<Traits>(params, chunk);
    if (chunk.task.role == kGramTask) {
      const int64_t at = static_cast<int64_t>(chunk.task.chunk) * chunk.task.of_layer.gram_tasks + chunk.task.part;
      store_tiles(chunk, chunk.records.gram + at * chunk.records.floats, Traits::kThreads);
      if constexpr (Traits::kWhitens) report<Traits::kThreads>(params, chunk);
      return;
    }
    float scale = 0.0f;
    if (Traits::kWhitens && chunk.task.mode == Mode::kWhitens) {
      scale = whitening_scale<Traits>(params, chunk);
      if (scale < 0.0f) {  // given up, as a matrix of NaN
        if (threadIdx.x == 0) chunk.scratch.failed_minor = 1;
        record_outcome(params, chunk.task, 1, damping_of_try<float>(params.options.damping, kMaxTries - 1));
        __syncthreads();
        return;
      }
    } else {
      scale = covariance_scale<Traits>(params, chunk);
    }
    if (!(chunk.task.stages & kStageFactor)) return;
    __syncthreads();  // the covariance has been read from the tiles, for the trace and for memory
    const float damping = damping_of_try<float>(params.options.damping, chunk.scratch.failed_tries);
    damp<Traits::kWarps>(chunk, scale, damping);
    if constexpr (Traits::kSweeps) {
      factor_and_invert(chunk, chunk.arena());
    } else {
      factor<Traits::kWarps>(chunk);
    }
    if (chunk.scratch.failed_minor == 0 || chunk.scratch.failed_tries == kMaxTries - 1) {
      record_outcome(params, chunk.task, chunk.scratch.failed_minor, damping);
      return;
    }
    __syncthreads();  // every thread has read failed_tries and failed_minor
    if (threadIdx.x == 0) ++chunk.scratch.failed_tries;
  }
}

// tiles <- A^-1 where it is needed, from this CTA, from another one or from the caller.
template <typename Traits>
CO_DEVICE void load_inverse(const PreconditionParams& params, const Chunk& chunk) {
  const auto status = [&] { return reinterpret_cast<int32_t*>(chunk.records.inverse + chunk.records.floats); };
  if (chunk.task.role == kApplyTask && (params.options.stages & kStageFactor)) {
    if (threadIdx.x == 0) chunk.scratch.failed_minor = *status();
    load_tiles(chunk, chunk.records.inverse, 1, Traits::kThreads);
  } else if (!(chunk.task.stages & kStageFactor)) {
    const PreconditionLayer& layer = layer_of(params, chunk);
    if (threadIdx.x == 0) chunk.scratch.failed_minor = layer.info[chunk.task.chunk];
    load_matrix(params.options, chunk, static_cast<const float*>(layer.inverse), Traits::kThreads);
  } else {
    if constexpr (!Traits::kSweeps) {
      if (chunk.scratch.failed_minor == 0) invert<Traits::kWarps, Traits::kWhitens>(chunk);
    }
    const PreconditionLayer& layer = layer_of(params, chunk);
    if (layer.inverse != nullptr) {  // zeros where it failed
      const float scale = chunk.scratch.failed_minor == 0 ? 1.0f : 0.0f;
      store_matrix(params.options, chunk, static_cast<float*>(layer.inverse), scale, Traits::kThreads,
                   Traits::kWhitens);
    }
    if (chunk.task.of_layer.apply_tasks > 0) {
      if (threadIdx.x == 0) *status() = chunk.scratch.failed_minor;
      store_tiles(chunk, chunk.records.inverse, Traits::kThreads);
    }
  }
}

// The G that this CTA corrects, or what an optimizer has made of it.
template <typename Traits>
CO_DEVICE void apply_to_members(const PreconditionParams& params, const Chunk& chunk) {
  CO_NO_UNROLL
  for (int m = 0; m < chunk.task.members; m = chunk.scratch.part.member + 1) {
    __syncthreads();  // the planes are complete, or the last member has been corrected
    if (threadIdx.x == 0) {
      begin_member<Traits::kWhitens>(&layer_of(params, chunk), chunk, m, params.whitening.of_layer[chunk.task.layer]);
    }
    __syncthreads();
    const PreconditionLayer& member = (&layer_of(params, chunk))[m];
    if (member.g_dtype == DType::kFloat32) {
      apply<Traits::kWarps, DType::kFloat32, Traits::kWhitens>(member, chunk);
    } else if (member.g_dtype == DType::kBFloat16) {
      apply<Traits::kWarps, DType::kBFloat16, Traits::kWhitens>(member, chunk);
    } else {
      apply<Traits::kWarps, DType::kFloat16, Traits::kWhitens>(member, chunk);
    }
  }
}

// W <- before + (W - before) L^-1 of this task's outputs, or what restore tasks will make that of.
template <typename Traits>
CO_DEVICE void map_back(const PreconditionParams& params, const Chunk& chunk) {
  if (!has_moved(params, chunk.task)) return;
  if (Traits::kWarps == 8 && chunk.scratch.failed_minor == 0) make_planes(chunk);
  if (const int thread = fresh_thread(); thread < 32) chunk.scratch.warp_sum[thread] = 0.0f;
  apply_to_members<Traits>(params, chunk);
  __syncthreads();  // the squares are complete
  if (threadIdx.x != 0) return;
  SquareSums sums{};
  CO_NO_UNROLL
  for (int warp = 0; warp < Traits::kWarps; ++warp) {
    sums.before += chunk.scratch.warp_sum[2 * warp];
    sums.after += chunk.scratch.warp_sum[2 * warp + 1];
  }
  const int at = chunk.task.chunk * chunk.task.of_layer.apply_tasks + chunk.task.part;
  static_cast<SquareSums*>(chunk.records.status)[at] = sums;
}

template <typename Traits>
CO_DEVICE void run_task(const PreconditionParams& params, const Chunk& chunk) {
  if (Traits::kWhitens && chunk.task.stages == 0 && chunk.task.mode == Mode::kUnwhitens) {
    finish_displacement<Traits::kThreads>(params, chunk);
    return;
  }
  if (chunk.task.stages == 0) {
    const PreconditionLayer& layer = layer_of(params, chunk);
    const DType dtype = chunk.task.role == kPackTask ? layer.x_dtype : layer.g_dtype;
    if (dtype == DType::kFloat32) {
      permute_rows<Traits::kThreads, uint32_t>(&layer, chunk, params.shared_bytes);
    } else {
      permute_rows<Traits::kThreads, uint16_t>(&layer, chunk, params.shared_bytes);
    }
    return;
  }
  if (chunk.task.stages & (kStageCovariance | kStageFactor)) damped_factor<Traits>(params, chunk);
  if (chunk.task.stages & (kStageFactor | kStageApply)) load_inverse<Traits>(params, chunk);
  if (!(chunk.task.stages & kStageApply)) return;
  if (Traits::kWhitens && chunk.task.mode == Mode::kWhitensBy) {
    const PreconditionLayer& layer = layer_of(params, chunk);
    const uint32_t flags =
        look_at_gradient<Traits::kThreads, true>(layer, chunk, chunk.task.first_output, chunk.task.outputs);
    record_gradient(params, chunk.task, flags);
  }
  if (Traits::kWhitens && chunk.task.mode == Mode::kUnwhitens) {
    map_back<Traits>(params, chunk);
    return;
  }
  if (chunk.scratch.failed_minor != 0) return;
  if constexpr (Traits::kWarps == 8) make_planes(chunk);
  apply_to_members<Traits>(params, chunk);
}

// Where the unit at a position of the chunk lies in the rows that this task reads.
CO_DEVICE int32_t unit_of(const PreconditionLayer& layer, const Chunk& chunk, int position) {
  if (position >= chunk.size()) return kNoUnit;
  const Division& division = chunk.task.division;
  const int64_t at = chunk_begin(division.units, division.chunks, chunk.task.chunk) + position;
  if (chunk.task.role == kGramTask && chunk.task.of_layer.pack_tasks > 0) return static_cast<int32_t>(at);
  const int64_t unit = unit_at_position(layer, chunk, at);
  if (unit == layer.units) return kBiasUnit;
  if (chunk.task.role != kApplyTask || chunk.task.of_layer.permute_tasks == 0) return static_cast<int32_t>(unit);
  return at < layer.units ? static_cast<int32_t>(at) : chunk.scratch.bias_position;
}

// Whole warps, a position a thread: its unit, and the run of four positions that it is in.
CO_DEVICE void enter_unit(const PreconditionLayer& layer, const Chunk& chunk, int position) {
  const int lane = position % 32, within = lane % 4;
  const int32_t unit = unit_of(layer, chunk, position);
  const int32_t first = __shfl_sync(0xffffffffu, unit, lane - within);
  const uint32_t follow = __ballot_sync(0xffffffffu, first >= 0 && first % 4 == 0 && unit == first + within);
  const uint32_t none = __ballot_sync(0xffffffffu, unit == kNoUnit);
  chunk.scratch.unit[position] = unit;
  if (unit == kBiasUnit) chunk.scratch.has_bias = 1;
  if (within != 0) return;
  const bool is_run = (follow >> lane & 15u) == 15u, is_empty = (none >> lane & 15u) == 15u;
  chunk.scratch.run[position / 4] = is_run ? unit : is_empty ? kNoUnit : kSingles;
  if (!is_run && !is_empty) atomicOr(&chunk.scratch.ragged, 1);  // by several threads
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtas)
    precondition_kernel(CO_KERNEL_PARAM(PreconditionParams, params)) {
  CO_DYNAMIC_SHARED(float, dynamic);
  CO_SHARED(ChunkShared, shared, [1]);
  take_task(params, shared[0]);
  const Chunk chunk(shared[0], dynamic);
  const Task& task = chunk.task;
  const PreconditionLayer* members = params.layers + task.layer;
  const bool is_permuted = task.role == kApplyTask && task.of_layer.permute_tasks > 0;
  if (is_permuted && members->has_bias && task.chunk == task.division.chunks - 1) {
    find_bias(*members, chunk, Traits::kThreads);
    __syncthreads();
  }
  if (const int thread = fresh_thread(); thread < chunk.padded()) enter_unit(*members, chunk, thread);
  if (task.awaited != 0 && task.of_layer.permute_tasks == 0 && (task.stages & kStageApply)) {
    if (threadIdx.x == 0) chunk.scratch.waits = load_acquire(task.awaited_counter) < task.awaited ? 1 : 0;
    __syncthreads();  // the units
    int member = 0;   // the first that this CTA corrects
    OutputRange outputs = outputs_of(members, member, task);
    while (outputs.begin >= outputs.end && ++member < task.members) outputs = outputs_of(members, member, task);
    if (member < task.members && chunk.scratch.waits != 0) prefetch_g<Traits::kWarps>(members[member], chunk, outputs);
  }
  wait_for_others(task);

  if (!task.empty) {
    run_task<Traits>(params, chunk);
  } else if (task.stages & kStageFactor) {
    record_outcome(params, task, 0, static_cast<float>(params.options.damping));
  }
  const bool last = end_task(params, task);
  if (Traits::kWhitens && params.whitening.mode == Mode::kWhitens) {
    if (threadIdx.x == 0) shared[0].scratch.waits = last ? 1 : 0;
    __syncthreads();
    if (shared[0].scratch.waits != 0) update_weights(params, Traits::kThreads);
  }
}

template <bool kWhitens>
Status launch_layers(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                     const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning,
                     const WhiteningCall& call) {
  static thread_local PreconditionLaunch plan;  // 32 KB: not on the caller's stack
  if (workspace == nullptr && workspace_bytes(layers, count, options, tuning, call) > 0) {
    return Status::kInvalidArgument;
  }
  for (int64_t first = 0, length; first < count; first += length) {
    length = next_launch(layers + first, count - first);
    WhiteningCall here = call;
    if (call.whitened != nullptr) here.whitened += first;
    Status status = plan_launch(layers + first, length, options, device, workspace, tuning, plan, here);
    const auto kernel = [] {
      return plan.threads == UpTo128<kWhitens>::kThreads ? precondition_kernel<UpTo128<kWhitens>>
                                                         : precondition_kernel<UpTo256<kWhitens>>;
    };
    const auto block = [] { return dim3(static_cast<unsigned>(plan.threads)); };
    const auto shared_bytes = [] { return static_cast<size_t>(plan.params.shared_bytes); };
    if (status == Status::kOk && plan.ctas > 0 && plan.params.cluster > 1 &&
        !clusters_fit(kernel(), block(), shared_bytes(), plan.params.cluster)) {
      CudaDevice without_clusters = device;
      without_clusters.compute_capability = std::min(device.compute_capability, 89);
      status = plan_launch(layers + first, length, options, without_clusters, workspace, tuning, plan, here);
    }
    if (status == Status::kOk && plan.ctas > 0) {
      status = launch(kernel(), dim3(static_cast<unsigned>(plan.ctas)), block(), shared_bytes(), stream, plan.params,
                      plan.params.cluster);
    }
    if (status != Status::kOk) return status;
  }
  return Status::kOk;
}

}  // namespace

Status precondition_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                         const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
  if (!is_valid(layers, count, options, tuning)) return Status::kInvalidArgument;
  if (!options.triangular) {
    return launch_layers<false>(layers, count, options, device, workspace, stream, tuning, {});
  }
  WhiteningCall call;
  call.mode = options.stages == kStageFactor ? Mode::kFactors : Mode::kMultiplies;
  return launch_layers<true>(layers, count, options, device, workspace, stream, as_queue(tuning), call);
}

Status whiten_cuda(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                   const PreconditionOptions& options, const WhiteningOptions& whitening, const CudaDevice& device,
                   void* workspace, void* stream, const CudaTuning& tuning) {
  const WhiteningCall call = call_of(whitened, count, options, whitening, nullptr);
  if (!is_valid(layers, count, options, as_queue(tuning), call)) return Status::kInvalidArgument;
  return launch_layers<true>(layers, count, options, device, workspace, stream, as_queue(tuning), call);
}

Status unwhiten_cuda(const PreconditionLayer* layers, const WhitenedLayer* whitened, int64_t count,
                     const PreconditionOptions& options, const WhiteningOptions& whitening, float* squares,
                     const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
  const WhiteningCall call = call_of(whitened, count, options, whitening, squares);
  if (squares == nullptr || !is_valid(layers, count, options, as_queue(tuning), call)) return Status::kInvalidArgument;
  return launch_layers<true>(layers, count, options, device, workspace, stream, as_queue(tuning), call);
}

}  // namespace consistency_ops
