// Inverse and solve of symmetric positive definite matrices.
#include "consistency_ops/linalg.h"

#include <tuple>
#include <vector>

#include "bindings/checks.h"
#include "bindings/cuda_scope.h"
#include "bindings/layout.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/linalg_cuda.h"

namespace consistency_ops::bindings {
namespace {

using torch::headeronly::ScalarType;

// One stride that leads from matrix to matrix, or a copy that has one.
int64_t batch_stride(Tensor& matrices) {
  const auto stride_of = [](const Tensor& t, int64_t& stride) {
    stride = 0;
    int64_t count = 1;  // matrices in the dimensions so far, the last first
    for (int64_t d = t.dim() - 2; d-- > 0;) {
      if (t.size(d) == 1) continue;
      if (count == 1) stride = t.stride(d);
      if (t.stride(d) != count * stride) return false;
      count *= t.size(d);
    }
    return true;
  };
  int64_t stride = 0;
  if (!stride_of(matrices, stride)) {
    matrices = contiguous_copy(matrices);
    stride_of(matrices, stride);
  }
  return stride;
}

Tensor set_up(SpdParams& p, Tensor& a, Tensor* b, Tensor& result, const char* op) {
  p.dtype = dtype_of(a, op, "A");
  STD_TORCH_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64, op, ": A must be float32 or float64");
  const int64_t dims = a.dim();
  STD_TORCH_CHECK(dims >= 2 && a.size(dims - 1) == a.size(dims - 2), op, ": A must be batches of square matrices");
  p.n = a.size(dims - 1);
  STD_TORCH_CHECK(p.n <= kMaxChunk, op, ": A must have at most ", kMaxChunk, " rows, got ", p.n);
  std::vector<int64_t> shape(a.sizes().begin(), a.sizes().end() - 2);
  p.batch = 1;
  for (int64_t size : shape) p.batch *= size;
  Tensor info = empty_contiguous(a, shape, ScalarType::Int);
  p.info = static_cast<int32_t*>(info.mutable_data_ptr());
  p.a_batch = batch_stride(a);
  p.a_row = a.stride(dims - 2);
  p.a_column = a.stride(dims - 1);
  p.a = a.const_data_ptr();
  p.nrhs = b == nullptr ? p.n : b->size(dims - 1);
  if (b != nullptr) {
    p.b_batch = batch_stride(*b);
    p.b_row = b->stride(dims - 2);
    p.b_column = b->stride(dims - 1);
    p.b = b->const_data_ptr();
  }
  shape.push_back(p.n);
  shape.push_back(p.nrhs);
  result = empty_contiguous(a, shape, a.scalar_type());
  p.result = result.mutable_data_ptr();
  return info;
}

#if defined(CO_CUDA_KERNELS)
void check_cuda(const SpdParams& p, const char* op) {
  STD_TORCH_CHECK(p.dtype == DType::kFloat32, op, ": float64 has no CUDA kernel");
}
#endif

std::tuple<Tensor, Tensor> spd_inverse(Tensor a) {
  constexpr const char* kOp = "spd_inverse";
  SpdParams params{};
  Tensor inverse;
  const Tensor info = set_up(params, a, nullptr, inverse, kOp);
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(a)) {
    check_cuda(params, kOp);
    const CudaScope scope(a);
    check_status(spd_inverse_cuda(params, scope.device(), scope.stream()), kOp);
    return {inverse, info};
  }
#endif
  check_status(spd_inverse_cpu(params, thread_pool()), kOp);
  return {inverse, info};
}

std::tuple<Tensor, Tensor> spd_solve(Tensor a, Tensor b) {
  constexpr const char* kOp = "spd_solve";
  bool fits = a.dim() >= 2 && b.dim() == a.dim() && a.scalar_type() == b.scalar_type();
  for (int64_t d = 0; fits && d < a.dim() - 1; ++d) fits = a.size(d) == b.size(d);
  STD_TORCH_CHECK(fits, kOp, ": B must have the dtype and the shape of A, but for its last dimension");
  SpdParams params{};
  Tensor result;
  const Tensor info = set_up(params, a, &b, result, kOp);
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(a)) {
    check_cuda(params, kOp);
    const CudaScope scope(a);
    check_status(spd_solve_cuda(params, scope.device(), scope.stream()), kOp);
    return {result, info};
  }
#endif
  check_status(spd_solve_cpu(params, thread_pool()), kOp);
  return {result, info};
}

}  // namespace

CO_REGISTER(m) {
  m.impl("spd_inverse", TORCH_BOX(&spd_inverse));
  m.impl("spd_solve", TORCH_BOX(&spd_solve));
}

}  // namespace consistency_ops::bindings
