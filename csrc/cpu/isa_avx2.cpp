// The chunk kernels for AVX2 with FMA.
#include "cpu/chunk_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define CO_VECTOR_BYTES 32

namespace consistency_ops::cpu {
namespace avx2 {
#include "cpu/chunk_kernels.inl"
#include "cpu/direct_kernels.inl"
}  // namespace avx2

extern const IsaKernels<float> avx2_f32;
extern const IsaKernels<double> avx2_f64;
const IsaKernels<float> avx2_f32 = avx2::isa_table<float>();
const IsaKernels<double> avx2_f64 = avx2::isa_table<double>();

}  // namespace consistency_ops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
