// The chunk kernels for AVX-512 (F, BW, DQ, VL).
#include "cpu/chunk_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define CO_VECTOR_BYTES 64

namespace consistency_ops::cpu {
namespace avx512 {
#include "cpu/chunk_kernels.inl"
#include "cpu/direct_kernels.inl"
}  // namespace avx512

extern const IsaKernels<float> avx512_f32;
extern const IsaKernels<double> avx512_f64;
const IsaKernels<float> avx512_f32 = avx512::isa_table<float>();
const IsaKernels<double> avx512_f64 = avx512::isa_table<double>();

}  // namespace consistency_ops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
