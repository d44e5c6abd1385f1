// Element types to and from the type that is computed in, for one instruction set; included like chunk_kernels.inl,
// same rules.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline uint32_t to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(BFloat16 x) { return from_bits(uint32_t{x.bits} << 16); }
// Moving the exponent by a product with 2^112 also normalises the subnormals of half.
static inline float widen(Float16 x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7FFFu} << 13;
  const uint32_t finite = to_bits(from_bits(magnitude) * 5.192296858534828e33f);
  const uint32_t bits = magnitude >= 0x0F800000u ? magnitude | 0x7F800000u : finite;
  return from_bits(bits | uint32_t{x.bits & 0x8000u} << 16);
}

template <typename S, typename T>
static inline S narrow(T x);
template <>
inline float narrow<float, float>(float x) {
  return x;
}
template <>
inline float narrow<float, double>(double x) {
  return static_cast<float>(x);
}
template <>
inline double narrow<double, double>(double x) {
  return x;
}
template <>
inline double narrow<double, float>(float x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16, float>(float x) {  // to nearest even; NaN stays NaN
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
}
template <>
inline Float16 narrow<Float16, float>(float x) {  // to nearest even, by letting the adder round at the last bit of half
  const uint32_t sign = to_bits(x) & 0x80000000u, magnitude = to_bits(x) & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 and above, Inf, NaN
    half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(half | sign >> 16)};
}
template <>
inline BFloat16 narrow<BFloat16, double>(double x) {
  return narrow<BFloat16>(static_cast<float>(x));
}
template <>
inline Float16 narrow<Float16, double>(double x) {
  return narrow<Float16>(static_cast<float>(x));
}

template <typename T, int kLength>
struct PackOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLength)));
  // Where it lies: memcpy between such a vector and memory becomes moves of pairs through general registers.
  typedef T loose __attribute__((vector_size(sizeof(T) * kLength), aligned(alignof(T)), may_alias));
};

// kLength values at once; compilers do not find the vector form of the rounding by themselves.
template <int kLength, typename S, typename T>
static inline __attribute__((always_inline)) void narrow_all(const T* from, S* to) {
  S values[kLength];
  for (int i = 0; i < kLength; ++i) values[i] = narrow<S>(from[i]);
  __builtin_memcpy(to, values, sizeof(values));
}
template <int kLength>
static inline __attribute__((always_inline)) void narrow_all(const float* from, BFloat16* to) {
  if constexpr (kLength >= 4) {
    using Words = typename PackOf<uint32_t, kLength>::type;
    using Halves = typename PackOf<uint16_t, kLength>::type;
    Words bits;
    __builtin_memcpy(&bits, from, sizeof(bits));
    const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const Words words = (bits & 0x7FFFFFFFu) > 0x7F800000u ? Words{} + 0x7FC0u : rounded;
    const Halves halves = __builtin_convertvector(words, Halves);
    __builtin_memcpy(to, &halves, sizeof(halves));
  } else {
    for (int i = 0; i < kLength; ++i) to[i] = narrow<BFloat16>(from[i]);
  }
}
