// The one header that a kernel file includes: CUDA under nvcc, the host runtime of tests/simt under any other compiler.
//
// Kernel source stays plain C++ so that its numbers, barriers and bounds can be tested on a machine without a GPU.
// Hence the rules: shared memory only through CO_SHARED and CO_DYNAMIC_SHARED, no <<<>>>, no inline PTX outside this
// file, every thread reaches every __syncthreads, and a spin contains an atomic.  Every PTX instruction is one wrapper
// with two bodies of the same meaning, the second for the host.  What sm_80 lacks (clusters) compiles to nothing there;
// the launcher does not ask for it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define CO_SHARED(T, name, dims) __shared__ T name dims
#define CO_DYNAMIC_SHARED(T, name)                                         \
  extern __shared__ __align__(16) unsigned char co_dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(co_dynamic_shared_bytes)
#define CO_DEVICE __device__ __forceinline__
#define CO_DEVICE_MEMORY static __device__
#define CO_KERNEL_PARAM(T, name) const __grid_constant__ T name
#define CO_UNROLL _Pragma("unroll")
#define CO_UNROLL_4 _Pragma("unroll 4")
#define CO_NO_UNROLL _Pragma("unroll 1")
#else
#include "simt/cuda_host.h"
#define CO_DEVICE inline
#define CO_DEVICE_MEMORY static
#define CO_KERNEL_PARAM(T, name) const T& name
#define CO_UNROLL
#define CO_UNROLL_4
#define CO_NO_UNROLL
#endif

#include "consistency_ops/types.h"

namespace consistency_ops {

#if defined(__CUDACC__)
inline Status launch_failed(cudaError_t error) {
  (void)cudaGetLastError();  // or the next call that looks would find it
  launch_error() = cudaGetErrorString(error);
  return Status::kLaunchFailed;
}
#endif

// The <<<>>> of this code base.  One parameter struct, passed by value; up to 32,764 bytes reach the device with the
// launch.  `cluster` consecutive CTAs of grid.x form a cluster.
template <typename Kernel, typename Params>
Status launch(Kernel* kernel, dim3 grid, dim3 block, size_t dynamic_shared, void* stream, const Params& params,
              int cluster = 1) {
#if defined(__CUDACC__)
  static_assert(sizeof(Params) <= 32764, "kernel parameters are limited to 32,764 bytes");
  if (dynamic_shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
    if (error != cudaSuccess) return launch_failed(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = static_cast<unsigned>(cluster);
  shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
  config.attrs = &shape;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error != cudaSuccess) return launch_failed(error);
#else
  (void)stream;
  simt::launch(grid, block, dim3(static_cast<unsigned>(cluster)), dynamic_shared, [&] { kernel(params); });
#endif
  return Status::kOk;
}

// threadIdx.x, read again at every call: values derived from one reading are kept through the whole kernel, and
// spilled.
CO_DEVICE int fresh_thread() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

struct alignas(16) Float4 {
  float v[4];
};

// All threads of a cluster meet; what they wrote to any of its shared memories is visible afterwards.
#if defined(__CUDACC__)
CO_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __syncwarp();  // .aligned wants whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
#else
inline void cluster_barrier(SIMT_SITE) { simt::cluster_barrier({file, line}); }
#endif

// What lies at `address`, an address of this CTA's shared memory, in the shared memory of CTA `rank` of the cluster.
CO_DEVICE Float4 load_cluster(const Float4* address, int rank) {
  Float4 value{};
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote]; }"
      : "=f"(value.v[0]), "=f"(value.v[1]), "=f"(value.v[2]), "=f"(value.v[3])
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank)
      : "memory");
#endif
#elif !defined(__CUDACC__)
  value = *static_cast<const Float4*>(simt::map_shared_rank(const_cast<Float4*>(address), rank));
#endif
  return value;
}

CO_DEVICE int load_cluster(const int* address, int rank) {
  int value = 0;
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %1, %2;\n ld.shared::cluster.u32 %0, [remote]; }"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank)
               : "memory");
#endif
#elif !defined(__CUDACC__)
  value = *static_cast<const int*>(simt::map_shared_rank(const_cast<int*>(address), rank));
#endif
  return value;
}

CO_DEVICE void store_cluster(Float4* address, int rank, const Float4& value) {
#if defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5}; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(address))),
      "r"(rank), "f"(value.v[0]), "f"(value.v[1]), "f"(value.v[2]), "f"(value.v[3])
      : "memory");
#endif
#elif !defined(__CUDACC__)
  *static_cast<Float4*>(simt::map_shared_rank(address, rank)) = value;
#endif
}

// `pointer`, known to be into device memory: a pointer that went through shared memory could be anything to the
// compiler.
template <typename T>
CO_DEVICE T* global_memory(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Asks for the line of L2 that holds `address`, which must be readable.
CO_DEVICE void prefetch_l2(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#elif !defined(__CUDACC__)
  (void)*static_cast<const volatile unsigned char*>(address);
#endif
}

// Bits of a 16-bit float <-> float; to 16 bits round to nearest, ties to even.
CO_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

CO_DEVICE uint16_t float_to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
}

