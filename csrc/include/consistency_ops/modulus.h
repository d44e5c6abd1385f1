// |x|, and the one bit an element that its backward needs.
//
// Buffers are dense: element i is the i-th in memory, whatever the order of the dimensions.  `rows` exists for batched
// bits: every row starts a new byte of signs.  One row is the usual case.
#pragma once

#include "consistency_ops/types.h"

namespace consistency_ops {

// y_i = |x_i|; -0 gives 0 and NaN gives NaN.
struct ModulusParams {
  const void* x;   // [rows, row_length]
  void* y;         // [rows, row_length], may be x
  uint8_t* signs;  // [rows, ceil(row_length / 8)], or nullptr; bit i % 8 of byte i / 8 is x_i < 0, so 0 for -0 and NaN
  int64_t rows, row_length;
  DType dtype;
};

// grad_x_i = -grad_i where the bit of i is set, else grad_i.
struct ModulusBackwardParams {
  const void* grad;      // [rows, row_length]
  const uint8_t* signs;  // [rows, ceil(row_length / 8)]
  void* grad_x;          // [rows, row_length], may be grad
  int64_t rows, row_length;
  DType dtype;
};

// y_i = |x_i| of complex numbers, as C99's hypot: no intermediate overflow or underflow, infinite if one part is.
struct ComplexModulusParams {
  const void* x;  // [numel] pairs (real, imaginary)
  void* y;        // [numel]
  int64_t numel;
  DType dtype;  // of the parts: kFloat32 or kFloat64
};

// grad_x_i = grad_i * x_i / |x_i|; 0 where x_i = 0, NaN where x_i is not finite.
struct ComplexModulusBackwardParams {
  const void* grad;  // [numel], real
  const void* x;     // [numel] pairs
  void* grad_x;      // [numel] pairs
  int64_t numel;
  DType dtype;  // of the parts: kFloat32 or kFloat64
};

Status modulus_cpu(const ModulusParams& params, const ThreadPool& pool);
Status modulus_backward_cpu(const ModulusBackwardParams& params, const ThreadPool& pool);
Status complex_modulus_cpu(const ComplexModulusParams& params, const ThreadPool& pool);
Status complex_modulus_backward_cpu(const ComplexModulusBackwardParams& params, const ThreadPool& pool);

}  // namespace consistency_ops
