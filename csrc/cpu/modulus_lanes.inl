// How modulus.inl treats 32 elements, for one instruction set; included by it.
//
//   uint32_t Wide<I>::modulus(x, y, minus_inf)   32 absolute values; returns the mask of the negative ones
//   void     Wide<I>::flip(grad, word, grad_x)   32 gradients, negated where word has a bit

#if CO_VECTOR_BYTES == 64

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

#elif CO_VECTOR_BYTES == 32

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

#else

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

#endif
