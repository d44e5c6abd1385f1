// Allocations that say in torch's own words that memory is out.
//
// The stable interface turns every exception of an allocator into "API call failed at ...", which neither a user nor
// the batch-size finders of trainers understand: they look for the allocator's text.  torch 2.13 and newer tell it when
// asked; before that it is said again here.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <string>

#include "bindings/cuda_scope.h"

namespace consistency_ops::bindings {

inline std::string why_not_allocated(const Tensor& like, int64_t bytes, const char* error) {
  using LastError = const char* (*)();
  static const auto last_error =
      reinterpret_cast<LastError>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  if (last_error != nullptr && *last_error() != '\0') return last_error();
  if (like.is_cpu()) {
    return "DefaultCPUAllocator: can't allocate memory: you tried to allocate " + std::to_string(bytes) + " bytes";
  }
#if defined(USE_CUDA) && !defined(CONSISTENCY_OPS_SIMT)
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) != cudaSuccess) return error;  // the device has failed, not the allocator
  const auto mib = [](size_t size) { return std::to_string(size >> 20) + " MiB"; };
  return "CUDA out of memory. Tried to allocate " + mib(static_cast<size_t>(bytes)) + ". GPU " +
         std::to_string(like.get_device_index()) + " has a total capacity of " + mib(total) + " of which " + mib(free) +
         " is free.";
#else
  return error;
#endif
}

// make(), which allocates about `bytes` on the device of `like`.
template <typename F>
auto allocating(const Tensor& like, int64_t bytes, F&& make) {
  try {
    return make();
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, why_not_allocated(like, bytes, error.what()));
  }
  return make();  // not reached
}

inline int64_t element_bytes(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::ComplexDouble:
      return 16;
    case ScalarType::Double:
    case ScalarType::Long:
    case ScalarType::ComplexFloat:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Byte:
      return 1;
    default:
      return 2;
  }
}

inline Tensor contiguous_copy(const Tensor& x) {
  return allocating(x, x.numel() * element_bytes(x.scalar_type()), [&] { return torch::stable::contiguous(x); });
}

}  // namespace consistency_ops::bindings
