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

void gram(const uint32_t* p, int64_t pairs, int64_t pitch, int panels, bool accumulate, float* c) {
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

template <int kLength>
inline __attribute__((always_inline)) void interleave(const uint16_t* even, const uint16_t* odd, uint32_t* to) {
  uint32_t words[kLength];
  for (int i = 0; i < kLength; ++i) words[i] = even[i] | uint32_t{odd[i]} << 16;
  __builtin_memcpy(to, words, sizeof(words));
}

void pack(const void* x, const int64_t* row_offset, int64_t rows, int64_t unit_stride, int64_t row_units,
          const Run* runs, int64_t count, uint32_t* packed) {
  const uint16_t* source = static_cast<const uint16_t*>(x);
  // With every run goes the prefetch of its share of two later rows (see pack in gather_kernels.inl).
  const int64_t row_bytes = unit_stride == 1 ? row_units * 2 : 0;
  const int64_t ahead = 2 + (64 << 10) / (row_bytes + 1) / 2 * 2;
  const int64_t share = row_bytes == 0 ? 0 : 1 + row_bytes / (count + 1);
  for (int64_t k = 0; k + 1 < rows; k += 2) {
    const int64_t later = k + ahead + 1 < rows ? k + ahead : k;
    const char* next[2] = {reinterpret_cast<const char*>(source + row_offset[later]),
                           reinterpret_cast<const char*>(source + row_offset[later + 1])};
    const uint16_t* even = source + row_offset[k];
    const uint16_t* odd = source + row_offset[k + 1];
    uint32_t* to = packed + k / 2 * kPanel;
    for (const Run* run = runs; run != runs + count; ++run) {
      for (const char*& line : next) {
        __builtin_prefetch(line, 0, 2);
        line += share;
      }
      if (unit_stride == 1 && run->length >= 8) {  // others than 8 are two copies that overlap
        const int back = run->length - 8;
        interleave<8>(even + run->unit, odd + run->unit, to + run->packed);
        if (back > 0) interleave<8>(even + run->unit + back, odd + run->unit + back, to + run->packed + back);
      } else if (unit_stride == 1 && run->length >= 4) {
        const int back = run->length - 4;
        interleave<4>(even + run->unit, odd + run->unit, to + run->packed);
        interleave<4>(even + run->unit + back, odd + run->unit + back, to + run->packed + back);
      } else {
        for (int i = 0; i < run->length; ++i) {
          const int64_t at = (run->unit + i) * unit_stride;
          to[run->packed + i] = even[at] | uint32_t{odd[at]} << 16;
        }
      }
    }
  }
  if (rows % 2 == 0) return;
  const uint16_t* last = source + row_offset[rows - 1];
  for (const Run* run = runs; run != runs + count; ++run) {
    for (int i = 0; i < run->length; ++i) {
      packed[rows / 2 * kPanel + run->packed + i] = last[(run->unit + i) * unit_stride];
    }
  }
}

}  // namespace avx512bf16

extern const PairKernels avx512bf16_pairs;
const PairKernels avx512bf16_pairs = {avx512bf16::pack, avx512bf16::gram};

}  // namespace consistency_ops::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
