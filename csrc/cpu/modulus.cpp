// |x| and its backward.
//
// Both are bound by memory: forward reads and writes every element once and adds one bit, backward does the same with
// the gradient.  A real number is treated as an integer: taking |x| clears its top bit, and x is strictly negative
// (neither -0 nor NaN) exactly when its bits, read as a signed integer, lie in (lowest, -Inf], which is one range check
// for every format and does not depend on how the processor treats subnormals.
#include "consistency_ops/modulus.h"

#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace consistency_ops {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // multiple of 8: a task owns whole bytes of signs

// Bits of -Inf, as a signed integer.
template <typename I, bool kHalf>
constexpr I kMinusInf = sizeof(I) == 8   ? static_cast<I>(0xFFF0000000000000u)
                        : sizeof(I) == 4 ? static_cast<I>(0xFF800000u)
                        : kHalf          ? static_cast<I>(0xFC00)
                                         : static_cast<I>(0xFF80);
template <typename I>
constexpr I kLowest = static_cast<I>(uint64_t{1} << (8 * sizeof(I) - 1));

// Kernels of one instruction set for n elements that start on a byte of signs.
struct Real {
  void (*forward)(const void* x, void* y, uint8_t* signs, int64_t n);
  void (*backward)(const void* grad, const uint8_t* signs, void* grad_x, int64_t n);
};
struct Complex {
  void (*forward)(const void* x, void* y, int64_t n);
  void (*backward)(const void* grad, const void* x, void* grad_x, int64_t n);
};
struct Table {
  Real real[4];        // by DType
  Complex complex[2];  // by DType
};

namespace portable {

// Loops that a compiler turns into vectors of whatever width it has.
template <typename I>
struct Wide {
  static uint32_t modulus(const void* x, void* y, I minus_inf) {
    I value[32];
    uint8_t negative[32];
    __builtin_memcpy(value, x, sizeof(value));
    for (int j = 0; j < 32; ++j) {
      negative[j] = static_cast<uint8_t>((value[j] > kLowest<I>)&(value[j] <= minus_inf));
      value[j] = static_cast<I>(value[j] & ~kLowest<I>);
    }
    __builtin_memcpy(y, value, sizeof(value));
    uint32_t word = 0;
    for (int j = 0; j < 32; j += 8) {  // the product gathers eight bytes of 0 or 1 in the top byte
      uint64_t bytes = 0;
      for (int k = 0; k < 8; ++k) bytes |= uint64_t{negative[j + k]} << (8 * k);
      word |= static_cast<uint32_t>(bytes * 0x0102040810204080u >> 56) << j;
    }
    return word;
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    I value[32];
    __builtin_memcpy(value, grad, sizeof(value));
    for (int j = 0; j < 32; j += 8) {
      const I byte = static_cast<I>(word >> j & 0xFF);
      for (int k = 0; k < 8; ++k) {
        value[j + k] = static_cast<I>(value[j + k] ^ ((byte & kBit[k]) != 0 ? kLowest<I> : I{0}));
      }
    }
    __builtin_memcpy(grad_x, value, sizeof(value));
  }
  static constexpr I kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
};

#include "cpu/modulus.inl"

}  // namespace portable

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {

inline __m256i load(const void* p, int v) { return _mm256_loadu_si256(static_cast<const __m256i*>(p) + v); }
inline void store(void* p, int v, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(p) + v, value); }

template <typename I>
struct Wide;

template <>
struct Wide<int16_t> {
  static uint32_t modulus(const void* x, void* y, int16_t minus_inf) {
    const __m256i lowest = _mm256_set1_epi16(kLowest<int16_t>), limit = _mm256_set1_epi16(minus_inf + 1);
    __m256i negative[2];
    for (int v = 0; v < 2; ++v) {
      const __m256i value = load(x, v);
      negative[v] = _mm256_and_si256(_mm256_cmpgt_epi16(value, lowest), _mm256_cmpgt_epi16(limit, value));
      store(y, v, _mm256_andnot_si256(lowest, value));
    }
    // packs works in 128-bit halves; 0xD8 puts the quarters back in order.
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(negative[0], negative[1]), 0xD8);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m256i lowest = _mm256_set1_epi16(kLowest<int16_t>);
    const __m256i bit =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, kLowest<int16_t>);
    for (int v = 0; v < 2; ++v) {
      const __m256i bits = _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(word >> (16 * v))), bit);
      const __m256i sign = _mm256_and_si256(_mm256_cmpeq_epi16(bits, bit), lowest);
      store(grad_x, v, _mm256_xor_si256(load(grad, v), sign));
    }
  }
};

