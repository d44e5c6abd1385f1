// Types shared by every operation's public header.  No torch, no Python, no CUDA runtime.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define CO_HOST_DEVICE __host__ __device__
#else
#define CO_HOST_DEVICE
#endif

namespace consistency_ops {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

CO_HOST_DEVICE constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// What a launcher returns.  Launchers never throw, never exit and never print.
enum class Status : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // the problem description breaks a documented bound; nothing was written
  kOutOfMemory = 2,      // the workspace could not be allocated; nothing was written
  kLaunchFailed = 3,     // CUDA only: see launch_error()
};

// The CUDA runtime's text for the last kLaunchFailed on this thread.
inline const char*& launch_error() {
  static thread_local const char* text = "no CUDA call has failed";
  return text;
}

// The largest chunk that the kernels factor natively.
constexpr int32_t kMaxChunk = 256;

// The caller's thread pool.  `run(context, tasks, task, argument)` must call task(argument, i) once for every i in
// [0, tasks), on any threads, and return when all calls have returned.  With run == nullptr everything happens on the
// calling thread.  Results do not depend on `threads`, bit for bit.
struct ThreadPool {
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t index), void* argument) = nullptr;
  void* context = nullptr;
  int32_t threads = 1;
};

}  // namespace consistency_ops
