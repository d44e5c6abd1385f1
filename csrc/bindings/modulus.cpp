// |x|: dense tensors are handled in memory order, whatever the order of their dimensions; others are first
// copied into the result.
#include "consistency_ops/modulus.h"

#include <optional>
#include <tuple>

#include "bindings/checks.h"
#include "bindings/cuda_scope.h"
#include "bindings/layout.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/modulus_cuda.h"

namespace consistency_ops::bindings {
namespace {

using torch::headeronly::ScalarType;

Status run(const ModulusParams& params, [[maybe_unused]] const Tensor& x) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(x)) return modulus_cuda(params, CudaScope(x).stream());
#endif
  return modulus_cpu(params, thread_pool());
}

Status run(const ModulusBackwardParams& params, [[maybe_unused]] const Tensor& grad) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(grad)) return modulus_backward_cuda(params, CudaScope(grad).stream());
#endif
  return modulus_backward_cpu(params, thread_pool());
}

// Where to read x from when the result is y: x itself, or y once x has been copied into it.
const void* source(const Tensor& x, Tensor& y) {
  if (same_layout(x, y)) return x.const_data_ptr();
  torch::stable::copy_(y, x);
  return y.const_data_ptr();
}

ScalarType part_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::ComplexFloat:
      return ScalarType::Float;
    case ScalarType::ComplexDouble:
      return ScalarType::Double;
    default:
      return ScalarType::Undefined;  // x is real
  }
}

// x, or a copy of it that fills its memory.
Tensor dense(const Tensor& x, const Tensor& like_x) {
  if (same_layout(x, like_x)) return x;
  return allocating(x, x.numel() * element_bytes(x.scalar_type()), [&] { return torch::stable::clone(x); });
}

void real_modulus(const Tensor& x, Tensor& y, Tensor* signs, int64_t rows) {
  ModulusParams params{};
  params.dtype = dtype_of(x, "modulus", "x");
  params.x = source(x, y);
  params.y = y.mutable_data_ptr();
  params.signs = signs == nullptr ? nullptr : static_cast<uint8_t*>(signs->mutable_data_ptr());
  params.rows = rows;
  params.row_length = rows == 0 ? 0 : x.numel() / rows;
  check_status(run(params, x), "modulus");
}

Tensor modulus(const Tensor& x) {
  Tensor y = empty_like_of(x);
  const ScalarType part = part_type(x);
  if (part == ScalarType::Undefined) {
    real_modulus(x, y, nullptr, 1);
    return y;
  }
  STD_TORCH_CHECK(!on_cuda(x), "modulus: complex tensors have no CUDA kernel");
  const Tensor in = dense(x, y);
  Tensor out = empty_strided(x, in.sizes(), in.strides(), part);
  ComplexModulusParams params{};
  params.dtype = part == ScalarType::Float ? DType::kFloat32 : DType::kFloat64;
  params.x = in.const_data_ptr();
  params.y = out.mutable_data_ptr();
  params.numel = in.numel();
  check_status(complex_modulus_cpu(params, thread_pool()), "modulus");
  return out;
}

// The bits lie in the memory order of the result.  With batch_dims > 0 the result is contiguous and the bits of every
// element of the leading dimensions start a new byte, so that vmap can split them.
std::tuple<Tensor, Tensor> modulus_forward(const Tensor& x, int64_t batch_dims) {
  STD_TORCH_CHECK(0 <= batch_dims && batch_dims <= x.dim(), "modulus_forward: batch_dims must be in [0, ", x.dim(),
                  "], got ", batch_dims);
  const auto sizes = x.sizes();
  Tensor y = batch_dims == 0 ? empty_like_of(x) : empty_contiguous(x, {sizes.begin(), sizes.end()}, x.scalar_type());
  std::vector<int64_t> shape;
  int64_t rows = 1, row_length = 1;
  for (int64_t d = 0; d < x.dim(); ++d) {
    (d < batch_dims ? rows : row_length) *= sizes[d];
    if (d < batch_dims) shape.push_back(sizes[d]);
  }
  shape.push_back((row_length + 7) / 8);
  Tensor signs = empty_contiguous(x, shape, ScalarType::Byte);
  real_modulus(x, y, &signs, rows);
  return {y, signs};
}

// Without strides grad already has those of the forward result.
Tensor modulus_backward(const Tensor& grad, const Tensor& signs, const std::optional<std::vector<int64_t>>& strides) {
  const int64_t row_bytes = signs.dim() == 0 ? 0 : signs.size(signs.dim() - 1);
  const int64_t rows = row_bytes == 0 ? 0 : signs.numel() / row_bytes;
  const int64_t row_length = rows == 0 ? 0 : grad.numel() / rows;
  STD_TORCH_CHECK(signs.is_contiguous() && signs.scalar_type() == ScalarType::Byte &&
                      (row_length + 7) / 8 == row_bytes && rows * row_length == grad.numel() &&
                      (!strides || static_cast<int64_t>(strides->size()) == grad.dim()),
                  "modulus_backward: signs and strides must be those of a forward result of the shape of grad");
  Tensor out = strides ? empty_strided(grad, grad.sizes(), *strides, grad.scalar_type())
                       : empty_strided(grad, grad.sizes(), grad.strides(), grad.scalar_type());
  STD_TORCH_CHECK(is_dense(out), "modulus_backward: the strides must be those of a dense tensor");
  ModulusBackwardParams params{};
  params.dtype = dtype_of(grad, "modulus_backward", "grad");
  params.grad = source(grad, out);
  params.signs = static_cast<const uint8_t*>(signs.const_data_ptr());
  params.grad_x = out.mutable_data_ptr();
  params.rows = rows;
  params.row_length = row_length;
  check_status(run(params, grad), "modulus_backward");
  return out;
}

Tensor modulus_complex_backward(const Tensor& grad, const Tensor& x) {
  const ScalarType part = part_type(x);
  STD_TORCH_CHECK(!on_cuda(x), "modulus_complex_backward: complex tensors have no CUDA kernel");
  STD_TORCH_CHECK(part != ScalarType::Undefined && grad.scalar_type() == part,
                  "modulus_complex_backward: x must be complex and grad have the type of its parts");
  STD_TORCH_CHECK(same_shape(grad, x), "modulus_complex_backward: grad and x must have one shape");
  Tensor out = empty_like_of(x);
  const Tensor in = dense(x, out);
  Tensor real = grad;
  if (!same_layout(grad, out)) {
    real = empty_strided(grad, in.sizes(), in.strides(), part);
    torch::stable::copy_(real, grad);
  }
  ComplexModulusBackwardParams params{};
  params.dtype = part == ScalarType::Float ? DType::kFloat32 : DType::kFloat64;
  params.grad = real.const_data_ptr();
  params.x = in.const_data_ptr();
  params.grad_x = out.mutable_data_ptr();
  params.numel = in.numel();
  check_status(complex_modulus_backward_cpu(params, thread_pool()), "modulus_complex_backward");
  return out;
}

}  // namespace

CO_REGISTER(m) {
  m.impl("modulus", TORCH_BOX(&modulus));
  m.impl("modulus_forward", TORCH_BOX(&modulus_forward));
  m.impl("modulus_backward", TORCH_BOX(&modulus_backward));
  m.impl("modulus_complex_backward", TORCH_BOX(&modulus_complex_backward));
}

}  // namespace consistency_ops::bindings
