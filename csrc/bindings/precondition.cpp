// The correction and its stages: tensors to PreconditionLayer, and nothing else.
#include "consistency_ops/precondition.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/cuda_launch.h"
#include "bindings/layers.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/c_api.h"
#include "consistency_ops/precondition_cuda.h"

namespace consistency_ops::bindings {
namespace {

// `on`: a tensor on the device of all of them.
void launch(const std::vector<PreconditionLayer>& layers, const PreconditionOptions& options,
            [[maybe_unused]] const Tensor& on, const char* op, [[maybe_unused]] bool tf32 = false) {
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(on)) {
    STD_TORCH_CHECK(!options.float64, op, ": float64 has no CUDA kernel");
    CudaTuning tuning = forced_tuning();
    tuning.tf32 = tf32;
    const auto count = static_cast<int64_t>(layers.size());
    const int64_t bytes = precondition_workspace_cuda(layers.data(), count, options, tuning);
    const Status status = launch_with_workspace(
        on, bytes, tuning, [&](const CudaDevice& device, void* workspace, void* stream, const CudaTuning& chosen) {
          return precondition_cuda(layers.data(), count, options, device, workspace, stream, chosen);
        });
    check_launch(status, op);
    check_status(status, op);
    return;
  }
#endif
  const auto count = static_cast<int64_t>(layers.size());
  check_status(precondition_cpu(layers.data(), count, options, thread_pool()), op);
}

// `launch` with new info and damping_used, which it returns.
std::tuple<Tensor, Tensor> launch_reporting(std::vector<PreconditionLayer>& layers, const PreconditionOptions& options,
                                            const Tensor& on, const char* op, bool tf32 = false) {
  const int64_t chunks = total_chunks(layers, options);
  Tensor info = empty_contiguous(on, {chunks}, ScalarType::Int);
  Tensor used = empty_contiguous(on, {chunks}, ScalarType::Float);
  set_outputs(layers, options, info.mutable_data_ptr<int32_t>(), used.mutable_data_ptr<float>());
  launch(layers, options, on, op, tf32);
  return {info, used};
}

std::tuple<Tensor, Tensor> foreach_precondition_(const Tensors& grads, const Tensors& bias_grads, Tensors inputs,
                                                 const Tensors& permutations, const Tensors& row_counts,
                                                 const Ints& bias_layers, const Ints& permutation_layers,
                                                 const Ints& row_count_layers, const Ints& layer_indices,
                                                 const Ints& groups, double damping, bool trace_scaling, int64_t chunk,
                                                 int64_t max_rows, int64_t seed, int64_t step, bool tf32) {
  const char* op = "foreach_precondition_";
  PreconditionOptions options = make_options(chunk, max_rows, seed, step, op);
  options.damping = damping;
  options.trace_scaling = trace_scaling;
  const size_t count = grads.size();
  STD_TORCH_CHECK(count > 0 && inputs.size() == count && layer_indices.size() == count && groups.size() == count, op,
                  ": got ", count, " grads, ", inputs.size(), " inputs and ", layer_indices.size(), " layer indices");
  const auto bias = spread(bias_grads, bias_layers, count, op, "bias_grads");
  const auto permutation = spread(permutations, permutation_layers, count, op, "permutations");
  const auto row_count = spread(row_counts, row_count_layers, count, op, "row_counts");
  check_overlap(grads, bias_grads, op);

  std::vector<PreconditionLayer> layers;
  layers.reserve(count);
  for (size_t l = 0; l < count; ++l) {
    const Tensor& grad = grads[l];
    Tensor& x = inputs[l];
    STD_TORCH_CHECK(grad.dim() >= 2 && x.dim() >= 1, op, ": grad must have at least 2 dimensions and inputs 1, got ",
                    grad.dim(), " and ", x.dim());
    const int64_t unit_dim = grad.dim() > 2 && x.dim() == grad.dim() ? 1 : x.dim() - 1;
    const int64_t units = grad.size(1), seen = x.size(unit_dim);
    const int64_t conv_groups = grad.dim() > 2 && units > 0 ? seen / units : 1;
    STD_TORCH_CHECK(conv_groups >= 1 && conv_groups * units == seen && grad.size(0) % conv_groups == 0, op,
                    ": grad has ", units, " units and ", grad.size(0), " outputs, inputs have ", seen, " units");
    if (bias[l] != nullptr) {
      STD_TORCH_CHECK(bias[l]->numel() == grad.size(0), op, ": bias_grad must have ", grad.size(0), " elements, got ",
                      bias[l]->numel());
    }
    PreconditionLayer layer = empty_layer(layer_indices[l], groups[l], chunk, op);
    set_grad(layer, grad, conv_groups, op);
    set_input(layer, x, unit_dim, op);
    if (bias[l] != nullptr) set_bias(layer, *bias[l], op);
    set_permutation(layer, permutation[l], op);
    set_row_count(layer, row_count[l], op);
    options.float64 |= layer.x_dtype == DType::kFloat64 || layer.g_dtype == DType::kFloat64;
    for (int64_t g = 0; g < conv_groups; ++g) {
      layers.push_back(layer);
      to_next_group(layer);
    }
  }
  find_same_inputs(layers);
  return launch_reporting(layers, options, grads[0], op, tf32);
}

Tensors foreach_covariance(Tensors inputs, const Tensors& permutations, const Tensors& row_counts,
                           const Ints& permutation_layers, const Ints& row_count_layers, const Ints& layer_indices,
                           const Ints& groups, const Ints& unit_dims, const Ints& units,
                           const std::vector<bool>& with_bias, int64_t chunk, int64_t max_rows, int64_t seed,
                           int64_t step) {
  const char* op = "foreach_covariance";
  PreconditionOptions options = make_options(chunk, max_rows, seed, step, op);
  options.stages = kStageCovariance;
  const size_t count = inputs.size();
  STD_TORCH_CHECK(layer_indices.size() == count && groups.size() == count && unit_dims.size() == count &&
                      units.size() == count && with_bias.size() == count,
                  op, ": every input needs its layer index, unit dimension, number of units and bias flag");
  const auto permutation = spread(permutations, permutation_layers, count, op, "permutations");
  const auto row_count = spread(row_counts, row_count_layers, count, op, "row_counts");
  for (const Tensor& x : inputs) options.float64 |= dtype_of(x, op, "inputs") == DType::kFloat64;

  std::vector<PreconditionLayer> layers;
  Tensors covariances;
  for (size_t l = 0; l < count; ++l) {
    Tensor& x = inputs[l];
    STD_TORCH_CHECK(unit_dims[l] >= 0 && unit_dims[l] < x.dim() && units[l] > 0 && x.size(unit_dims[l]) % units[l] == 0,
                    op, ": inputs must have a multiple of ", units[l], " units");
    const int64_t conv_groups = x.size(unit_dims[l]) / units[l];
    const int64_t chunks = (units[l] + (with_bias[l] ? 1 : 0) + chunk - 1) / chunk;
    covariances.push_back(empty_contiguous(x, {conv_groups * chunks, chunk, chunk},
                                           options.float64 ? ScalarType::Double : ScalarType::Float));
    torch::stable::zero_(covariances.back());
    PreconditionLayer layer = empty_layer(layer_indices[l], groups[l], chunk, op);
    layer.units = units[l];
    layer.has_bias = with_bias[l];
    set_input(layer, x, unit_dims[l], op);
    set_permutation(layer, permutation[l], op);
    set_row_count(layer, row_count[l], op);
    layer.covariance = covariances.back().mutable_data_ptr();
    for (int64_t g = 0; g < conv_groups; ++g) {
      layers.push_back(layer);
      to_next_group(layer, chunks * chunk * chunk * (options.float64 ? 8 : 4));
    }
  }
  launch(layers, options, inputs[0], op);
  return covariances;
}

std::tuple<Tensors, Tensor, Tensor> foreach_inverse(const Tensors& covariances, const Ints& units, double damping,
                                                    bool trace_scaling, int64_t chunk, bool triangular) {
  const char* op = "foreach_inverse";
  PreconditionOptions options = make_options(chunk, 1, 0, 0, op);
  options.damping = damping;
  options.trace_scaling = trace_scaling;
  options.stages = kStageFactor;
  options.triangular = triangular;
  const size_t count = covariances.size();
  STD_TORCH_CHECK(count > 0 && units.size() == count, op, ": got ", count, " covariances and ", units.size(), " units");
  options.float64 = covariances[0].scalar_type() == ScalarType::Double;
  std::vector<PreconditionLayer> layers;
  Tensors inverses;
  for (size_t l = 0; l < count; ++l) {
    const int64_t conv_groups = check_matrices(covariances[l], units[l], options, op);
    inverses.push_back(empty_like_of(covariances[l]));
    const int64_t bytes = covariances[l].numel() / conv_groups * (options.float64 ? 8 : 4);
    PreconditionLayer layer = empty_layer(0, 1, chunk, op);
    layer.units = units[l];
    layer.covariance = const_cast<void*>(covariances[l].const_data_ptr());
    layer.inverse = inverses.back().mutable_data_ptr();
    for (int64_t g = 0; g < conv_groups; ++g) {
      layers.push_back(layer);
      to_next_group(layer, bytes);
    }
  }
  const auto [info, used] = launch_reporting(layers, options, covariances[0], op);
  return {inverses, info, used};
}

// triangular: any matrices; on CUDA lower triangular ones.
void foreach_apply_(const Tensors& grads, const Tensors& bias_grads, const Tensors& inverses, const Tensor& info,
                    const Tensors& permutations, const Ints& bias_layers, const Ints& permutation_layers,
                    const Ints& layer_indices, const Ints& groups, int64_t chunk, int64_t seed, int64_t step,
                    bool triangular) {
  const char* op = "foreach_apply_";
  PreconditionOptions options = make_options(chunk, 1, seed, step, op);
  options.stages = kStageApply;
  options.triangular = triangular;
  auto layers = matrix_layers(grads, bias_grads, inverses, &PreconditionLayer::inverse, permutations, bias_layers,
                              permutation_layers, layer_indices, groups, options, op);
  check_info(info, layers, options, op);
  set_outputs(layers, options, const_cast<int32_t*>(info.const_data_ptr<int32_t>()), nullptr);
  launch(layers, options, grads[0], op);
}

std::tuple<Tensor, Tensor> foreach_correct_(const Tensors& grads, const Tensors& bias_grads, const Tensors& covariances,
                                            const Tensors& permutations, const Ints& bias_layers,
                                            const Ints& permutation_layers, const Ints& layer_indices,
                                            const Ints& groups, double damping, bool trace_scaling, int64_t chunk,
                                            int64_t seed, int64_t step) {
  const char* op = "foreach_correct_";
  PreconditionOptions options = make_options(chunk, 1, seed, step, op);
  options.damping = damping;
  options.trace_scaling = trace_scaling;
  options.stages = kStageFactor | kStageApply;
  check_overlap(grads, bias_grads, op);
  auto layers = matrix_layers(grads, bias_grads, covariances, &PreconditionLayer::covariance, permutations, bias_layers,
                              permutation_layers, layer_indices, groups, options, op);
  find_same_inputs(layers);
  return launch_reporting(layers, options, grads[0], op);
}

}  // namespace

