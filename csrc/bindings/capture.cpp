// Registration of row capture: check, describe the strides, call the kernel.
#include "consistency_ops/capture.h"

#include <torch/csrc/stable/ops.h>

#include "bindings/checks.h"
#include "bindings/cuda_scope.h"
#include "bindings/host_calls.h"
#include "bindings/layout.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/capture_cuda.h"

namespace {

using consistency_ops::CaptureProblem;
using consistency_ops::kMaxCaptureDims;
using consistency_ops::bindings::dtype_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using consistency_ops::Status;
using consistency_ops::bindings::check_status;
using consistency_ops::bindings::on_cuda;

Status run_capture(const CaptureProblem& p, [[maybe_unused]] const Tensor& rows) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(rows)) return capture_rows_cuda(p, consistency_ops::bindings::CudaScope(rows).stream());
#endif
  return consistency_ops::bindings::capture_rows_in_turn(p);
}

Status run_mark(const CaptureProblem& p, bool restart, [[maybe_unused]] const Tensor& rows) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(rows)) return capture_mark_cuda(p, restart, consistency_ops::bindings::CudaScope(rows).stream());
#endif
  return consistency_ops::bindings::capture_mark_in_turn(p, restart);
}

CaptureProblem describe_buffer(const Tensor& rows, const Tensor& state, int64_t index) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.size(0) > 0,
                  "capture_rows_: rows must be contiguous [capacity, units] with capacity >= 1, got ", rows.dim(),
                  " dimensions");
  STD_TORCH_CHECK(state.dim() == 2 && state.is_contiguous() && state.size(1) == consistency_ops::kCaptureStateSize &&
                      state.scalar_type() == ScalarType::Long,
                  "capture_rows_: state must be contiguous int64 [layers, ", consistency_ops::kCaptureStateSize, "]");
  STD_TORCH_CHECK(0 <= index && index < state.size(0), "capture_rows_: index must be in [0, ", state.size(0), "), got ",
                  index);
  CaptureProblem p{};
  p.rows = rows.data_ptr();
  p.rows_dtype = dtype_of(rows, "capture_rows_", "rows");
  p.capacity = rows.size(0);
  p.units = rows.size(1);
  p.state = static_cast<consistency_ops::CaptureState*>(state.data_ptr()) + index;
  p.layer = static_cast<uint32_t>(index);
  return p;
}

// False where x has too many dimensions.
bool describe_rows(const Tensor& x, int64_t unit_dim, CaptureProblem& p) {
  if (!consistency_ops::bindings::collapse(x, unit_dim, 0, kMaxCaptureDims, p.row_size, p.row_stride)) return false;
  p.x = x.data_ptr();
  p.unit_stride = x.stride(unit_dim);
  return true;
}

void capture_rows_(Tensor rows, Tensor state, Tensor x, int64_t index, int64_t unit_dim, int64_t seed, bool in_backward,
                   bool marks) {
  CaptureProblem p = describe_buffer(rows, state, index);
  if (unit_dim < 0) unit_dim += x.dim();
  STD_TORCH_CHECK(0 <= unit_dim && unit_dim < x.dim() && x.size(unit_dim) == p.units, "capture_rows_: dimension ",
                  unit_dim, " of x must have ", p.units, " units");
  p.x_dtype = dtype_of(x, "capture_rows_", "x");
  p.seed = static_cast<uint64_t>(seed);
  p.in_backward = in_backward;
  p.marks = marks;
  Tensor source = x;
  if (!describe_rows(source, unit_dim, p)) {
    source = consistency_ops::bindings::contiguous_copy(x);
    describe_rows(source, unit_dim, p);  // at most one dimension on each side of unit_dim
  }
  const Status status = run_capture(p, rows);
  STD_TORCH_CHECK(
      status != Status::kInvalidArgument,
      "capture_rows_: rows must be float32 or float64 and at least as wide as x, have its dtype, or be bfloat16 "
      "where it is float32");
  check_status(status, "capture_rows_");
}

void capture_mark_(Tensor rows, Tensor state, int64_t index, bool restart) {
  check_status(run_mark(describe_buffer(rows, state, index), restart, rows), "capture_mark_");
}

}  // namespace

CO_REGISTER(m) {
  m.impl("capture_rows_", TORCH_BOX(&capture_rows_));
  m.impl("capture_mark_", TORCH_BOX(&capture_mark_));
}
