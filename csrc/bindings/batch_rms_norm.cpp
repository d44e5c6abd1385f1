// Batch RMS normalisation: maps are read in place in either memory format; x is copied only where neither
// the channels nor the pixels are neighbours in memory.
#include "consistency_ops/batch_rms_norm.h"

#include <optional>
#include <utility>

#include "bindings/checks.h"
#include "bindings/cuda_scope.h"
#include "bindings/layout.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/batch_rms_norm_cuda.h"

namespace consistency_ops::bindings {
namespace {

using torch::headeronly::ScalarType;

constexpr char kOp[] = "batch_rms_norm";

// Describes two tensors of one shape (N, C, *spatial) alike; false if the pixels of one of them have more than one
// stride, or if their inner dimensions differ.
bool channel_views(const Tensor& a, const Tensor& b, ChannelView& va, ChannelView& vb) {
  const auto sizes = a.sizes(), sa = a.strides(), sb = b.strides();
  va = {sizes[0], sizes[1], 1, sa[0], sa[1], 1};
  vb = {sizes[0], sizes[1], 1, sb[0], sb[1], 1};
  for (size_t d = sizes.size(); d-- > 2;) {
    if (sizes[d] == 1) continue;
    if (va.inner == 1) {
      va.inner_stride = sa[d];
      vb.inner_stride = sb[d];
    } else if (sa[d] != va.inner * va.inner_stride || sb[d] != vb.inner * vb.inner_stride) {
      return false;
    }
    va.inner *= sizes[d];
    vb.inner *= sizes[d];
  }
  const bool merged =
      va.inner == 1 || (va.outer_stride == va.inner * va.inner_stride && vb.outer_stride == vb.inner * vb.inner_stride);
  for (ChannelView* v : {&va, &vb}) {
    if (merged) {
      if (v->inner == 1) v->inner_stride = v->outer_stride;
      v->inner *= v->outer;
      v->outer = 1;
    }
    // The stride of a single channel or row is free: the choice that makes the other dimension the long one.
    if (v->channels == 1 && v->inner_stride != 1) v->channel_stride = 1;
    if (v->inner == 1) v->inner_stride = v->channel_stride == 1 ? v->channels : 1;
  }
  const auto channels_last = [](const ChannelView& v) { return v.channel_stride == 1 && v.inner_stride != 1; };
  return channels_last(va) == channels_last(vb) &&
         (channels_last(va) || (va.inner_stride == 1 && vb.inner_stride == 1));
}

Status run(const BatchRmsNormParams& params, [[maybe_unused]] const Tensor& running_ms) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(running_ms)) {
    const int64_t bytes = batch_rms_norm_workspace_cuda(params);
    Tensor workspace = empty_contiguous(running_ms, {bytes}, ScalarType::Byte);
    return batch_rms_norm_denominator_cuda(params, workspace.mutable_data_ptr(), CudaScope(running_ms).stream());
  }
#endif
  return batch_rms_norm_denominator_cpu(params, thread_pool());
}

Status run(const ChannelDivideParams& params, [[maybe_unused]] const Tensor& x) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(x)) return channel_divide_cuda(params, CudaScope(x).stream());
#endif
  return channel_divide_cpu(params, thread_pool());
}

// The CUDA kernels compute in float32.
void check_types(const Tensor& running_ms, ScalarType dtype) {
  STD_TORCH_CHECK(
      !on_cuda(running_ms) || (dtype != ScalarType::Double && running_ms.scalar_type() != ScalarType::Double), kOp,
      ": float64 has no CUDA kernel");
}

void check_counter(const std::optional<Tensor>& num_batches) {
  STD_TORCH_CHECK(!num_batches || (num_batches->numel() == 1 && num_batches->scalar_type() == ScalarType::Long), kOp,
                  ": num_batches must be an int64 tensor with one element");
}

Tensor denominator(BatchRmsNormParams& params, const Tensor& running_ms, const std::optional<Tensor>& num_batches,
                   ScalarType dtype, double decay, double eps) {
  check_counter(num_batches);
  check_types(running_ms, dtype);
  STD_TORCH_CHECK(running_ms.dim() == 1 && running_ms.is_contiguous(), kOp,
                  ": running_ms must be contiguous with 1 dimension, got ", running_ms.dim());
  Tensor d = empty_contiguous(running_ms, {running_ms.numel()}, dtype);
  params.view.channels = running_ms.numel();
  params.running_ms = running_ms.mutable_data_ptr();
  params.running_dtype = dtype_of(running_ms, kOp, "running_ms");
  params.num_batches = num_batches ? static_cast<int64_t*>(num_batches->mutable_data_ptr()) : nullptr;
  params.denominator = d.mutable_data_ptr();
  params.denominator_dtype = dtype_of(d, kOp, "denominator");
  params.decay = decay;
  params.eps = eps;
  check_status(run(params, running_ms), kOp);
  return d;
}

ScalarType statistics_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor denominator_training(Tensor x, Tensor running_ms, std::optional<Tensor> num_batches, double decay, double eps) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(1) == running_ms.numel(), kOp,
                  ": x must be (N, C, *spatial) with C = ", running_ms.numel());
  BatchRmsNormParams params{};
  params.dtype = dtype_of(x, kOp, "x");
  if (x.numel() > 0) {
    ChannelView same;
    if (!channel_views(x, x, params.view, same)) {
      x = contiguous_copy(x);
      channel_views(x, x, params.view, same);
    }
    params.x = x.const_data_ptr();
  }
  return denominator(params, running_ms, num_batches, statistics_type(x), decay, eps);
}

Tensor denominator_evaluation(Tensor running_ms, std::optional<Tensor> num_batches, ScalarType dtype, double decay,
                              double eps) {
  BatchRmsNormParams params{};
  return denominator(params, running_ms, num_batches, dtype, decay, eps);
}

Tensor divide(Tensor x, Tensor denominator) {
  STD_TORCH_CHECK(x.dim() >= 2 && denominator.dim() == 1 && denominator.is_contiguous() &&
                      denominator.numel() == x.size(1) && denominator.scalar_type() == statistics_type(x),
                  kOp, ": the denominator must be (C) for x (N, C, *spatial), float64 if x is, else float32");
  check_types(denominator, x.scalar_type());
  Tensor y = empty_like_of(x);
  ChannelDivideParams params{};
  if (!channel_views(x, y, params.x_view, params.y_view)) {
    x = contiguous_copy(x);
    y = empty_like_of(x);
    channel_views(x, y, params.x_view, params.y_view);
  }
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  params.dtype = dtype_of(x, kOp, "x");
  params.denominator = denominator.const_data_ptr();
  if (x.numel() > 0) check_status(run(params, x), kOp);
  return y;
}

}  // namespace

CO_REGISTER(m) {
  m.impl("batch_rms_norm_denominator_", TORCH_BOX(&denominator_training));
  m.impl("batch_rms_norm_denominator", TORCH_BOX(&denominator_evaluation));
  m.impl("batch_rms_norm_divide", TORCH_BOX(&divide));
}

}  // namespace consistency_ops::bindings