CO_DEVICE float float16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // rebiases the exponent, subnormals included
  return __uint_as_float(sign | __float_as_uint(scaled));
#endif
}

CO_DEVICE uint16_t float_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                               // subnormal: the sum rounds to 2^-24
    const float sum = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
#endif
}

// Publishing between CTAs: what the adding thread has seen before `add_release` is visible to a thread whose
// `load_acquire` sees the sum.
CO_DEVICE void add_release(uint32_t* counter, uint32_t value) {
#if defined(__CUDA_ARCH__)
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
#elif !defined(__CUDACC__)
  simt::atomic_point();
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
#endif
}

// Both at once, for a counter that several CTAs publish with and the last one reads after; returns the value before.
CO_DEVICE uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before = 0;
#if defined(__CUDA_ARCH__)
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
#elif !defined(__CUDACC__)
  simt::atomic_point();
  before = __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
#endif
  return before;
}

CO_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value = 0;
#if defined(__CUDA_ARCH__)
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
#elif !defined(__CUDACC__)
  simt::atomic_point();
  value = __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#endif
  return value;
}

// The nearest TF32 number (10 explicit bits of mantissa), ties away from zero, as a float.
CO_DEVICE float to_tf32(float value) {
#if defined(__CUDA_ARCH__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
#endif
}

// D[16 x 8] += A[16 x 8] B[8 x 8] on one warp; A and B are TF32, sums are float.  With g = lane / 4 and t = lane % 4 a
// lane holds a = {A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]}, b = {B[t][g], B[t + 4][g]}, d = {D[g][2t],
// D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]} (PTX ISA, mma.m16n8k8).
CO_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
#if defined(__CUDA_ARCH__)
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#elif !defined(__CUDACC__)
  struct Operands {
    float* d;
    const float *a, *b;
  } mine{d, a, b};
  simt::warp_operation(0xffffffffu, &mine,
                       [](void* const lanes[32], uint32_t) {
                         float left[16][8], right[8][8];
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           const int g = lane / 4, t = lane % 4;
                           for (int i = 0; i < 4; ++i) {  // the hardware ignores the 13 lowest bits
                             left[g + i % 2 * 8][t + i / 2 * 4] =
                                 __uint_as_float(__float_as_uint(o->a[i]) & 0xffffe000u);
                           }
                           for (int i = 0; i < 2; ++i)
                             right[t + i * 4][g] = __uint_as_float(__float_as_uint(o->b[i]) & 0xffffe000u);
                         }
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           for (int i = 0; i < 4; ++i) {
                             const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                             float sum = 0.0f;
                             for (int k = 0; k < 8; ++k) sum += left[row][k] * right[k][column];
                             o->d[i] += sum;
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
#endif
}

// Four 8 x 8 matrices of 16-bit numbers in shared memory, transposed.  Lane 8 i + r passes the address of row r of
// matrix i, 8 numbers on 16 bytes; register i of a lane is then {M_i[2t][g], M_i[2t + 1][g]}, the first in the low half
// (PTX ISA, ldmatrix).
CO_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("ldmatrix of a row that is not on 16 bytes");
  struct Operands {
    uint32_t* m;
    const uint16_t* row;
  } mine{m, row};
  simt::warp_operation(0xffffffffu, &mine,
                       [](void* const lanes[32], uint32_t) {
                         for (int i = 0; i < 4; ++i) {
                           for (int lane = 0; lane < 32; ++lane) {
                             const int g = lane / 4, t = lane % 4;
                             const auto at = [&](int r) -> uint32_t {
                               return static_cast<const Operands*>(lanes[8 * i + r])->row[g];
                             };
                             static_cast<Operands*>(lanes[lane])->m[i] = at(2 * t) | at(2 * t + 1) << 16;
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
#endif
}

// D[16 x 8] += A[16 x 16] B[16 x 8] on one warp; A and B are bfloat16 or float16, their products exact, sums are float.
// A lane holds a = {A[g][2t ..], A[g + 8][2t ..], A[g][2t + 8 ..], A[g + 8][2t + 8 ..]}, b = {B[2t ..][g], B[2t + 8
// ..][g]} in pairs, and d as above (PTX ISA, mma.m16n8k16).
template <bool kBFloat16>
CO_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__)
  if (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif !defined(__CUDACC__)
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simt::warp_operation(0xffffffffu, &mine,
                       [](void* const lanes[32], uint32_t) {
                         const auto value = [](uint32_t pair, int half) {
                           const uint16_t bits = static_cast<uint16_t>(pair >> (16 * half));
                           return kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
                         };
                         float left[16][16], right[16][8];
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           const int g = lane / 4, t = lane % 4;
                           for (int i = 0; i < 8; ++i) {
                             left[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = value(o->a[i / 2], i % 2);
                           }
                           for (int i = 0; i < 4; ++i) right[2 * t + i % 2 + i / 2 * 8][g] = value(o->b[i / 2], i % 2);
                         }
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           for (int i = 0; i < 4; ++i) {
                             const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                             float sum = 0.0f;
                             for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                             o->d[i] += sum;
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
#endif
}

}  // namespace consistency_ops
