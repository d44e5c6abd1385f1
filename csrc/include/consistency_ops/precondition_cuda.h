// The CUDA launcher of precondition.h's problem description.  sm_80 and newer; needs no torch and no CUDA header.
#pragma once

#include "consistency_ops/precondition.h"

namespace consistency_ops {

// What the launcher must know of a device.
struct CudaDevice {
  int32_t shared_bytes;             // cudaDevAttrMaxSharedMemoryPerBlockOptin
  int32_t compute_capability = 80;  // 10 * major + minor; 90 and more have clusters
};

// How many CTAs work on a chunk, and how they exchange what they have.
enum class PreconditionRung : int32_t {
  kAutomatic = 0,
  kOneCta = 1,     // one CTA does everything
  kCluster = 2,    // a cluster divides the rows of X and of G among its CTAs; kOneCta on devices without clusters
  kTaskQueue = 3,  // parts of X, the inverse and parts of G are tasks of a queue, which exchange through the workspace
};

// Whether the rows of X and G are permuted first, so that the units of a chunk are neighbours in memory.  It is for the
// exact division (group = 1, or a given permutation), where a warp that gathers the units of one chunk moves a sector
// of 32 bytes for every element.  It needs kTaskQueue, and rows whose units are neighbours: linear layers,
// channels-last inputs, 1 x 1 convolutions; others are gathered.  G is permuted in place and back.
enum class Packing : int32_t {
  kAutomatic = 0,  // matrices of 1 MiB and more, with more than 4 chunks, whose gather would move 4 times their bytes
  kNever = 1,
  kAlways = 2,  // wherever it is possible
};

// What a benchmark or a caller with other needs may choose.  The defaults are float32-accurate and, on one
// architecture, the same bit for bit whatever the size of the device.
struct CudaTuning {
  PreconditionRung rung = PreconditionRung::kAutomatic;
  int32_t ctas = 0;   // of a chunk: CTAs of kCluster (1 .. 8), parts of kTaskQueue (1 .. 1024); 0: automatic
  bool tf32 = false;  // one TF32 pass for every product: torch's float32 matmul precision "high"
  Packing packing = Packing::kAutomatic;
  // Where CTAs that meet in device memory count: -1, at the beginning of the workspace; 0 .. kCudaCounterSlots - 1, in
  // memory of the library on the device, which is zero when it is loaded.  Launches that may overlap need slots of
  // their own.
  int32_t counters = -1;
};

constexpr int32_t kCudaCounterSlots = 256;

// Queues the correction on `stream` (a cudaStream_t) and returns at once: no synchronisation, no allocation, no copy.
// One kernel launch for every 112 layers.  Differences from precondition_cpu: X and G are float32, bfloat16 or float16
// and everything is computed in float32 (kInvalidArgument otherwise); chunks above 192 units need a device with 163 KiB
// of shared memory a block; at most 112 layers in a row have the same input.
//
// `workspace` is device memory of precondition_workspace_cuda() bytes, 16-byte aligned, or null where that is 0.  Its
// first kCudaCounterBytes must be zero when it is first used, unless `tuning.counters` says that they are elsewhere;
// every launch leaves them zero, so that it can be used again by the next launch on the same stream and by replays of a
// CUDA graph.  Launches that may overlap need separate workspaces; two executions of one graph must not, also where it
// was instantiated twice.
Status precondition_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                         const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning = {});

constexpr int64_t kCudaCounterBytes = 2048;

// Enough for every device.  Non-zero where CTAs meet in device memory: with kTaskQueue, and for trace scaling of layers
// with several chunks in the fused call.  Packing adds the sampled rows of the largest X that is packed, twice where
// there are several.
int64_t precondition_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                                    const CudaTuning& tuning = {});

}  // namespace consistency_ops
