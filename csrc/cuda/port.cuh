// What kernel files share: macros that nvcc and the host runtime of tests/simt both understand, and the launch.
//
// Kernel source stays plain C++, so that its numbers, barriers and bounds can be tested on a machine without a GPU: g++
// compiles the same files with `-include simt/ptx_host.h` (tests/simt), whose headers define these macros, launch() and
// the built-in functions of CUDA on a host runtime.  Hence the rules: shared memory only through CO_SHARED and
// CO_DYNAMIC_SHARED, no <<<>>>, PTX only in ptx.cuh, every thread reaches every __syncthreads, and a spin contains an
// atomic operation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "consistency_ops/types.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#if CUDART_VERSION < 12010
#error "consistency_ops needs CUDA toolkit 12.1 or newer: with older ones kernel parameters end at 4 KiB"
#endif

#include <map>
#include <mutex>
#include <tuple>
#define CO_SHARED(T, name, dims) __shared__ T name dims
#define CO_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char co_dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(co_dynamic_shared_bytes)
#define CO_DEVICE __device__ __forceinline__
#define CO_DEVICE_MEMORY static __device__
#define CO_KERNEL_PARAM(T, name) const __grid_constant__ T name
#define CO_UNROLL _Pragma("unroll")
#define CO_UNROLL_2 _Pragma("unroll 2")
#define CO_UNROLL_4 _Pragma("unroll 4")
#define CO_NO_UNROLL _Pragma("unroll 1")

namespace consistency_ops {

inline Status launch_failed(cudaError_t error) {
  (void)cudaGetLastError();  // or the next call that looks would find it
  launch_error() = cudaGetErrorString(error);
  return Status::kLaunchFailed;
}

// Lets a kernel use all shared memory that a block can have, once in every device.
//
// Without that the limit is 48 KiB together with its fixed arrays.  The attribute belongs to the kernel and not to a
// launch: setting it to what one launch needs would lower it for another thread that is about to launch with more.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex turn;
  static std::map<std::pair<const void*, int>, bool> allowed;
  int device = 0, most = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(turn);
  bool& done = allowed[{kernel, device}];
  if (done) return cudaSuccess;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  }
  done = error == cudaSuccess;
  return error;
}

inline cudaLaunchAttribute cluster_shape(int cluster) {
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = static_cast<unsigned>(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  return shape;
}

// Whether the current device can run one cluster of such CTAs at all: small MIG slices and MPS shares may not.
template <typename Kernel>
bool clusters_fit(Kernel* kernel, dim3 block, size_t dynamic_shared, int cluster) {
  static std::mutex turn;
  static std::map<std::tuple<const void*, int, size_t, int>, bool> known;
  const auto* address = reinterpret_cast<const void*>(kernel);
  int device = 0, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const std::lock_guard<std::mutex> lock(turn);
  const auto key = std::make_tuple(address, device, dynamic_shared, cluster);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  cudaLaunchAttribute shape = cluster_shape(cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.attrs = &shape;
  config.numAttrs = 1;
  cudaError_t error = allow_all_shared_memory(address);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, address, &config);
  if (error != cudaSuccess) (void)cudaGetLastError();  // or the next call that looks would find it
  return known[key] = error == cudaSuccess && clusters > 0;
}

// The <<<>>> of this code base.  One parameter struct, passed by value; up to 32,764 bytes reach the device with the
// launch.  `cluster` consecutive CTAs of grid.x form a cluster.
template <typename Kernel, typename Params>
Status launch(Kernel* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void* stream, const Params& params,
              int cluster = 1) {
  static_assert(sizeof(Params) <= 32764, "kernel parameters are limited to 32,764 bytes");
  if (dynamic_shared > 0) {
    const cudaError_t error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return launch_failed(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute shape = cluster_shape(cluster);
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error != cudaSuccess) return launch_failed(error);
  return Status::kOk;
}

}  // namespace consistency_ops
#elif !defined(CO_SHARED)
#error "compile this file with nvcc, or for the CPU with -include simt/ptx_host.h (tests/simt)"
#endif

namespace consistency_ops {

struct alignas(16) Float4 {
  float v[4];
};

// Returns `pointer`, which must point into device memory.  The compiler cannot know that of a pointer that was read
// from shared memory, and would use slower generic loads.
template <typename T>
CO_DEVICE T* global_memory(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

}  // namespace consistency_ops
