// The bfloat16 pair kernels for AVX-512 with BF16: 16 x 16 tiles as in chunk_kernels.inl, two rows of X a step.
//
// VDPBF16PS adds the product of the upper halves, then that of the lower halves, each rounded to nearest even; it reads
// subnormal inputs as zero (below 1e-38, whose squares are zero in float anyway).
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/chunk_kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

namespace consistency_ops::cpu {
namespace avx512bf16 {
#include "cpu/pair_pack.inl"

static void gram(uint32_t* p, int64_t pairs, int64_t pitch, int panels, bool accumulate, float* c) {
  const int64_t height = int64_t{kPanel} * panels;
  for (int i = 0; i < panels; ++i) {
    for (int j = 0; j <= i; ++j) {
      const uint32_t* a = p + j * pitch * kPanel;
      const uint32_t* b = p + i * pitch * kPanel;
      float* to = c + (i * height + j * kPanel) * kPanel;
      __m512 acc[kPanel];
#pragma GCC unroll 16
      for (int r = 0; r < kPanel; ++r) acc[r] = _mm512_setzero_ps();
      for (int64_t k = 0; k < pairs; ++k, a += kPanel, b += kPanel) {
        const __m512bh row = (__m512bh)_mm512_load_si512(b);
#pragma GCC unroll 16
        for (int r = 0; r < kPanel; ++r) {
          acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r])), row);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kPanel; ++r) {
        if (accumulate) acc[r] = _mm512_add_ps(acc[r], _mm512_load_ps(to + r * kPanel));
        _mm512_store_ps(to + r * kPanel, acc[r]);
      }
    }
  }
}

}  // namespace avx512bf16

extern const PairKernels avx512bf16_pairs;
const PairKernels avx512bf16_pairs = {avx512bf16::pack, avx512bf16::gram, nullptr};

}  // namespace consistency_ops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
