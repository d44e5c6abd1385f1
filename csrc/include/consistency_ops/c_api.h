/* The C interface: every symbol has C linkage and needs neither torch nor Python nor C++.  c_api_cuda.h has the CUDA
 * launchers.  Complete programs: tests/cpp/launchers.c, launchers_cuda.c and cholesky.c.
 *
 * Ownership.  Structs are plain data and own nothing; zero them first (`co_precondition_layer layer = {0};`).  Structs
 *   and arrays of structs may go when the call has returned.  The memory they point to is the caller's; outputs must
 *   not overlap each other or inputs, except where a comment says "may be x".
 * Layout.  Sizes and strides count elements.  Data is aligned to its element; strides are not negative, and zero only
 *   where several elements are meant to be one.
 * Workspace.  A _cpu launcher allocates what it needs and frees it before it returns.
 * Threads.  All functions are thread-safe, on data that do not overlap; results do not depend on the number of threads,
 *   bit for bit.  The only global state is co_set_cpu_isa.
 * Errors.  Functions return 0, or one of the negative codes below, and then have written nothing; they never print,
 *   throw or exit.  Data is never an error: Inf, NaN and matrices that cannot be factored are reported in `info`. */
#ifndef CONSISTENCY_OPS_C_API_H_
#define CONSISTENCY_OPS_C_API_H_

#include <stdbool.h>
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
#define CO_ERROR_TOO_LARGE (-2)     /* n > 256: not handled natively */
#define CO_ERROR_OUT_OF_MEMORY (-3) /* of the host */
#define CO_ERROR_LAUNCH_FAILED (-4) /* CUDA: a kernel could not be queued; c_api_cuda.h */

/* Element types. */
#define CO_FLOAT32 0
#define CO_FLOAT64 1
#define CO_BFLOAT16 2
#define CO_FLOAT16 3

/* Version of the library, major * 10000 + minor * 100 + patch. */
CO_API int32_t co_version(void);

/* The instruction set that the CPU kernels use here: "amx", "avx512bf16", "avx512", "avx2" or "portable". */
CO_API const char* co_cpu_isa(void);

/* Use another instruction set from now on, for the whole process; for tests and measurements.  Invalid argument if this
 * machine lacks it.  "amx_model": the kernels of "amx" with its instructions in plain C++, slow, on any machine. */
CO_API int co_set_cpu_isa(const char* name);

/* ---- The chunk kernels alone.  As LAPACK: column-major, the lower triangle, only that triangle read or written. */

/* A = L L^T of the symmetric positive definite n x n matrix a, L over the lower triangle of a.  *info is 0, or the
 * order k of the first leading minor that is not positive definite (NaN counts), in which case the columns from k on,
 * rounded down to a multiple of 16, are as they were. 0 <= n <= 256, lda >= max(1, n). */
CO_API int co_cholesky_f32(int64_t n, float* a, int64_t lda, int32_t* info);
CO_API int co_cholesky_f64(int64_t n, double* a, int64_t lda, int32_t* info);

/* B <- (L L^T)^-1 B for nrhs right-hand sides, b is n x nrhs column-major, ldb >= max(1, n). */
CO_API int co_cholesky_solve_f32(int64_t n, int64_t nrhs, const float* l, int64_t lda, float* b, int64_t ldb);
CO_API int co_cholesky_solve_f64(int64_t n, int64_t nrhs, const double* l, int64_t lda, double* b, int64_t ldb);

/* ---- The random choices of the correction: a function of (seed, step, layer) alone, the same on every device. */

/* units_out[p] = the unit at position p of the division drawn from (seed, step, layer); chunk c of ceil(units / chunk)
 * is a run of positions, equal within one.  units_out has `units` entries. */
CO_API int co_division(int64_t units, int64_t chunk, int64_t group, uint64_t seed, uint64_t step, uint32_t layer,
                       int64_t* units_out);

/* *count = how many of `rows` are used, at most max_rows: one of every block of ceil(rows / max_rows), the last of
 * which may be shorter.  rows_out[i] = which row of block i, or NULL; it has *count entries, so ask for the count
 * first, or bring max_rows of them. */
