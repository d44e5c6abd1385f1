/* The C interface: every symbol has C linkage and needs neither torch nor Python nor C++.
 *
 * The two chunk kernels follow LAPACK: column-major storage, the lower triangle, and only that triangle is read or
 * written. Functions return 0, or one of the negative codes below; they never print, throw or exit.  All are
 * thread-safe. */
#ifndef CONSISTENCY_OPS_C_API_H_
#define CONSISTENCY_OPS_C_API_H_

#include <stdint.h>

#if defined(__cplusplus)
#define CO_EXTERN_C extern "C"
#else
#define CO_EXTERN_C
#endif
#if defined(__GNUC__)
#define CO_API CO_EXTERN_C __attribute__((visibility("default")))
#else
#define CO_API CO_EXTERN_C
#endif

#define CO_ERROR_INVALID_ARGUMENT (-1)
#define CO_ERROR_TOO_LARGE (-2) /* n > 256: not handled natively */

/* Version of the library, major * 10000 + minor * 100 + patch. */
CO_API int32_t co_version(void);

/* The instruction set that the CPU kernels use here: "avx512bf16", "avx512", "avx2" or "portable". */
CO_API const char* co_cpu_isa(void);

/* Use another instruction set from now on, for the whole process; for tests and measurements.  Invalid argument if this
 * machine lacks it. */
CO_API int co_set_cpu_isa(const char* name);

/* A = L L^T of the symmetric positive definite n x n matrix a, L over the lower triangle of a.  *info is 0, or the
 * order k of the first leading minor that is not positive definite (NaN counts), in which case the columns from k on,
 * rounded down to a multiple of 16, are as they were. 0 <= n <= 256, lda >= max(1, n). */
CO_API int co_cholesky_f32(int64_t n, float* a, int64_t lda, int32_t* info);
CO_API int co_cholesky_f64(int64_t n, double* a, int64_t lda, int32_t* info);

/* B <- (L L^T)^-1 B for nrhs right-hand sides, b is n x nrhs column-major, ldb >= max(1, n). */
CO_API int co_cholesky_solve_f32(int64_t n, int64_t nrhs, const float* l, int64_t lda, float* b, int64_t ldb);
CO_API int co_cholesky_solve_f64(int64_t n, int64_t nrhs, const double* l, int64_t lda, double* b, int64_t ldb);

/* units_out[p] = the unit at position p of the division drawn from (seed, step, layer); chunk c of ceil(units / chunk)
 * is a run of positions, equal within one.  units_out has `units` entries. */
CO_API int co_division(int64_t units, int64_t chunk, int64_t group, uint64_t seed, uint64_t step, uint32_t layer,
                       int64_t* units_out);

/* out[0..2] = offset, stride, count of the rows sampled from `rows`. */
CO_API int co_sample_rows(int64_t rows, int64_t max_rows, uint64_t seed, uint64_t step, uint32_t layer, int64_t* out);

#endif /* CONSISTENCY_OPS_C_API_H_ */
