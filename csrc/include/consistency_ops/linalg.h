// Batched inverse and solve of symmetric positive definite matrices of at most kMaxChunk rows.
//
// Only the lower triangle of A is read, the diagonal included.  A matrix that is not positive definite, or not finite,
// leaves its own result full of NaN and its `info`; the others are computed as if it were not there.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops {

struct SpdParams {
  int64_t batch;  // matrices
  int64_t n;      // rows of a matrix, 0 .. kMaxChunk
  int64_t nrhs;   // columns of b; the inverse has none
  DType dtype;    // of everything: kFloat32, or on the CPU kFloat64
  const void* a;  // element (i, j) of matrix m is at m * a_batch + i * a_row + j * a_column
  int64_t a_batch, a_row, a_column;
  const void* b;  // likewise, n x nrhs; null for the inverse.  Batch strides may be 0
  int64_t b_batch, b_row, b_column;
  void* result;   // dense and row-major: [batch, n, n] or [batch, n, nrhs]
  int32_t* info;  // [batch]: 0, or the order of the first leading minor that is not positive and finite, as LAPACK
};

Status spd_inverse_cpu(const SpdParams& params, const ThreadPool& pool);
Status spd_solve_cpu(const SpdParams& params, const ThreadPool& pool);  // A X = B, by substitution

}  // namespace consistency_ops
