// Types shared by every operation's public header.  No torch, no Python, no CUDA runtime.
//
// What holds for every launcher (functions named *_cpu and *_cuda):
//
// Ownership.  Parameter structs are plain data and own nothing; zero-initialise them (`PreconditionLayer layer{};`).
//   Structs, and the arrays of structs, may go when the launcher has returned.  The memory they point to belongs to the
//   caller; it must stay valid and unshared until the launcher has returned (_cpu) or the stream has passed its work
//   (_cuda).  Outputs must not overlap each other or inputs, except where a comment says "may be x".
// Layout.  Strides and sizes count elements.  Data is aligned to its element; strides are not negative, and zero only
//   where several elements are meant to be one.
// Streams.  A _cuda launcher works on the current device of the calling thread.  It queues kernels on the caller's
//   cudaStream_t and returns; it neither allocates nor synchronises, so it can be captured in a CUDA graph.  Pointers
//   are device pointers.
// Workspace.  A _cpu launcher allocates what it needs and frees it before it returns; *_workspace_cpu says how much
//   that is.  A _cuda launcher gets its workspace from the caller: ask *_workspace_cuda for the bytes, with the very
//   parameters of the launch.  A launcher without such a function needs none.
// Threads.  Any number of calls may run at the same time on data that do not overlap, also with one ThreadPool if that
//   pool allows it.  The only global states are the instruction set (co_set_cpu_isa of c_api.h) and, a thread,
//   launch_error().
// Errors.  The return value is a Status; nothing is thrown and nothing printed.  Data is never an error: Inf, NaN and
//   matrices that cannot be factored are reported per chunk (`info`), not by the Status.
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

// What a launcher returns.  The values are part of the interface.
enum class Status : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // the problem description breaks a documented bound; nothing was written
  kOutOfMemory = 2,      // CPU only: the workspace could not be allocated; nothing was written
  kLaunchFailed = 3,     // CUDA only: a kernel could not be queued; see launch_error()
};

// The CUDA runtime's text for the last kLaunchFailed on this thread.
inline const char*& launch_error() {
  static thread_local const char* text = "no CUDA call has failed";
  return text;
}

// The largest chunk that the kernels factor natively.
constexpr int32_t kMaxChunk = 256;

// The caller's thread pool.  `run(context, tasks, task, argument)` must call task(argument, i) once for every i in
// [0, tasks), on any threads (one after the other is allowed), and return when all calls have returned; a task neither
// throws nor calls `run`.  With run == nullptr, and for small problems, everything happens on the calling thread.
// `threads` is how many tasks a launcher should make of its work; results do not depend on it, bit for bit.
struct ThreadPool {
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t index), void* argument) = nullptr;
  void* context = nullptr;
  int32_t threads = 1;
};

}  // namespace consistency_ops
