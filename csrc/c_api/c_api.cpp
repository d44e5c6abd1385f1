// The C interface (c_api.h): the launchers, and LAPACK's storage to panels and back, around the chunk kernels.
#include "consistency_ops/c_api.h"

#include <algorithm>

#include "c_api/structs.h"
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

using c_api::code;
using c_api::known;
using c_api::type;

ThreadPool pool_of(const co_thread_pool* from) {
  ThreadPool pool;
  if (from != nullptr && from->run != nullptr) {
    pool.run = from->run;
    pool.context = from->context;
    pool.threads = from->threads;
  }
  return pool;
}

// numel elements as one row: without elements there is no row.
int64_t rows_of(int64_t numel) { return numel == 0 ? 0 : 1; }

}  // namespace

int32_t co_version(void) {
  return CONSISTENCY_OPS_VERSION_MAJOR * 10000 + CONSISTENCY_OPS_VERSION_MINOR * 100 + CONSISTENCY_OPS_VERSION_PATCH;
}

const char* co_cpu_isa(void) { return cpu::isa_name(); }

int co_set_cpu_isa(const char* name) { return name != nullptr && cpu::use_isa(name) ? 0 : CO_ERROR_INVALID_ARGUMENT; }

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

int co_sample_rows(int64_t rows, int64_t max_rows, uint64_t seed, uint64_t step, uint32_t layer, int64_t* count,
                   int64_t* rows_out) {
  if (rows < 0 || max_rows < 1 || count == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  const RowSample sample = sample_rows(rows, max_rows);
  *count = sample.count;
  if (rows_out != nullptr) draw_rows({seed, step, layer, 0, sample.stride, rows}, 0, sample.count, 0, rows_out);
  return 0;
}

int co_precondition_cpu(const co_precondition_layer* layers, int64_t count, const co_precondition_options* options,
                        const co_thread_pool* pool) {
  return c_api::with_layers<int>(layers, count, options,
                                 [&](const PreconditionLayer* described, const PreconditionOptions& chosen) {
                                   return code(precondition_cpu(described, count, chosen, pool_of(pool)));
                                 });
}

int64_t co_precondition_workspace_cpu(const co_precondition_layer* layers, int64_t count,
                                      const co_precondition_options* options, int32_t threads) {
  return c_api::with_layers<int64_t>(layers, count, options,
                                     [&](const PreconditionLayer* described, const PreconditionOptions& chosen) {
                                       return precondition_workspace_cpu(described, count, chosen, threads);
                                     });
}

int co_modulus_cpu(int32_t dtype, int64_t numel, const void* x, void* y, uint8_t* signs, const co_thread_pool* pool) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(modulus_cpu({x, y, signs, rows_of(numel), numel, type(dtype)}, pool_of(pool)));
}

int co_modulus_backward_cpu(int32_t dtype, int64_t numel, const void* grad, const uint8_t* signs, void* grad_x,
                            const co_thread_pool* pool) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(modulus_backward_cpu({grad, signs, grad_x, rows_of(numel), numel, type(dtype)}, pool_of(pool)));
}

int co_complex_modulus_cpu(int32_t dtype, int64_t numel, const void* x, void* y, const co_thread_pool* pool) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(complex_modulus_cpu({x, y, numel, type(dtype)}, pool_of(pool)));
}

int co_complex_modulus_backward_cpu(int32_t dtype, int64_t numel, const void* grad, const void* x, void* grad_x,
                                    const co_thread_pool* pool) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(complex_modulus_backward_cpu({grad, x, grad_x, numel, type(dtype)}, pool_of(pool)));
}

int co_batch_rms_norm_denominator_cpu(int32_t dtype, const void* x, const co_channel_view* view, int32_t running_dtype,
                                      void* running_ms, int64_t* num_batches, int32_t denominator_dtype,
                                      void* denominator, double decay, double eps, const co_thread_pool* pool) {
  if (!known(dtype) || !known(running_dtype) || !known(denominator_dtype) || view == nullptr) {
    return CO_ERROR_INVALID_ARGUMENT;
  }
  return code(batch_rms_norm_denominator_cpu({x, c_api::view_of(*view), type(dtype), running_ms, type(running_dtype),
                                              num_batches, denominator, type(denominator_dtype), decay, eps},
                                             pool_of(pool)));
}

int co_channel_divide_cpu(int32_t dtype, const void* x, const co_channel_view* x_view, void* y,
                          const co_channel_view* y_view, const void* denominator, const co_thread_pool* pool) {
  if (!known(dtype) || x_view == nullptr || y_view == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  return code(channel_divide_cpu({x, c_api::view_of(*x_view), y, c_api::view_of(*y_view), type(dtype), denominator},
                                 pool_of(pool)));
}