template <>
struct Wide<int32_t> {
  static uint32_t modulus(const void* x, void* y, int32_t minus_inf) {
    const __m256i lowest = _mm256_set1_epi32(kLowest<int32_t>), limit = _mm256_set1_epi32(minus_inf + 1);
    uint32_t word = 0;
    for (int v = 0; v < 4; ++v) {
      const __m256i value = load(x, v);
      const __m256i negative = _mm256_and_si256(_mm256_cmpgt_epi32(value, lowest), _mm256_cmpgt_epi32(limit, value));
      word |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(negative))) << (8 * v);
      store(y, v, _mm256_andnot_si256(lowest, value));
    }
    return word;
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m256i lowest = _mm256_set1_epi32(kLowest<int32_t>);
    const __m256i to_top = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (int v = 0; v < 4; ++v) {
      const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int32_t>(word >> (8 * v))), to_top);
      store(grad_x, v, _mm256_xor_si256(load(grad, v), _mm256_and_si256(bits, lowest)));
    }
  }
};

template <>
struct Wide<int64_t> {
  static uint32_t modulus(const void* x, void* y, int64_t minus_inf) {
    const __m256i lowest = _mm256_set1_epi64x(kLowest<int64_t>), limit = _mm256_set1_epi64x(minus_inf + 1);
    uint32_t word = 0;
    for (int v = 0; v < 8; ++v) {
      const __m256i value = load(x, v);
      const __m256i negative = _mm256_and_si256(_mm256_cmpgt_epi64(value, lowest), _mm256_cmpgt_epi64(limit, value));
      word |= static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(negative))) << (4 * v);
      store(y, v, _mm256_andnot_si256(lowest, value));
    }
    return word;
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m256i lowest = _mm256_set1_epi64x(kLowest<int64_t>);
    const __m256i to_top = _mm256_setr_epi64x(63, 62, 61, 60);
    for (int v = 0; v < 8; ++v) {
      const __m256i bits = _mm256_sllv_epi64(_mm256_set1_epi64x(word >> (4 * v)), to_top);
      store(grad_x, v, _mm256_xor_si256(load(grad, v), _mm256_and_si256(bits, lowest)));
    }
  }
};

#include "cpu/modulus.inl"

}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {

inline __m512i load(const void* p, int v) { return _mm512_loadu_si512(static_cast<const __m512i*>(p) + v); }
inline void store(void* p, int v, __m512i value) { _mm512_storeu_si512(static_cast<__m512i*>(p) + v, value); }

template <typename I>
struct Wide;

template <>
struct Wide<int16_t> {
  static uint32_t modulus(const void* x, void* y, int16_t minus_inf) {
    const __m512i lowest = _mm512_set1_epi16(kLowest<int16_t>), value = load(x, 0);
    store(y, 0, _mm512_and_si512(value, _mm512_set1_epi16(static_cast<int16_t>(~kLowest<int16_t>))));
    return _mm512_mask_cmple_epi16_mask(_mm512_cmpgt_epi16_mask(value, lowest), value, _mm512_set1_epi16(minus_inf));
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m512i sign = _mm512_maskz_set1_epi16(word, kLowest<int16_t>);
    store(grad_x, 0, _mm512_xor_si512(load(grad, 0), sign));
  }
};

template <>
struct Wide<int32_t> {
  static uint32_t modulus(const void* x, void* y, int32_t minus_inf) {
    const __m512i lowest = _mm512_set1_epi32(kLowest<int32_t>), limit = _mm512_set1_epi32(minus_inf);
    uint32_t word = 0;
    for (int v = 0; v < 2; ++v) {
      const __m512i value = load(x, v);
      const __mmask16 signed_ = _mm512_cmpgt_epi32_mask(value, lowest);
      word |= static_cast<uint32_t>(_mm512_mask_cmple_epi32_mask(signed_, value, limit)) << (16 * v);
      store(y, v, _mm512_and_si512(value, _mm512_set1_epi32(~kLowest<int32_t>)));
    }
    return word;
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m512i lowest = _mm512_set1_epi32(kLowest<int32_t>);
    for (int v = 0; v < 2; ++v) {
      const __m512i value = load(grad, v);
      store(grad_x, v, _mm512_mask_xor_epi32(value, static_cast<__mmask16>(word >> (16 * v)), value, lowest));
    }
  }
};

template <>
struct Wide<int64_t> {
  static uint32_t modulus(const void* x, void* y, int64_t minus_inf) {
    const __m512i lowest = _mm512_set1_epi64(kLowest<int64_t>), limit = _mm512_set1_epi64(minus_inf);
    uint32_t word = 0;
    for (int v = 0; v < 4; ++v) {
      const __m512i value = load(x, v);
      const __mmask8 signed_ = _mm512_cmpgt_epi64_mask(value, lowest);
      word |= static_cast<uint32_t>(_mm512_mask_cmple_epi64_mask(signed_, value, limit)) << (8 * v);
      store(y, v, _mm512_and_si512(value, _mm512_set1_epi64(~kLowest<int64_t>)));
    }
    return word;
  }
  static void flip(const void* grad, uint32_t word, void* grad_x) {
    const __m512i lowest = _mm512_set1_epi64(kLowest<int64_t>);
    for (int v = 0; v < 4; ++v) {
      const __m512i value = load(grad, v);
      store(grad_x, v, _mm512_mask_xor_epi64(value, static_cast<__mmask8>(word >> (8 * v)), value, lowest));
    }
  }
};

#include "cpu/modulus.inl"

}  // namespace avx512
#pragma GCC pop_options

