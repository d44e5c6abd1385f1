// What mathdx.cu asks of cuBLASDx and cuSolverDx, in the layouts that mathdx.py asks libmathdx for, so that the rest of
// it runs on the CPU.  All threads of a CTA call; as with MathDx, who needs a barrier before or after has one.
#include <cmath>

#include "cuda/convert.cuh"

using namespace consistency_ops;

namespace {

float value(const void* array, int index, bool wide) {
  return wide ? static_cast<const float*>(array)[index] : bfloat16_to_float(static_cast<const uint16_t*>(array)[index]);
}

// c (column-major) <- alpha a b + beta c over 64 rows, a column-major and b row-major.
void gram(int size, bool wide, float alpha, const void* a, const void* b, float beta, float* c) {
  for (int e = static_cast<int>(threadIdx.x); e < size * size; e += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int k = 0; k < 64; ++k) sum += value(a, k * size + e % size, wide) * value(b, k * size + e / size, wide);
    c[e] = alpha * sum + beta * c[e];
  }
}

// c (64, size) <- alpha a b + beta c, all row-major.
void apply(int size, float alpha, const void* a, const void* b, float beta, float* c) {
  for (int e = static_cast<int>(threadIdx.x); e < 64 * size; e += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int k = 0; k < size; ++k) sum += value(a, e / size * size + k, false) * value(b, k * size + e % size, false);
    c[e] = alpha * sum + beta * c[e];
  }
}

// a (column-major, lower) <- its Cholesky factor, b (column-major) <- a^-1 b.
void posv(int n, float* a, float* b, int* info) {
  if (threadIdx.x == 0) {
    for (int j = 0; j < n && *info == 0; ++j) {
      double pivot = a[j * n + j];
      for (int k = 0; k < j; ++k) pivot -= double{a[k * n + j]} * a[k * n + j];
      if (!(pivot > 0)) {
        *info = j + 1;
        break;
      }
      a[j * n + j] = static_cast<float>(std::sqrt(pivot));
      for (int i = j + 1; i < n; ++i) {
        double sum = a[j * n + i];
        for (int k = 0; k < j; ++k) sum -= double{a[k * n + i]} * a[k * n + j];
        a[j * n + i] = static_cast<float>(sum / a[j * n + j]);
      }
    }
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= n || *info != 0) return;
  float* x = b + column * n;
  for (int i = 0; i < n; ++i) {
    double sum = x[i];
    for (int k = 0; k < i; ++k) sum -= double{a[k * n + i]} * x[k];
    x[i] = static_cast<float>(sum / a[i * n + i]);
  }
  for (int i = n - 1; i >= 0; --i) {
    double sum = x[i];
    for (int k = i + 1; k < n; ++k) sum -= double{a[i * n + k]} * x[k];
    x[i] = static_cast<float>(sum / a[i * n + i]);
  }
}

}  // namespace

#define STAND_INS(SIZE)                                                                     \
  extern "C" void dx_gram_4_##SIZE(float* alpha, void* a, void* b, float* beta, float* c) { \
    gram(SIZE, true, *alpha, a, b, *beta, c);                                               \
  }                                                                                         \
  extern "C" void dx_gram_2_##SIZE(float* alpha, void* a, void* b, float* beta, float* c) { \
    gram(SIZE, false, *alpha, a, b, *beta, c);                                              \
  }                                                                                         \
  extern "C" void dx_apply_##SIZE(float* alpha, void* a, void* b, float* beta, float* c) {  \
    apply(SIZE, *alpha, a, b, *beta, c);                                                    \
  }                                                                                         \
  extern "C" void dx_posv_##SIZE(float* a, float* b, int* info) { posv(SIZE, a, b, info); }
STAND_INS(64)
STAND_INS(128)
