// The wrappers of csrc/cuda/ptx.cuh on the host runtime: what each PTX instruction does, in C++.
//
// Every kernel file is compiled with `-include` of this header (simt_library.py), so that csrc includes nothing from
// the tests.  test_simt_runtime.py holds the bodies against what PTX documents, tests/golden against a GPU.
#pragma once

#include <algorithm>
#include <cmath>

#include "simt/cuda_host.h"
// after the macros that it needs
#include "cuda/port.cuh"

namespace consistency_ops {

inline int fresh_thread() { return static_cast<int>(threadIdx.x); }

inline void barrier_sync(int number, int threads, SIMT_SITE) {
  simt::named_barrier(number, threads, true, {file, line});
}
inline void barrier_arrive(int number, int threads, SIMT_SITE) {
  simt::named_barrier(number, threads, false, {file, line});
}

// What is below the normal numbers counts as zero.  The error is as large as the instruction's may be, to either side.
inline float inverse_root_approximately(float x) {
  const float y = 1.0f / std::sqrt(fabs(x) < 0x1p-126f ? x * 0.0f : x);
  return y * (__float_as_uint(x) & 1u ? 1.0f + 0x1p-23f : 1.0f - 0x1p-23f);
}

inline void cluster_barrier(SIMT_SITE) { simt::cluster_barrier({file, line}); }

inline Float4 load_cluster(const Float4* address, int rank) {
  return *static_cast<const Float4*>(simt::map_shared_rank(const_cast<Float4*>(address), rank));
}
inline int load_cluster(const int* address, int rank) {
  return *static_cast<const int*>(simt::map_shared_rank(const_cast<int*>(address), rank));
}
inline void store_cluster(Float4* address, int rank, const Float4& value) {
  *static_cast<Float4*>(simt::map_shared_rank(address, rank)) = value;
}

template <int kWords>
inline void store_words(void* address, const uint32_t (&word)[kWords]) {
  struct alignas(4 * kWords) Words {
    uint32_t word[kWords];
  } words;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Words) != 0) simt::fail("a wide store that is not aligned");
  for (int i = 0; i < kWords; ++i) words.word[i] = word[i];
  *static_cast<Words*>(address) = words;
}

inline void prefetch_l2(const void* address) { (void)*static_cast<const volatile unsigned char*>(address); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                               // subnormal: the sum rounds to 2^-24
    const float sum = __uint_as_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__float_as_uint(sum) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}

inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
  const float scaled = __uint_as_float(magnitude << 13) * 0x1p112f;  // rebiases the exponent, subnormals included
  return __uint_as_float(sign | __float_as_uint(scaled));
}

inline void add_release(uint32_t* counter, uint32_t value) {
  simt::atomic_point();
  __atomic_fetch_add(counter, value, __ATOMIC_RELEASE);
}

inline uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  simt::atomic_point();
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
}

inline uint32_t load_acquire(const uint32_t* counter) {
  simt::atomic_point();
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

inline void add_now(float& sum, float term) { sum += term; }

inline float to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return __uint_as_float((bits + 0x1000u) & 0xffffe000u);
}

// sum + products, which are exact: of numbers with at most 11 bits.
//
// The order and the rounding of a tensor core's sum are not documented.  Plainly, one float addition after the other.
// With SIMT_TENSOR_CORES as has been measured of several generations (Fasi, Higham, Mikaitis, Pranesh 2021): all terms
// are aligned to the largest one and cut there, with two bits more than a float has, and so is their sum.  What a sum
// cut toward zero does beyond the largest float is known to nobody outside: here it stops there, which a kernel that
// looks for infinity would not notice.
template <int kCount>
float sum_of_products(const float (&products)[kCount], float sum) {
#if defined(SIMT_TENSOR_CORES)
  constexpr int kBits = 24 + 2;
  double terms[kCount + 1] = {sum};
  int exponent = -1022;
  for (int k = 0; k < kCount; ++k) terms[k + 1] = products[k];
  bool finite = true;
  for (double term : terms) {
    finite = finite && std::isfinite(term);
    if (finite && term != 0) exponent = std::max(exponent, std::ilogb(term));
  }
  if (finite) {
    double total = 0;  // of whole numbers below 2^31: exact
    for (double term : terms) total += std::trunc(std::ldexp(term, kBits - 1 - exponent));
    if (total == 0) return 0.0f;
    const int cut = std::max(std::ilogb(total) - 23, 0);
    total = std::ldexp(std::trunc(std::ldexp(total, -cut)), cut + exponent - (kBits - 1));
    constexpr double kLargest = 3.4028234663852886e38;
    return static_cast<float>(std::min(std::max(total, -kLargest), kLargest));
  }
#endif
  float all = 0.0f;
  for (float product : products) all += product;
  return sum + all;
}

inline void mma_m16n8k8_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
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
                             float products[8];
                             for (int k = 0; k < 8; ++k) products[k] = left[row][k] * right[k][column];
                             o->d[i] = sum_of_products(products, o->d[i]);
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
}

