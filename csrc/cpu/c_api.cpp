// The C interface (c_api.h): LAPACK's storage to panels and back, around the chunk kernels.
#include "consistency_ops/c_api.h"

#include <algorithm>

#include "consistency_ops/random.h"
#include "consistency_ops/types.h"
#include "consistency_ops/version.h"
#include "cpu/chunk_kernels.h"

namespace {

using namespace consistency_ops;
using cpu::kPanel;

// The transpose of the lower triangle, as panels; the rest and the padding are the identity.
template <typename T>
void load_triangle(int64_t n, const T* a, int64_t lda, int panels, T* u) {
  const int64_t height = int64_t{panels} * kPanel;
  std::fill(u, u + height * height, T(0));
  for (int64_t j = 0; j < height; ++j) {
    T* column = u + j / kPanel * height * kPanel + j % kPanel;
    if (j >= n) {
      column[j * kPanel] = 1;
      continue;
    }
    for (int64_t i = 0; i <= j; ++i) column[i * kPanel] = a[i * lda + j];
  }
}

template <typename T>
struct alignas(64) Matrix {
  T elements[kMaxChunk * kMaxChunk];
};

template <typename T>
int check(int64_t n, int64_t lda) {
  if (n < 0 || lda < std::max<int64_t>(1, n)) return CO_ERROR_INVALID_ARGUMENT;
  return n > kMaxChunk ? CO_ERROR_TOO_LARGE : 0;
}

template <typename T>
int cholesky(int64_t n, T* a, int64_t lda, int32_t* info) {
  const int error = check<T>(n, lda);
  if (error != 0) return error;
  if (info == nullptr || (a == nullptr && n > 0)) return CO_ERROR_INVALID_ARGUMENT;
  *info = 0;
  if (n == 0) return 0;
  const int panels = static_cast<int>((n + kPanel - 1) / kPanel);
  const int64_t height = int64_t{panels} * kPanel;
  static thread_local Matrix<T> u;
  alignas(64) T inverse_diagonal[kMaxChunk];
  load_triangle(n, a, lda, panels, u.elements);
  *info = cpu::isa_kernels<T>().chunk.factor(u.elements, panels, inverse_diagonal);
  const int64_t columns = *info == 0 ? n : (*info - 1) / kPanel * kPanel;  // row k of U is column k of L
  for (int64_t j = 0; j < n; ++j) {
    const T* column = u.elements + j / kPanel * height * kPanel + j % kPanel;
    for (int64_t i = 0; i <= std::min(j, columns - 1); ++i) a[i * lda + j] = column[i * kPanel];
  }
  return 0;
}

template <typename T>
int cholesky_solve(int64_t n, int64_t nrhs, const T* l, int64_t lda, T* b, int64_t ldb) {
  const int error = check<T>(n, lda);
  if (nrhs < 0 || ldb < std::max<int64_t>(1, n)) return CO_ERROR_INVALID_ARGUMENT;
  if (error != 0) return error;
  if (n == 0 || nrhs == 0) return 0;
  if (l == nullptr || b == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  const int panels = static_cast<int>((n + kPanel - 1) / kPanel);
  static thread_local Matrix<T> u;
  alignas(64) T inverse_diagonal[kMaxChunk];
  alignas(64) T right[kMaxChunk * kPanel];
  load_triangle(n, l, lda, panels, u.elements);
  const int64_t height = int64_t{panels} * kPanel;
  for (int64_t k = 0; k < height; ++k) {
    inverse_diagonal[k] = 1 / u.elements[k / kPanel * height * kPanel + k * kPanel + k % kPanel];
  }
  for (int64_t first = 0; first < nrhs; first += kPanel) {
    const int64_t here = std::min<int64_t>(kPanel, nrhs - first);
    std::fill(right, right + height * kPanel, T(0));
    for (int64_t c = 0; c < here; ++c) {
      for (int64_t k = 0; k < n; ++k) right[k * kPanel + c] = b[(first + c) * ldb + k];
    }
    cpu::isa_kernels<T>().chunk.solve(u.elements, inverse_diagonal, panels, right);
    for (int64_t c = 0; c < here; ++c) {
      for (int64_t k = 0; k < n; ++k) b[(first + c) * ldb + k] = right[k * kPanel + c];
    }
  }
  return 0;
}

}  // namespace

int32_t co_version(void) {
  return CONSISTENCY_OPS_VERSION_MAJOR * 10000 + CONSISTENCY_OPS_VERSION_MINOR * 100 + CONSISTENCY_OPS_VERSION_PATCH;
}

int co_cholesky_f32(int64_t n, float* a, int64_t lda, int32_t* info) { return cholesky(n, a, lda, info); }
int co_cholesky_f64(int64_t n, double* a, int64_t lda, int32_t* info) { return cholesky(n, a, lda, info); }

int co_cholesky_solve_f32(int64_t n, int64_t nrhs, const float* l, int64_t lda, float* b, int64_t ldb) {
  return cholesky_solve(n, nrhs, l, lda, b, ldb);
}
int co_cholesky_solve_f64(int64_t n, int64_t nrhs, const double* l, int64_t lda, double* b, int64_t ldb) {
  return cholesky_solve(n, nrhs, l, lda, b, ldb);
}

int co_division(int64_t units, int64_t chunk, int64_t group, uint64_t seed, uint64_t step, uint32_t layer,
                int64_t* units_out) {
  if (units < 0 || chunk < 1 || group < 1 || (units > 0 && units_out == nullptr)) return CO_ERROR_INVALID_ARGUMENT;
  if (units == 0) return 0;
  const Division division = make_division(units, chunk, group, seed, step, layer);
  for (int64_t p = 0; p < units; ++p) units_out[p] = unit_at(division, p);
  return 0;
}

int co_sample_rows(int64_t rows, int64_t max_rows, uint64_t seed, uint64_t step, uint32_t layer, int64_t* out) {
  if (rows < 0 || max_rows < 1 || out == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  const RowSample sample = sample_rows(rows, max_rows, seed, step, layer);
  out[0] = sample.offset;
  out[1] = sample.stride;
  out[2] = sample.count;
  return 0;
}
