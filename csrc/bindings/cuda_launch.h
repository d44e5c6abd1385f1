// What the bindings of the correction and of whitening share where they launch a CUDA kernel.
#pragma once

#include "bindings/cuda_scope.h"
#include "bindings/layout.h"

#if defined(CO_CUDA_KERNELS)
namespace consistency_ops::bindings {

// What co_set_cuda_tuning has chosen for this thread.
inline CudaTuning& forced_tuning() {
  static thread_local CudaTuning tuning;
  return tuning;
}

// Calls launch(device, workspace, stream, tuning) on the device of `on`, with `bytes` bytes of workspace there.
template <typename Launch>
Status launch_with_workspace(const Tensor& on, int64_t bytes, CudaTuning tuning, Launch&& launch) {
  const CudaScope scope(on);
  Tensor workspace = empty_contiguous(on, {bytes}, torch::headeronly::ScalarType::Byte);
  if (bytes > 0) tuning.counters = scope.counters();
  if (bytes > 0 && tuning.counters < 0) {
    // On the stream, so also at every replay of a graph, whose memory pool other operators may have written to.
    Tensor counters = torch::stable::narrow(workspace, 0, 0, kCudaCounterBytes);
    torch::stable::zero_(counters);
  }
  return launch(scope.device(), bytes > 0 ? workspace.mutable_data_ptr() : nullptr, scope.stream(), tuning);
}

// Why a launch was not made, beside what check_status says.
inline void check_launch(Status status, const char* op) {
  STD_TORCH_CHECK(status != Status::kInvalidArgument, op,
                  ": beyond the CUDA kernel: at most 2^30 rows a layer, fewer than 2^31 units and chunks, and chunks "
                  "above 192 units need a device with 163 KiB of shared memory a block");
}

}  // namespace consistency_ops::bindings
#endif
