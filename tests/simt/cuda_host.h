// What a kernel sees of CUDA when g++ compiles it: the built-in functions that csrc/cuda uses, and the macros and the
// launch of csrc/cuda/port.cuh, on the runtime of runtime.h.  Included by ptx_host.h.  A function that is missing here
// is a compile error, never a silent difference.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "consistency_ops/types.h"
#include "simt/runtime.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// A bare __shared__ would be one array for all CTAs, without NaN fill and without a DSMEM address.
#define __shared__ static_assert(false, "declare shared memory with CO_SHARED or CO_DYNAMIC_SHARED")
#define CO_SHARED(T, name, dims) auto& name = simt::shared_array<T dims>([] {})
#define CO_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())
#define CO_DEVICE inline
#define CO_DEVICE_MEMORY static
#define CO_KERNEL_PARAM(T, name) const T& name
#define CO_UNROLL
#define CO_UNROLL_2
#define CO_UNROLL_4
#define CO_NO_UNROLL
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace simt {

template <typename T, typename Tag>
T& shared_array(Tag) {  // Tag is a lambda type: a key for every declaration
  static const char key = 0;
  return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T) > 16 ? alignof(T) : 16));
}

template <typename F>
void launch(dim3 grid, dim3 block, dim3 cluster, size_t dynamic_shared, F&& body) {
  launch(
      grid, block, cluster, dynamic_shared,
      [](void* argument) { (*static_cast<std::remove_reference_t<F>*>(argument))(); }, &body);
}

template <typename T>
struct Shuffle {
  T value;
  int source;
  T result;
};

template <typename T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  Shuffle<T> mine{value, source, value};
  warp_operation(
      mask, &mine,
      [](void* const lanes[32], uint32_t all) {
        for (int i = 0; i < 32; ++i) {
          if (!(all >> i & 1)) continue;
          auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
          if (!(all >> lane->source & 1)) {
            fail("lane %d shuffles from lane %d, which is not in mask %08x: an undefined value", i, lane->source, all);
          }
          lane->result = static_cast<Shuffle<T>*>(lanes[lane->source])->value;
        }
      },
      site);
  return mine.result;
}

// Relaxed, as CUDA's are, and a point where another thread may run.
template <typename T, typename F>
T read_modify_write(T* address, F update) {
  atomic_point();
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    wanted = update(old);
  } while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::block_barrier({file, line}); }
inline int __syncthreads_or(int value, SIMT_SITE) { return simt::block_barrier_or(value, {file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_SITE) {
  simt::warp_operation(mask, nullptr, nullptr, {file, line});
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, SIMT_SITE) {
  return simt::shuffle(mask, value, source & 31, {file, line});
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, SIMT_SITE) {
  return simt::shuffle(mask, value, static_cast<int>(simt::thread_rank() & 31) ^ lanes, {file, line});
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_SITE) {
  struct Vote {
    int predicate;
    uint32_t result;
  } mine{predicate, 0};
  simt::warp_operation(mask, &mine,
                       [](void* const lanes[32], uint32_t all) {
                         uint32_t votes = 0;
                         for (int i = 0; i < 32; ++i) {
                           if ((all >> i & 1) && static_cast<Vote*>(lanes[i])->predicate) votes |= 1u << i;
                         }
                         for (int i = 0; i < 32; ++i) {
                           if (all >> i & 1) static_cast<Vote*>(lanes[i])->result = votes;
                         }
                       },
                       {file, line});
  return mine.result;
}

inline void __threadfence() { simt::fence(); }
inline void __nanosleep(unsigned) { simt::sleep(); }

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return simt::read_modify_write(address, [value](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return simt::read_modify_write(address, [value](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return simt::read_modify_write(address, [value](T) { return value; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::fabs;
using std::fma;
using std::isfinite;

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

namespace consistency_ops {

template <typename Kernel>
bool clusters_fit(Kernel*, dim3 /*block*/, size_t /*dynamic_shared*/, int /*cluster*/) {
  return simt::options().clusters;
}

template <typename Kernel, typename Params>
Status launch(Kernel* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void* /*stream*/, const Params& params,
              int cluster = 1) {
  simt::launch(grid, block, dim3(static_cast<unsigned>(cluster)), dynamic_shared, [&] { kernel(params); });
  return Status::kOk;
}

}  // namespace consistency_ops
