// Where the CUDA kernels run: the device of a tensor and torch's current stream there.
//
// One library serves CPU and CUDA builds of torch.  The one function that libtorch_cuda alone has is looked up when it
// is first needed: a weak symbol would stay null, because nothing else of that library is linked.  The rest of torch's
// CUDA (allocator, graphs, device guard) is reached through libtorch's device-independent functions.
//
// With CONSISTENCY_OPS_SIMT (tests/simt) the same bindings drive the kernels that are compiled for the host, on CPU
// tensors.
#pragma once

#include "bindings/build.h"
// build.h first: it may define USE_CUDA
#include "bindings/checks.h"
#include "consistency_ops/precondition_cuda.h"

#if defined(USE_CUDA) && !defined(CONSISTENCY_OPS_SIMT)
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/precondition/counter_slots.h"
#endif
#if defined(USE_CUDA) || defined(CONSISTENCY_OPS_SIMT)
#define CO_CUDA_KERNELS 1
#endif

namespace consistency_ops::bindings {

#if defined(CONSISTENCY_OPS_SIMT)

inline bool on_cuda(const Tensor&) { return true; }

class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  void* stream() const { return nullptr; }
  CudaDevice device() const { return {227 << 10, 90}; }
  int32_t counters() const { return 0; }
};

#elif defined(USE_CUDA)

inline bool on_cuda(const Tensor& tensor) { return tensor.is_cuda(); }

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream current_stream() {
  static const CurrentStream function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);  // whoever made a CUDA tensor has loaded it
    void* found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(found);
  }();
  STD_TORCH_CHECK(function != nullptr, "consistency_ops: this torch has no aoti_torch_get_current_cuda_stream");
  return function;
}

// Makes the tensor's device the current one for as long as it lives.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {}

  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(device_, &stream));
    return stream;
  }

  CudaDevice device() const {
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor)};
  }

  // CudaTuning::counters of a launch on this stream.
  int32_t counters() const {
    static CounterSlots slots;
    auto* const on = static_cast<cudaStream_t>(stream());
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    if (cudaStreamIsCapturing(on, &capture) == cudaSuccess) {
      if (capture != cudaStreamCaptureStatusNone) return slots.of_capture(device_);
      if (cudaStreamGetId(on, &id) == cudaSuccess) return slots.of_stream(device_, id);
    }
    (void)cudaGetLastError();  // or the next call that looks would find it
    return -1;
  }

 private:
  int32_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, device_);
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device_, ": ", cudaGetErrorString(error));
    return value;
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

#else

inline bool on_cuda(const Tensor&) { return false; }

#endif

}  // namespace consistency_ops::bindings
