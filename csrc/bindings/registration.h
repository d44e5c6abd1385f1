// Every binding serves both devices: one list of functions, registered under every key that has kernels.
//
//   CO_REGISTER(m) { m.impl("modulus", TORCH_BOX(&modulus)); }
#pragma once

#include <torch/csrc/stable/library.h>

#include "bindings/cuda_scope.h"

// One level more, so that CO_NAMESPACE is replaced before it becomes part of a name.
#define CO_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define CO_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

#if defined(CO_CUDA_KERNELS) && !defined(CONSISTENCY_OPS_SIMT)
#define CO_REGISTER_CUDA() \
  CO_LIBRARY_IMPL(CO_NAMESPACE, CUDA, cuda) { register_all(cuda); }
#else
#define CO_REGISTER_CUDA()
#endif

#define CO_REGISTER(m)                                             \
  static void register_all(torch::stable::detail::StableLibrary&); \
  CO_LIBRARY_IMPL(CO_NAMESPACE, CPU, cpu) { register_all(cpu); }   \
  CO_REGISTER_CUDA()                                               \
  static void register_all(torch::stable::detail::StableLibrary& m)