inline uint32_t pack_bfloat16(float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}

// ldmatrix.x4: lane 8 i + r names row r of matrix i; a lane gets two neighbours of a row, or, transposed, of a column.
template <bool kTransposed>
inline void load_four_matrices(uint32_t (&m)[4], const uint16_t* row, simt::Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("ldmatrix of a row that is not on 16 bytes");
  struct alignas(16) Row {
    uint16_t element[8];
  };
  struct Operands {
    uint32_t* m;
    Row row;  // read by the lane that names it: who writes it must have met this lane before
  } mine{m, *reinterpret_cast<const Row*>(row)};
  simt::warp_operation(
      0xffffffffu, &mine,
      [](void* const lanes[32], uint32_t) {
        for (int i = 0; i < 4; ++i) {
          for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const auto at = [&](int along) -> uint32_t {
              const int r = kTransposed ? along : g, c = kTransposed ? g : along;
              return static_cast<const Operands*>(lanes[8 * i + r])->row.element[c];
            };
            static_cast<Operands*>(lanes[lane])->m[i] = at(2 * t) | at(2 * t + 1) << 16;
          }
        }
      },
      site);
}

inline void load_matrices(uint32_t (&m)[4], const uint16_t* row) {
  load_four_matrices<false>(m, row, {__builtin_FILE(), __builtin_LINE()});
}

inline void load_matrices_transposed(uint32_t (&m)[4], const uint16_t* row) {
  load_four_matrices<true>(m, row, {__builtin_FILE(), __builtin_LINE()});
}

template <bool kBFloat16>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine{d, a, {b0, b1}};
  simt::warp_operation(0xffffffffu, &mine,
                       [](void* const lanes[32], uint32_t) {
                         const auto value = [](uint32_t pair, int half) {
                           const uint32_t bits = pair >> (16 * half) & 0xffffu;
                           return kBFloat16 ? __uint_as_float(bits << 16)
                                            : float16_to_float(static_cast<uint16_t>(bits));
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
                             float products[16];
                             for (int k = 0; k < 16; ++k) products[k] = left[row][k] * right[k][column];
                             o->d[i] = sum_of_products(products, o->d[i]);
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
}

inline bool by_warpgroups(bool wanted) { return wanted; }
inline void keep_order() {}
inline void publish_to_warpgroups() {}
inline void begin_warpgroup_products() {}
inline void end_warpgroup_products() {}

// A warp at a time: the 16 rows of each depend on no other warp.
template <bool kTransposed>
inline void wgmma_m64n32k16(float (&d)[16], const uint32_t (&a)[4], const uint16_t* b, bool adds) {
  const auto start = reinterpret_cast<uintptr_t>(b);
  if (start % 512 != 0 && (kTransposed || start % 512 != 32)) simt::fail("wgmma of a matrix that is not on 512 bytes");
  struct Operands {
    float* d;
    const uint32_t* a;
    uintptr_t b;
    bool adds;
    uint16_t half_row[16];  // of B, a part that each lane reads
  } mine{d, a, start, adds, {}};
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = 0; i < 16; ++i) {
    const int k = lane / 2, n = lane % 2 * 16 + i, row = kTransposed ? k : n, column = kTransposed ? n : k;
    uintptr_t at = start + static_cast<uintptr_t>(row * 64 + column * 2);
    at ^= at >> 3 & 0x30;  // 64-byte swizzle, of the address
    mine.half_row[i] = *reinterpret_cast<const uint16_t*>(at);
  }
  simt::warp_operation(0xffffffffu, &mine,
                       [](void* const lanes[32], uint32_t) {
                         const auto value = [](uint32_t bits) { return __uint_as_float(bits << 16); };
                         float left[16][16], right[16][32];
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           for (int i = 0; i < 8; ++i) {
                             left[lane / 4 + i / 2 % 2 * 8][2 * (lane % 4) + i % 2 + i / 4 * 8] =
                                 value(o->a[i / 2] >> (16 * (i % 2)) & 0xffffu);
                           }
                         }
                         const auto* first = static_cast<const Operands*>(lanes[0]);
                         for (int k = 0; k < 16; ++k) {
                           for (int n = 0; n < 32; ++n) {
                             const auto* o = static_cast<const Operands*>(lanes[2 * k + n / 16]);
                             right[k][n] = value(o->half_row[n % 16]);
                           }
                         }
                         for (int lane = 0; lane < 32; ++lane) {
                           const auto* o = static_cast<const Operands*>(lanes[lane]);
                           if (o->b != first->b || o->adds != first->adds) simt::fail("wgmma with several operands");
                           for (int i = 0; i < 16; ++i) {
                             const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                             float products[16];
                             for (int k = 0; k < 16; ++k) products[k] = left[row][k] * right[k][column];
                             o->d[i] = sum_of_products(products, o->adds ? o->d[i] : 0.0f);
                           }
                         }
                       },
                       {__builtin_FILE(), __builtin_LINE()});
}

}  // namespace consistency_ops