CO_API int co_sample_rows(int64_t rows, int64_t max_rows, uint64_t seed, uint64_t step, uint32_t layer, int64_t* count,
                          int64_t* rows_out);

/* ---- The launchers. */

/* The caller's thread pool.  run(context, tasks, task, argument) calls task(argument, i) once for every i in
 * [0, tasks), on any threads (one after the other is allowed), and returns when all calls have returned; a task does
 * not call `run`.  `threads`: how many tasks to make of the work.  Where a pool is asked for it may be NULL, or `run`
 * may be: everything then happens on the calling thread, as for small problems. */
typedef struct co_thread_pool {
  void (*run)(void* context, int64_t tasks, void (*task)(void* argument, int64_t index), void* argument);
  void* context;
  int32_t threads;
} co_thread_pool;

/* A layer whose gradient is corrected:  A_c = X_c^T X_c / n,  G[:, c] <- G[:, c] (A_c + damping I)^-1  for every chunk
 * c of its units.
 *
 * X has `rows` = product of x_row_size rows; element (r, u) is x[sum_i r_i x_row_stride[i] + u x_unit_stride], where
 * r_i are the digits of r, the last one fastest.  G has outputs x taps rows of `units` elements, the taps in the same
 * manner; a linear layer has one tap.  Unused row and tap dimensions have size 1.  Row-major X [rows, units] and
 * G [outputs, units]: x_row_size {1, 1, 1, rows}, x_row_stride[3] = units, x_unit_stride = 1, g_tap_size {1, 1, 1},
 * g_output_stride = units, g_unit_stride = 1. */
typedef struct co_precondition_layer {
  const void* x;
  int64_t x_row_size[4], x_row_stride[4];
  int64_t x_unit_stride;
  int64_t units; /* without the bias */
  void* g;       /* read and written; NULL where only the covariance is wanted */
  int64_t outputs, g_output_stride, g_unit_stride;
  int64_t g_tap_size[3], g_tap_stride[3];
  /* The bias gradient, one element an output, or NULL.  It is one more unit, with input 1, at index `units`; with
   * several taps every row sees a copy of it and the copies are averaged afterwards. */
  void* bias_grad;
  int64_t bias_stride;
  int32_t x_dtype, g_dtype, bias_dtype;
  bool has_bias; /* the covariance has the bias unit; set with bias_grad, or without any G */
  /* This layer has the rows, the division and so the inverse of the layer before it in the array (query, key and value;
   * gate and up), which are then computed once.  units and has_bias must be those of the layer before; x and its sizes,
   * strides and dtype, permutation, row_count, layer, group, covariance and inverse are not looked at; info and
   * damping_used get what those of the first layer get. */
  bool same_input;
  const int64_t* permutation; /* a bijection of the units (with the bias), or NULL: drawn from (seed, step, layer) */
  const int64_t* row_count;   /* only the first *row_count rows of X are used, or NULL: all */
  uint32_t layer;             /* third argument of the random division */
  int32_t group;              /* consecutive units that are dealt together, 1 .. chunk */
  /* One entry for each of the ceil((units + has_bias) / chunk) chunks, or NULL.  info: 0, or the order of the leading
   * minor that is not positive definite in the last of the tries with rising damping; the gradient of that chunk is
   * then unchanged.  damping_used: the last damping tried. */
  int32_t* info;
  float* damping_used;
  /* For stages that are run apart: [chunks, chunk, chunk] row-major of the compute type, the tail of smaller chunks
   * zero.  NULL in the fused call. */
  void* covariance;
  void* inverse;
} co_precondition_layer;

#define CO_STAGE_COVARIANCE 1 /* X -> covariance */
#define CO_STAGE_FACTOR 2     /* covariance -> inverse, info, damping_used */
#define CO_STAGE_APPLY 4      /* inverse, G -> G */
#define CO_STAGE_ALL 7

