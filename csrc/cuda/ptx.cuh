// One wrapper for every PTX instruction that the kernels use.
//
// The host runtime of tests/simt has a body of the same meaning for each (tests/simt/ptx_host.h, included before any
// kernel file); tests/golden compares the two on a GPU.  Clusters exist from sm_90 on: on sm_80 their wrappers compile
// to nothing, and the launcher never asks for them.
#pragma once

#include "cuda/port.cuh"

#if defined(__CUDACC__)
namespace consistency_ops {

// threadIdx.x, read from its register at every call.  The compiler would keep values derived from one reading through
// the whole kernel, and spill them.
CO_DEVICE int fresh_thread() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);  // or every division by a power of two would round toward zero
  return thread;
}

// A barrier of `threads` threads, whole warps of a CTA, that has a number from 1 to 15.  What a thread wrote before it
// arrived is visible to those that have waited.
CO_DEVICE void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Counts this thread among them and goes on.
CO_DEVICE void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// 1 / sqrt(x) to 2^-22.9, of normal numbers; what is below them counts as zero.
CO_DEVICE float inverse_root_approximately(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// All threads of a cluster wait for one another; what they wrote to any of its shared memories is visible afterwards.
CO_DEVICE void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __syncwarp();  // .aligned wants whole warps
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Reads from the shared memory of CTA `rank` of the cluster, at the place that `address` has in this CTA's.
CO_DEVICE Float4 load_cluster(const Float4* address, int rank) {
  Float4 value{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote]; }"
      : "=f"(value.v[0]), "=f"(value.v[1]), "=f"(value.v[2]), "=f"(value.v[3])
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank)
      : "memory");
#endif
  return value;
}

CO_DEVICE int load_cluster(const int* address, int rank) {
  int value = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %1, %2;\n ld.shared::cluster.u32 %0, [remote]; }"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank)
               : "memory");
#endif
  return value;
}

// Writes there.
CO_DEVICE void store_cluster(Float4* address, int rank, const Float4& value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .u32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.f32 [remote], {%2, %3, %4, %5}; }" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(address))),
      "r"(rank), "f"(value.v[0]), "f"(value.v[1]), "f"(value.v[2]), "f"(value.v[3])
      : "memory");
#endif
}

// Stores 8 or 16 bytes of device memory at once, on a multiple of as many.  (The compiler makes single stores of them
// where it has put the words together itself.)
CO_DEVICE void store_words(void* address, const uint32_t (&word)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word[0]), "r"(word[1]) : "memory");
}

CO_DEVICE void store_words(void* address, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word[0]), "r"(word[1]), "r"(word[2]),
               "r"(word[3])
               : "memory");
}

// Fetches the line that holds `address` into L2.  The address must be readable.
CO_DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Float to the bits of a 16-bit float, rounded to nearest, ties to even; and back.  (bfloat16 to float is a shift:
// convert.cuh.)
CO_DEVICE uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

CO_DEVICE uint16_t float_to_float16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

CO_DEVICE float float16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Publishing between CTAs: what the adding thread has seen before `add_release` is visible to a thread whose
// `load_acquire` sees the sum.
CO_DEVICE void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Both at once, for a counter that several CTAs publish with and that the last one reads; returns the value before.
CO_DEVICE uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}

CO_DEVICE uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// sum += term, here and not where the sum is next used: the term's register is free afterwards.
CO_DEVICE void add_now(float& sum, float term) { asm volatile("add.f32 %0, %0, %1;" : "+f"(sum) : "f"(term)); }

// The nearest TF32 number (10 explicit bits of mantissa), ties away from zero, as a float.
CO_DEVICE float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// D[16 x 8] += A[16 x 8] B[8 x 8] by one warp; A and B are TF32, sums are float.  With g = lane / 4 and t = lane % 4 a
// lane holds a = {A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]}, b = {B[t][g], B[t + 4][g]}, d = {D[g][2t],
// D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1]} (PTX ISA, mma.m16n8k8).
CO_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// Two floats to bfloat16, rounded to nearest, ties to even; `low` in the low half.
CO_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory.  Lane 8 i + r passes the address of row r of matrix
// i, 8 numbers on 16 bytes; register i of a lane is then {M_i[g][2t], M_i[g][2t + 1]}, the first in the low half (PTX
// ISA, ldmatrix).
CO_DEVICE void load_matrices(uint32_t (&m)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers from shared memory, transposed.  Lane 8 i + r passes the address of row r
// of matrix i, 8 numbers on 16 bytes; register i of a lane is then {M_i[2t][g], M_i[2t + 1][g]}, the first in the low
// half (PTX ISA, ldmatrix).
CO_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// D[16 x 8] += A[16 x 16] B[16 x 8] by one warp; A and B are bfloat16 or float16, their products exact, sums are float.
// A lane holds a = {A[g][2t ..], A[g + 8][2t ..], A[g][2t + 8 ..], A[g + 8][2t + 8 ..]}, b = {B[2t ..][g], B[2t + 8
// ..][g]} in pairs, and d as above (PTX ISA, mma.m16n8k16).
template <bool kBFloat16>
CO_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
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
}

// Whether the four warps of a warpgroup multiply together (sm_90a alone; a plain sm_90 does not have it).  `wanted`
// counts on the host runtime only, which has both ways.
CO_DEVICE bool by_warpgroups(bool wanted) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  (void)wanted;
  return true;
#else
  (void)wanted;
  return false;
#endif
}

// Keeps the loads that follow behind what precedes, all lanes of a warp: for sm_90a the compiler finds registers for
// the operands of several products at once, for other architectures it would spill.
CO_DEVICE void keep_order() {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __syncwarp();
#endif
}

// What this thread has written to shared memory may be read by warpgroup products after the next barrier.
CO_DEVICE void publish_to_warpgroups() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// All threads of a warpgroup, before products whose registers other instructions have written; and after products whose
// sums are read next.
CO_DEVICE void begin_warpgroup_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
CO_DEVICE void end_warpgroup_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;\n wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// D[64 x 32] = A[64 x 16] B[16 x 32], plus D if `adds`; bfloat16, sums are float.  Each of the four warps holds 16 rows
// of A as mma_m16n8k16 does, and of D as four of its D beside each other.  B lies in shared memory in rows of 64 bytes,
// of which eight begin on 512 bytes and whose four vectors of 16 bytes are turned: vector v of row r is at v ^ r / 2 %
// 4 (64-byte swizzle).  Its rows are the columns of B, and `b` is the first or the second 32 bytes of the first of
// them; if kTransposed they are the rows of B.
template <bool kTransposed>
CO_DEVICE void wgmma_m64n32k16(float (&d)[16], const uint32_t (&a)[4], const uint16_t* b, bool adds) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr uint64_t kSwizzle64 = uint64_t{2} << 62, kEightRows = uint64_t{512 >> 4} << 32, kUnused = uint64_t{1} << 16;
  const uint64_t where = kSwizzle64 | kEightRows | kUnused | (__cvta_generic_to_shared(b) >> 4 & 0x3fff);
  asm volatile(
      "{ .reg .pred adds;\n setp.ne.b32 adds, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15}, {%16, %17, %18, %19}, %20, adds, 1, 1, %22; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(where), "r"(adds ? 1 : 0), "n"(kTransposed ? 1 : 0));
#endif
}

}  // namespace consistency_ops
#endif