CO_REGISTER(m) {
  m.impl("foreach_precondition_", TORCH_BOX(&foreach_precondition_));
  m.impl("foreach_covariance", TORCH_BOX(&foreach_covariance));
  m.impl("foreach_inverse", TORCH_BOX(&foreach_inverse));
  m.impl("foreach_apply_", TORCH_BOX(&foreach_apply_));
  m.impl("foreach_correct_", TORCH_BOX(&foreach_correct_));
}

}  // namespace consistency_ops::bindings

#if defined(CO_CUDA_KERNELS)
// For tests and benchmarks, through ctypes: how the operators of the calling thread launch the correction from now on
// (PreconditionRung, CTAs of a chunk; 0: automatic).  0, or CO_ERROR_INVALID_ARGUMENT.
CO_API int co_set_cuda_tuning(int32_t rung, int32_t ctas);
int co_set_cuda_tuning(int32_t rung, int32_t ctas) {
  using namespace consistency_ops;
  if (rung < 0 || rung > static_cast<int32_t>(PreconditionRung::kTaskQueue) || ctas < 0 || ctas > 1024) {
    return CO_ERROR_INVALID_ARGUMENT;
  }
  bindings::forced_tuning().rung = static_cast<PreconditionRung>(rung);
  bindings::forced_tuning().ctas = ctas;
  return 0;
}
#endif