typedef struct co_precondition_options {
  double damping;     /* >= 0 */
  bool trace_scaling; /* (A / tau + damping I)^-1, tau = trace(A) / units of the layer, instead of A + damping I */
  bool float64;       /* the compute type is double, not float; set it where any of the data are CO_FLOAT64 */
  int32_t chunk;      /* 1 .. 256 */
  int64_t max_rows;   /* >= 1: how many rows of X are sampled at most */
  uint64_t seed, step;
  int32_t stages; /* CO_STAGE_ALL, or a combination of neighbouring stages */
  /* 0, or 1 with CO_STAGE_FACTOR or CO_STAGE_APPLY alone: `inverse` is L^-1 with A = L L^T (damped), and G is
   * multiplied by the matrices in `inverse` as they are; on CUDA these must be lower triangular. */
  int32_t triangular;
} co_precondition_options;

/* Corrects the gradients of `count` layers.  Reads every X once, reads and writes every G once.
 *
 * CO_ERROR_INVALID_ARGUMENT: an option or a group outside of its bounds; an unknown dtype; covariance, inverse or info
 * NULL where the stages need it; has_bias without bias_grad where there is a G; a negative size; 2^31 - 1 or more units
 * or outputs; same_input of the first layer, or with other units or has_bias than the layer before.  Pointers and
 * strides are taken as they are. */
CO_API int co_precondition_cpu(const co_precondition_layer* layers, int64_t count,
                               const co_precondition_options* options, const co_thread_pool* pool);

/* Bytes that co_precondition_cpu allocates at its peak with `threads` threads; a negative code for a bad argument. */
CO_API int64_t co_precondition_workspace_cpu(const co_precondition_layer* layers, int64_t count,
                                             const co_precondition_options* options, int32_t threads);

/* y_i = |x_i| of numel elements in memory order; y may be x.  signs: ceil(numel / 8) bytes, or NULL; bit i % 8 of byte
 * i / 8 becomes x_i < 0. */
CO_API int co_modulus_cpu(int32_t dtype, int64_t numel, const void* x, void* y, uint8_t* signs,
                          const co_thread_pool* pool);

/* grad_x_i = -grad_i where bit i of signs is set, else grad_i; grad_x may be grad. */
CO_API int co_modulus_backward_cpu(int32_t dtype, int64_t numel, const void* grad, const uint8_t* signs, void* grad_x,
                                   const co_thread_pool* pool);

/* |x| of numel pairs (real, imaginary), as C99's hypot, and its backward grad x / |x| (0 where x is 0).  dtype of the
 * parts: CO_FLOAT32 or CO_FLOAT64. */
CO_API int co_complex_modulus_cpu(int32_t dtype, int64_t numel, const void* x, void* y, const co_thread_pool* pool);
CO_API int co_complex_modulus_backward_cpu(int32_t dtype, int64_t numel, const void* grad, const void* x, void* grad_x,
                                           const co_thread_pool* pool);

/* A tensor as [outer, channels, inner]; (N, C, *spatial) has inner = pixels, (N, C) has inner = 1.  channel_stride or
 * inner_stride must be 1. */
typedef struct co_channel_view {
  int64_t outer, channels, inner;
  int64_t outer_stride, channel_stride, inner_stride;
} co_channel_view;

/* The denominators D of batch RMS normalisation, with v = running_ms:
 *   v_c <- decay v_c + (1 - decay) mean_c(x^2)      if x is given and not empty; counted in *num_batches
 *   D_c  = sqrt(v_c / (1 - decay^num_batches) + eps max_k(v_k + 1e-6))
 * x NULL: evaluation, nothing is updated.  num_batches NULL or 0: v is not corrected.  running_ms and denominator:
 * [channels], CO_FLOAT32 or CO_FLOAT64.  decay in [0, 1), eps > 0. */
CO_API int co_batch_rms_norm_denominator_cpu(int32_t dtype, const void* x, const co_channel_view* view,
                                             int32_t running_dtype, void* running_ms, int64_t* num_batches,
                                             int32_t denominator_dtype, void* denominator, double decay, double eps,
                                             const co_thread_pool* pool);

/* y = x / D, for the forward and for the backward; y may be x.  denominator: [channels], CO_FLOAT64 if dtype is, else
 * CO_FLOAT32. */
CO_API int co_channel_divide_cpu(int32_t dtype, const void* x, const co_channel_view* x_view, void* y,
                                 const co_channel_view* y_view, const void* denominator, const co_thread_pool* pool);

#endif /* CONSISTENCY_OPS_C_API_H_ */
