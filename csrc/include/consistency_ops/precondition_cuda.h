// The CUDA launcher of precondition.h's problem description.  sm_80 and newer; needs no torch and no CUDA header.
#pragma once

#include "consistency_ops/precondition.h"

namespace consistency_ops {

// What the launcher must know of a device.
struct CudaDevice {
  int32_t shared_bytes;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
};

// Queues the correction on `stream` (a cudaStream_t) and returns at once: no synchronisation, no allocation, no copy.
// One kernel launch for every 120 layers.  Differences from precondition_cpu: X and G are float32, bfloat16 or float16
// and everything is computed in float32 (kInvalidArgument otherwise); chunks above 192 units need a device with 163 KiB
// of shared memory a block.
//
// `workspace` is device memory of precondition_workspace_cuda() bytes, 16-byte aligned, or null where that is 0.  Its
// first kCudaCounterBytes must be zero when it is first used; every launch leaves them zero, so that it can be used
// again by the next launch on the same stream and by replays of a CUDA graph.  Launches that may overlap need separate
// workspaces.
Status precondition_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options,
                         const CudaDevice& device, void* workspace, void* stream);

constexpr int64_t kCudaCounterBytes = 512;

// Non-zero only for trace scaling of layers with several chunks in the fused call: their chunks meet in the workspace,
// where every one of them finds the trace of the layer.
int64_t precondition_workspace_cuda(const PreconditionLayer* layers, int64_t count, const PreconditionOptions& options);

}  // namespace consistency_ops