#endif  // __x86_64__

const Table& kernels() {
#if defined(__x86_64__)
  if (cpu::isa_level() >= cpu::IsaLevel::kAvx512) return avx512::kTable;
  if (cpu::isa_level() >= cpu::IsaLevel::kAvx2) return avx2::kTable;
#endif
  return portable::kTable;
}

// body(first element, first byte of signs, elements) for pieces that each own whole bytes.
template <typename Body>
void run_rows(const ThreadPool& pool, int64_t rows, int64_t row_length, const Body& body) {
  if (row_length % 8 == 0) {  // rows follow each other in the bits too
    row_length *= rows;
    rows = 1;
  }
  const int64_t row_bytes = (row_length + 7) / 8, pieces = (row_length + kTaskElements - 1) / kTaskElements;
  const int64_t rows_per_task = pieces > 1 || row_length == 0 ? 1 : kTaskElements / row_length;
  const int64_t row_tasks = (rows + rows_per_task - 1) / rows_per_task;
  cpu::run_tasks(pool, row_tasks * pieces, [&](int64_t task) {
    const int64_t first = task / pieces * rows_per_task, begin = task % pieces * kTaskElements;
    const int64_t last = first + rows_per_task < rows ? first + rows_per_task : rows;
    const int64_t length = row_length - begin < kTaskElements ? row_length - begin : kTaskElements;
    for (int64_t row = first; row < last; ++row) body(row * row_length + begin, row * row_bytes + begin / 8, length);
  });
}

template <typename Body>
void run_flat(const ThreadPool& pool, int64_t numel, const Body& body) {
  run_rows(pool, 1, numel, [&](int64_t element, int64_t, int64_t count) { body(element, count); });
}

const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
int index(DType dtype) { return static_cast<int>(dtype); }

}  // namespace

Status modulus_cpu(const ModulusParams& p, const ThreadPool& pool) {
  if (p.rows < 0 || p.row_length < 0) return Status::kInvalidArgument;
  const Real& kernel = kernels().real[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_rows(pool, p.rows, p.row_length, [&](int64_t element, int64_t byte, int64_t count) {
    kernel.forward(at(p.x, element * size), at(p.y, element * size), p.signs ? p.signs + byte : nullptr, count);
  });
  return Status::kOk;
}

Status modulus_backward_cpu(const ModulusBackwardParams& p, const ThreadPool& pool) {
  if (p.rows < 0 || p.row_length < 0) return Status::kInvalidArgument;
  const Real& kernel = kernels().real[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_rows(pool, p.rows, p.row_length, [&](int64_t element, int64_t byte, int64_t count) {
    kernel.backward(at(p.grad, element * size), p.signs + byte, at(p.grad_x, element * size), count);
  });
  return Status::kOk;
}

Status complex_modulus_cpu(const ComplexModulusParams& p, const ThreadPool& pool) {
  if (p.numel < 0 || index(p.dtype) > index(DType::kFloat64)) return Status::kInvalidArgument;
  const Complex& kernel = kernels().complex[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_flat(pool, p.numel, [&](int64_t element, int64_t count) {
    kernel.forward(at(p.x, 2 * element * size), at(p.y, element * size), count);
  });
  return Status::kOk;
}

Status complex_modulus_backward_cpu(const ComplexModulusBackwardParams& p, const ThreadPool& pool) {
  if (p.numel < 0 || index(p.dtype) > index(DType::kFloat64)) return Status::kInvalidArgument;
  const Complex& kernel = kernels().complex[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_flat(pool, p.numel, [&](int64_t element, int64_t count) {
    kernel.backward(at(p.grad, element * size), at(p.x, 2 * element * size), at(p.grad_x, 2 * element * size), count);
  });
  return Status::kOk;
}

}  // namespace consistency_ops
