// The kernels of modulus.cpp for one instruction set; included by each_isa.inl.
// Calls no function of another header (see chunk_kernels.inl).

#include "cpu/modulus_lanes.inl"

// 32 elements, one word of signs, at a time; the tail goes through a buffer of 32.
template <typename I, bool kHalf>
void forward(const void* x, void* y, uint8_t* signs, int64_t n) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(y);
  const int64_t whole = n / 32, rest = n % 32;
  for (int64_t b = 0; b < whole; ++b, from += 32 * sizeof(I), to += 32 * sizeof(I)) {
    const uint32_t word = Wide<I>::modulus(from, to, kMinusInf<I, kHalf>);
    if (signs != nullptr) __builtin_memcpy(signs + 4 * b, &word, 4);
  }
  if (rest > 0) {
    I buffer[32] = {};
    __builtin_memcpy(buffer, from, rest * sizeof(I));
    const uint32_t word = Wide<I>::modulus(buffer, buffer, kMinusInf<I, kHalf>);
    __builtin_memcpy(to, buffer, rest * sizeof(I));
    if (signs != nullptr) __builtin_memcpy(signs + 4 * whole, &word, (rest + 7) / 8);
  }
}

template <typename I>
void backward(const void* grad, const uint8_t* signs, void* grad_x, int64_t n) {
  const char* from = static_cast<const char*>(grad);
  char* to = static_cast<char*>(grad_x);
  const int64_t whole = n / 32, rest = n % 32;
  for (int64_t b = 0; b < whole; ++b, from += 32 * sizeof(I), to += 32 * sizeof(I)) {
    uint32_t word;
    __builtin_memcpy(&word, signs + 4 * b, 4);
    Wide<I>::flip(from, word, to);
  }
  if (rest > 0) {
    I buffer[32] = {};
    uint32_t word = 0;
    __builtin_memcpy(buffer, from, rest * sizeof(I));
    __builtin_memcpy(&word, signs + 4 * whole, (rest + 7) / 8);
    Wide<I>::flip(buffer, word, buffer);
    __builtin_memcpy(to, buffer, rest * sizeof(I));
  }
}

// A power of two that brings the larger part of a + bi near one, so that no square overflows or vanishes, and its
// inverse. Both exponents stay normal, hence the clamp; subnormal parts still come out above 2^-52.
struct Scale {
  double down, up;
};

static inline Scale scale_of(double a, double b) {
  const uint64_t magnitude = ~uint64_t{0} >> 1;
  const uint64_t ua = __builtin_bit_cast(uint64_t, a) & magnitude, ub = __builtin_bit_cast(uint64_t, b) & magnitude;
  uint64_t exponent = (ua > ub ? ua : ub) >> 52;
  exponent = exponent < 1 ? 1 : exponent > 2045 ? 2045 : exponent;
  return {__builtin_bit_cast(double, (2046 - exponent) << 52), __builtin_bit_cast(double, exponent << 52)};
}

static inline bool infinite(double a) { return __builtin_fabs(a) == __builtin_inf(); }

static inline double radius(double a, double b) { return __builtin_sqrt(a * a + b * b); }

// The squares of float fit double with room to spare.
static void complex_forward_f32(const void* x, void* y, int64_t n) {
  const float* from = static_cast<const float*>(x);
  float* to = static_cast<float*>(y);
  for (int64_t i = 0; i < n; ++i) {
    const double a = from[2 * i], b = from[2 * i + 1], r = radius(a, b);
    to[i] = static_cast<float>(infinite(a) || infinite(b) ? __builtin_inf() : r);
  }
}

static void complex_forward_f64(const void* x, void* y, int64_t n) {
  const double* from = static_cast<const double*>(x);
  double* to = static_cast<double*>(y);
  for (int64_t i = 0; i < n; ++i) {
    const double a = from[2 * i], b = from[2 * i + 1];
    const Scale scale = scale_of(a, b);
    const double r = radius(a * scale.down, b * scale.down) * scale.up;
    to[i] = infinite(a) || infinite(b) ? __builtin_inf() : r;
  }
}

static void complex_backward_f32(const void* grad, const void* x, void* grad_x, int64_t n) {
  const float* g = static_cast<const float*>(grad);
  const float* from = static_cast<const float*>(x);
  float* to = static_cast<float*>(grad_x);
  for (int64_t i = 0; i < n; ++i) {
    const double a = from[2 * i], b = from[2 * i + 1], r = radius(a, b);
    const double over = r == 0 ? 0 : r < __builtin_inf() ? g[i] / r : __builtin_nan("");
    to[2 * i] = static_cast<float>(a * over);
    to[2 * i + 1] = static_cast<float>(b * over);
  }
}

static void complex_backward_f64(const void* grad, const void* x, void* grad_x, int64_t n) {
  const double* g = static_cast<const double*>(grad);
  const double* from = static_cast<const double*>(x);
  double* to = static_cast<double*>(grad_x);
  for (int64_t i = 0; i < n; ++i) {
    const Scale scale = scale_of(from[2 * i], from[2 * i + 1]);
    const double a = from[2 * i] * scale.down, b = from[2 * i + 1] * scale.down, r = radius(a, b);
    const double over = r == 0 ? 0 : r < __builtin_inf() ? 1 / r : __builtin_nan("");
    to[2 * i] = a * over * g[i];
    to[2 * i + 1] = b * over * g[i];
  }
}

const Table kTable = {
    {{forward<int32_t, false>, backward<int32_t>},
     {forward<int64_t, false>, backward<int64_t>},
     {forward<int16_t, false>, backward<int16_t>},
     {forward<int16_t, true>, backward<int16_t>}},
    {{complex_forward_f32, complex_backward_f32}, {complex_forward_f64, complex_backward_f64}},
};
