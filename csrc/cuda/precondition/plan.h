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
// A launch of whitening (whitening_cuda.h) has the same tasks.  Its gram tasks also look at G, because rows enter an
// average only where G is finite, so every layer has gram tasks; and where displacements are mapped back, restore tasks
// scale and add them when the norms of all parts are known.
//
// Tasks are numbered in rounds: round r packs X of layer r, has the gram tasks of layer r - 1, factors layer r - 2 and
// permutes its G, applies to layer r - 3, and restores G of layer r - 4.  So the factors of one layer, which are bound
// by latency, run beside the reads of the next.  Within a round the part counts slowest: CTAs that run side by side
// read the same rows for different chunks, whose units share sectors.  Packed X has two buffers in the workspace: a
// layer waits until the gram tasks of the last but one have read theirs.
#pragma once

#include "consistency_ops/whitening.h"
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

// What a launch does.
enum class Mode : int32_t {
  kCorrects = 0,    // the stages of PreconditionOptions, with symmetric matrices
  kFactors = 1,     // covariance -> L^-1
  kMultiplies = 2,  // G <- G M, M lower triangular
  kWhitens = 3,     // X, average -> L^-1, G <- G L^-T
  kWhitensBy = 4,   // G <- G L^-T by a given L^-1
  kUnwhitens = 5,   // W <- before + s (W - before) L^-1 by a given L^-1
};

// What the launches of whitening need beside the layers.  The running average of a layer is its `covariance`, and what
// a weight was before the step its `x`, with the strides of g.
struct WhiteningParams {
  void* of_layer[kMaxLaunchLayers];  // the weight of the average (float), or the bias before the step, or null
  int32_t number[kMaxLaunchLayers];  // of the layer in has_gradient and in squares
  int32_t* has_gradient;             // written by kWhitens and kWhitensBy, read by kUnwhitens
  float* squares;                    // of kUnwhitens, [2] a layer: |D|^2, |D L^-1|^2
  float decay, entering;             // weights of the stored average and of the new covariance
  Mode mode;
  bool keep_norm, finish;  // WhiteningOptions
};

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
  WhiteningParams whitening;
};
static_assert(sizeof(PreconditionParams) <= 32764, "kernel parameters are limited to 32,764 bytes");

struct PreconditionLaunch {
  PreconditionParams params;
  int64_t ctas;     // 0: there is nothing to do
  int32_t threads;  // of a CTA
};

// What the layers of a call have in addition where it whitens; `whitened` is null where it corrects.
struct WhiteningCall {
  Mode mode = Mode::kCorrects;
  const WhitenedLayer* whitened = nullptr;
  WhiteningOptions options = {};
  int32_t* has_gradient = nullptr;
  float* squares = nullptr;
};

// `squares`: those of unwhiten_cuda, or null.
WhiteningCall call_of(const WhitenedLayer* whitened, int64_t count, const PreconditionOptions& options,
                      const WhiteningOptions& whitening, float* squares);

// Whether the arguments of whiten_cuda or unwhiten_cuda keep their bounds.
bool is_valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
              const CudaTuning& tuning, const WhiteningCall& call);

// Whether the arguments of precondition_cuda keep its bounds.
bool is_valid(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
              const CudaTuning& tuning);

// How many of `layers` the next launch takes: as many as it can describe, without parting those with the same input.
int64_t next_launch(const PreconditionLayer* layers, int64_t count);

// Fills `launch` for at most kMaxLaunchLayers layers.  kInvalidArgument: the chunks do not fit the device, or the
// workspace or the number of tasks is out of range.
Status plan_launch(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                   const CudaDevice& device, void* workspace, const CudaTuning& tuning, PreconditionLaunch& launch,
                   const WhiteningCall& call = {});

// precondition_workspace_cuda for any call.
int64_t workspace_bytes(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                        const CudaTuning& tuning, const WhiteningCall& call);

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

// Of the records of a chunk, beside those of its gram tasks: its inverse, where the apply tasks do not find it
// elsewhere.
CO_HOST_DEVICE constexpr int64_t inverse_floats(const LayerTasks& tasks, int64_t record, int32_t stages) {
  return tasks.apply_tasks > 0 && stages != kStageApply ? record + kStatusFloats : 0;
}

// What a gram task of kWhitens tells the factor tasks of its layer.
struct GramStatus {
  float diagonal;  // the sum of the diagonal of the chunk's stored average; of the first part, else 0
  uint32_t flags;  // GradientFlags of the task's part of G
};
enum GradientFlags : uint32_t { kNotZero = 1, kNotFinite = 2 };

// What an apply task of kUnwhitens tells the restore tasks of its layer.
struct SquareSums {
  float before, after;  // of its part of D and of D L^-1, times kSquareScale^2
};
// A displacement may be so small that its square is no float.
constexpr float kSquareScale = 0x1p24f;

// Bytes of the workspace for these, of a layer; with kWhitens the new weight of the average follows.
CO_HOST_DEVICE inline int64_t status_bytes(const LayerTasks& tasks, int64_t chunks, Mode mode) {
  const int64_t grams = mode == Mode::kWhitens ? chunks * tasks.gram_tasks : 0;
  const int64_t applies = mode == Mode::kUnwhitens ? chunks * tasks.apply_tasks : 0;
  const int64_t bytes = grams * int64_t{sizeof(GramStatus)} + applies * int64_t{sizeof(SquareSums)};
  return bytes > 0 ? (bytes + int64_t{sizeof(float)} + 15) / 16 * 16 : 0;
}

// Elements of a packed row of X, which begins on 16 bytes.
CO_HOST_DEVICE inline int64_t packed_pitch(const PreconditionLayer& layer) {
  const int64_t vector = 16 / element_size(layer.x_dtype);
  return (all_units(layer) + vector - 1) / vector * vector;
}

CO_HOST_DEVICE inline int64_t count_tasks(const LayerTasks& tasks, int64_t chunks, int32_t stages, int role) {
  if (role == kPackTask) return tasks.pack_tasks;
  if (role == kPermuteTask) return tasks.permute_tasks;
  if (role == kRestoreTask) return tasks.permute_tasks + tasks.finish_tasks;
  if (role == kGramTask) return chunks * tasks.gram_tasks;
  if (role == kApplyTask) return chunks * tasks.apply_tasks;
  return stages == kStageApply && tasks.apply_tasks > 0 ? 0 : chunks;
}

}  // namespace consistency_ops
