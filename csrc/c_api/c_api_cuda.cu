// The CUDA launchers with C linkage (c_api_cuda.h).  Host code only.
#include "c_api/structs.h"
#include "consistency_ops/batch_rms_norm_cuda.h"
#include "consistency_ops/c_api_cuda.h"
#include "consistency_ops/modulus_cuda.h"
#include "consistency_ops/precondition_cuda.h"

using namespace consistency_ops;
using c_api::code;
using c_api::known;
using c_api::type;

static_assert(CO_CUDA_COUNTER_BYTES == kCudaCounterBytes);

namespace {

bool known_tuning(const co_cuda_tuning* tuning) {
  return tuning == nullptr ||
         (0 <= tuning->rung && tuning->rung <= static_cast<int32_t>(PreconditionRung::kTaskQueue) &&
          0 <= tuning->packing && tuning->packing <= static_cast<int32_t>(Packing::kAlways));
}

CudaTuning tuning_of(const co_cuda_tuning* from) {
  if (from == nullptr) return {};
  return {static_cast<PreconditionRung>(from->rung), from->ctas, from->tf32, static_cast<Packing>(from->packing)};
}

BatchRmsNormParams statistics_of(int32_t dtype, const void* x, const co_channel_view& view) {
  BatchRmsNormParams params{};
  params.x = x;
  params.view = c_api::view_of(view);
  params.dtype = type(dtype);
  params.running_dtype = params.denominator_dtype = DType::kFloat32;
  return params;
}

}  // namespace

const char* co_launch_error(void) { return launch_error(); }

int co_precondition_cuda(const co_precondition_layer* layers, int64_t count, const co_precondition_options* options,
                         const co_cuda_device* device, void* workspace, void* stream, const co_cuda_tuning* tuning) {
  if (device == nullptr || !known_tuning(tuning)) return CO_ERROR_INVALID_ARGUMENT;
  return c_api::with_layers<int>(
      layers, count, options, [&](const PreconditionLayer* described, const PreconditionOptions& chosen) {
        return code(precondition_cuda(described, count, chosen, {device->shared_bytes, device->compute_capability},
                                      workspace, stream, tuning_of(tuning)));
      });
}

int64_t co_precondition_workspace_cuda(const co_precondition_layer* layers, int64_t count,
                                       const co_precondition_options* options, const co_cuda_tuning* tuning) {
  if (!known_tuning(tuning)) return CO_ERROR_INVALID_ARGUMENT;
  return c_api::with_layers<int64_t>(layers, count, options,
                                     [&](const PreconditionLayer* described, const PreconditionOptions& chosen) {
                                       return precondition_workspace_cuda(described, count, chosen, tuning_of(tuning));
                                     });
}

int co_modulus_cuda(int32_t dtype, int64_t numel, const void* x, void* y, uint8_t* signs, void* stream) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(modulus_cuda({x, y, signs, numel == 0 ? 0 : 1, numel, type(dtype)}, stream));
}

int co_modulus_backward_cuda(int32_t dtype, int64_t numel, const void* grad, const uint8_t* signs, void* grad_x,
                             void* stream) {
  if (!known(dtype)) return CO_ERROR_INVALID_ARGUMENT;
  return code(modulus_backward_cuda({grad, signs, grad_x, numel == 0 ? 0 : 1, numel, type(dtype)}, stream));
}

int co_batch_rms_norm_denominator_cuda(int32_t dtype, const void* x, const co_channel_view* view, float* running_ms,
                                       int64_t* num_batches, float* denominator, double decay, double eps,
                                       void* workspace, void* stream) {
  if (!known(dtype) || view == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  BatchRmsNormParams params = statistics_of(dtype, x, *view);
  params.running_ms = running_ms;
  params.num_batches = num_batches;
  params.denominator = denominator;
  params.decay = decay;
  params.eps = eps;
  return code(batch_rms_norm_denominator_cuda(params, workspace, stream));
}

int64_t co_batch_rms_norm_workspace_cuda(int32_t dtype, const void* x, const co_channel_view* view) {
  if (!known(dtype) || view == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  return batch_rms_norm_workspace_cuda(statistics_of(dtype, x, *view));
}

int co_channel_divide_cuda(int32_t dtype, const void* x, const co_channel_view* x_view, void* y,
                           const co_channel_view* y_view, const float* denominator, void* stream) {
  if (!known(dtype) || x_view == nullptr || y_view == nullptr) return CO_ERROR_INVALID_ARGUMENT;
  return code(
      channel_divide_cuda({x, c_api::view_of(*x_view), y, c_api::view_of(*y_view), type(dtype), denominator}, stream));
}
