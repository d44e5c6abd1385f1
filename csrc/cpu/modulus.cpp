// |x| and its backward.
//
// Both are bound by memory: forward reads and writes every element once and adds one bit, backward does the same with
// the gradient.  A real number is treated as an integer: taking |x| clears its top bit, and x is strictly negative
// (neither -0 nor NaN) exactly when its bits, read as a signed integer, lie in (lowest, -Inf], which is one range check
// for every format and does not depend on how the processor treats subnormals.
#include "consistency_ops/modulus.h"

#include "cpu/chunk_kernels.h"
#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace consistency_ops {
namespace {

constexpr int64_t kTaskElements = 1 << 15;  // multiple of 8: a task owns whole bytes of signs

// Bits of -Inf, as a signed integer.
template <typename I, bool kHalf>
constexpr I kMinusInf = sizeof(I) == 8   ? static_cast<I>(0xFFF0000000000000u)
                        : sizeof(I) == 4 ? static_cast<I>(0xFF800000u)
                        : kHalf          ? static_cast<I>(0xFC00)
                                         : static_cast<I>(0xFF80);
template <typename I>
constexpr I kLowest = static_cast<I>(uint64_t{1} << (8 * sizeof(I) - 1));

// Kernels of one instruction set for n elements that start on a byte of signs.
struct Real {
  void (*forward)(const void* x, void* y, uint8_t* signs, int64_t n);
  void (*backward)(const void* grad, const uint8_t* signs, void* grad_x, int64_t n);
};
struct Complex {
  void (*forward)(const void* x, void* y, int64_t n);
  void (*backward)(const void* grad, const void* x, void* grad_x, int64_t n);
};
struct Table {
  Real real[4];        // by DType
  Complex complex[2];  // by DType
};

#define CO_KERNELS "cpu/modulus.inl"
#include "cpu/each_isa.inl"

const Table& kernels() { return CO_BEST(kTable); }

// body(first element, first byte of signs, elements) for pieces that each own whole bytes.
template <typename Body>
void run_rows(const ThreadPool& pool, int64_t rows, int64_t row_length, const Body& body) {
  if (row_length % 8 == 0) {  // rows follow each other in the bits too
    row_length *= rows;
    rows = 1;
  }
  const int64_t row_bytes = (row_length + 7) / 8, pieces = (row_length + kTaskElements - 1) / kTaskElements;
  const int64_t rows_per_task = pieces > 1 || row_length == 0 ? 1 : kTaskElements / row_length;
  const int64_t row_tasks = (rows + rows_per_task - 1) / rows_per_task;
  cpu::run_tasks(pool, row_tasks * pieces, [&](int64_t task) {
    const int64_t first = task / pieces * rows_per_task, begin = task % pieces * kTaskElements;
    const int64_t last = first + rows_per_task < rows ? first + rows_per_task : rows;
    const int64_t length = row_length - begin < kTaskElements ? row_length - begin : kTaskElements;
    for (int64_t row = first; row < last; ++row) body(row * row_length + begin, row * row_bytes + begin / 8, length);
  });
}

template <typename Body>
void run_flat(const ThreadPool& pool, int64_t numel, const Body& body) {
  run_rows(pool, 1, numel, [&](int64_t element, int64_t, int64_t count) { body(element, count); });
}

const char* at(const void* p, int64_t bytes) { return static_cast<const char*>(p) + bytes; }
char* at(void* p, int64_t bytes) { return static_cast<char*>(p) + bytes; }
int index(DType dtype) { return static_cast<int>(dtype); }

}  // namespace

Status modulus_cpu(const ModulusParams& p, const ThreadPool& pool) {
  if (p.rows < 0 || p.row_length < 0) return Status::kInvalidArgument;
  const Real& kernel = kernels().real[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_rows(pool, p.rows, p.row_length, [&](int64_t element, int64_t byte, int64_t count) {
    kernel.forward(at(p.x, element * size), at(p.y, element * size), p.signs ? p.signs + byte : nullptr, count);
  });
  return Status::kOk;
}

Status modulus_backward_cpu(const ModulusBackwardParams& p, const ThreadPool& pool) {
  if (p.rows < 0 || p.row_length < 0) return Status::kInvalidArgument;
  const Real& kernel = kernels().real[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_rows(pool, p.rows, p.row_length, [&](int64_t element, int64_t byte, int64_t count) {
    kernel.backward(at(p.grad, element * size), p.signs + byte, at(p.grad_x, element * size), count);
  });
  return Status::kOk;
}

Status complex_modulus_cpu(const ComplexModulusParams& p, const ThreadPool& pool) {
  if (p.numel < 0 || index(p.dtype) > index(DType::kFloat64)) return Status::kInvalidArgument;
  const Complex& kernel = kernels().complex[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_flat(pool, p.numel, [&](int64_t element, int64_t count) {
    kernel.forward(at(p.x, 2 * element * size), at(p.y, element * size), count);
  });
  return Status::kOk;
}

Status complex_modulus_backward_cpu(const ComplexModulusBackwardParams& p, const ThreadPool& pool) {
  if (p.numel < 0 || index(p.dtype) > index(DType::kFloat64)) return Status::kInvalidArgument;
  const Complex& kernel = kernels().complex[index(p.dtype)];
  const int64_t size = element_size(p.dtype);
  run_flat(pool, p.numel, [&](int64_t element, int64_t count) {
    kernel.backward(at(p.grad, element * size), at(p.x, 2 * element * size), at(p.grad_x, 2 * element * size), count);
  });
  return Status::kOk;
}

}  // namespace consistency_ops
