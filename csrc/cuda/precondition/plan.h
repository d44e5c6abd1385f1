// A launch of the correction, described without CUDA: the tasks of every layer, where they meet in the workspace, and
// the parameter of the kernel.
//
// A layer has up to six kinds of tasks.  The factor task of every chunk is always there: covariance -> inverse -> G.
// The others take work from it (LayerTasks says how many there are): gram tasks turn a part of the rows of X into a
// partial covariance in the workspace, and apply tasks correct a part of the outputs with the inverse that the factor
// task left there.  For the exact division (permute.cuh) pack tasks copy the rows of X for the gram tasks, permute
// tasks permute G for the apply tasks, and restore tasks undo that; each of these takes a part of the rows, for all
// chunks.
//
// Layers with the same input form one run.  Its first layer has all the tasks; those that work on G take the G of the
// whole run as one matrix, so a part may begin in one layer and end in another.
//
// Tasks are numbered in rounds: round r packs X of layer r, has the gram tasks of layer r - 1, factors layer r - 2 and
// permutes its G, applies to layer r - 3, and restores G of layer r - 4.  So the factors of one layer, which are bound
// by latency, run beside the reads of the next.  Within a round the part counts slowest: CTAs that run side by side
// read the same rows for different chunks, whose units share sectors.  Packed X has two buffers in the workspace: a
// layer waits until the gram tasks of the last but one have read theirs.
#pragma once

#include "cuda/precondition/heuristics.h"

namespace consistency_ops {

enum TaskRole : int32_t {
  kPackTask = 0,
  kGramTask = 1,
  kFactorTask = 2,
  kPermuteTask = 3,
  kApplyTask = 4,
  kRestoreTask = 5,
};
constexpr int kRoles = 6, kRounds = 5;

CO_HOST_DEVICE constexpr int layers_behind(int role) { return role < kPermuteTask ? role : role - 1; }

// The kernel's parameter.
struct PreconditionParams {
  PreconditionLayer layers[kMaxLaunchLayers];
  int32_t first_task[kMaxLaunchLayers + kRounds];  // of every round
  LayerTasks tasks[kMaxLaunchLayers];
  uint32_t records[kMaxLaunchLayers];  // where a layer's part of the workspace begins, in units of 16 bytes
  uint32_t packed[kMaxLaunchLayers];   // and its packed X
  PreconditionOptions options;
  char* workspace;   // null where no task waits for another
  int32_t counters;  // CudaTuning
  int32_t count, cluster;
  int32_t tile_floats, arena_floats, shared_bytes;  // CtaShape
  bool tf32;                                        // CudaTuning
  bool warpgroups;                                  // the device has sm_90a's products of four warps (ptx.cuh)
};
static_assert(sizeof(PreconditionParams) <= 32764, "kernel parameters are limited to 32,764 bytes");

struct PreconditionLaunch {
  PreconditionParams params;
  int64_t ctas;     // 0: there is nothing to do
  int32_t threads;  // of a CTA
};

// Whether the arguments of precondition_cuda keep its bounds.
bool is_valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
              const CudaTuning& tuning);

// How many of `layers` the next launch takes: as many as it can describe, without parting those with the same input.
int64_t next_launch(const PreconditionLayer* layers, int64_t count);

// Fills `launch` for at most kMaxLaunchLayers layers.  kInvalidArgument: the chunks do not fit the device, or the
// workspace or the number of tasks is out of range.
Status plan_launch(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                   const CudaDevice& device, void* workspace, const CudaTuning& tuning, PreconditionLaunch& launch);

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

// Chunks that this layer has tasks for: none if the layer before it has the same input.
CO_HOST_DEVICE inline int64_t own_chunks(const PreconditionLayer& layer, const PreconditionOptions& options) {
  return layer.same_input ? 0 : count_chunks(layer, options);
}

// The number of layers, from the first of `layers` on, that have its input.
CO_HOST_DEVICE inline int run_length(const PreconditionLayer* layers, int64_t count) {
  int length = 1;
  while (length < count && layers[length].same_input) ++length;
  return length;
}

// Floats of the tiles of a layer's largest chunk: a partial covariance or an inverse in the workspace.
CO_HOST_DEVICE inline int32_t record_floats(int64_t units, int64_t chunks) {
  return lower_tiles(padded_units(static_cast<int>((units + chunks - 1) / chunks)) / kTile) * kTileFloats;
}

// Behind an inverse in the workspace: failed_minor, and what keeps the next record on 16 bytes.
constexpr int kStatusFloats = 4;

// Elements of a packed row of X, which begins on 16 bytes.
CO_HOST_DEVICE inline int64_t packed_pitch(const PreconditionLayer& layer) {
  const int64_t vector = 16 / element_size(layer.x_dtype);
  return (all_units(layer) + vector - 1) / vector * vector;
}

CO_HOST_DEVICE inline int64_t count_tasks(const LayerTasks& tasks, int64_t chunks, int32_t stages, int role) {
  if (role == kPackTask) return tasks.pack_tasks;
  if (role == kPermuteTask || role == kRestoreTask) return tasks.permute_tasks;
  if (role == kGramTask) return chunks * tasks.gram_tasks;
  if (role == kApplyTask) return chunks * tasks.apply_tasks;
  return stages == kStageApply && tasks.apply_tasks > 0 ? 0 : chunks;
}

}  // namespace consistency_ops
