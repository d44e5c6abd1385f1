// The operators of mode="whiten": tensors to PreconditionLayer and WhitenedLayer, and nothing else.
#include "consistency_ops/whitening.h"

#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "bindings/cuda_launch.h"
#include "bindings/layers.h"
#include "bindings/registration.h"
#include "bindings/thread_pool.h"
#include "consistency_ops/whitening_cuda.h"

namespace consistency_ops::bindings {
namespace {

const int32_t* flags(const Tensor& tensor, size_t count, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() &&
                      tensor.numel() == static_cast<int64_t>(count),
                  op, ": ", name, " must be int32 with one entry a layer, ", count, " in all");
  return tensor.const_data_ptr<int32_t>();
}

Tensor new_flags(const Tensor& like, size_t count) {
  return torch::stable::new_zeros(like, {static_cast<int64_t>(count)}, ScalarType::Int);
}

// What belongs to every PreconditionLayer of a tensor's layer: one a group of its convolution.
std::vector<WhitenedLayer> whitened_layers(const std::vector<PreconditionLayer>& layers,
                                           const std::vector<size_t>& owners, int32_t* has_gradient) {
  std::vector<WhitenedLayer> whitened(layers.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    whitened[l].first = l == 0 || owners[l] != owners[l - 1];
    if (has_gradient != nullptr) whitened[l].has_gradient = has_gradient + owners[l];
  }
  return whitened;
}

// The layer of every group, from the number of groups that its matrices tell.
std::vector<size_t> owners_of(const Tensors& grads, const Ints& bias_layers, const Tensors& matrices,
                              const PreconditionOptions& options) {
  std::vector<bool> joined(grads.size(), false);
  for (int64_t l : bias_layers) joined[l] = true;
  std::vector<size_t> owners;
  for (size_t l = 0; l < grads.size(); ++l) {
    const int64_t chunks = (grads[l].size(1) + joined[l] + options.chunk - 1) / options.chunk;
    for (int64_t g = 0; g < matrices[l].size(0) / chunks; ++g) owners.push_back(l);
  }
  return owners;
}

// `on`: a tensor on the device of all of them.
void run_whiten(const std::vector<PreconditionLayer>& layers, const std::vector<WhitenedLayer>& whitened,
                const PreconditionOptions& options, double decay, [[maybe_unused]] const Tensor& on, const char* op) {
  WhiteningOptions whitening;
  whitening.decay = decay;
  const auto count = static_cast<int64_t>(layers.size());
#if defined(CO_CUDA_KERNELS)
  if (on_cuda(on)) {
    STD_TORCH_CHECK(!options.float64, op, ": float64 has no CUDA kernel");
    const CudaTuning& forced = forced_tuning();
    const int64_t bytes = whitening_workspace_cuda(layers.data(), count, options, whitening, false, forced);
    const Status status = launch_with_workspace(
        on, bytes, forced, [&](const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
          return whiten_cuda(layers.data(), whitened.data(), count, options, whitening, device, workspace, stream,
                             tuning);
        });
    check_launch(status, op);
    check_status(status, op);
    return;
  }
#endif
  check_status(whiten_cpu(layers.data(), whitened.data(), count, options, whitening, thread_pool()), op);
}

#if defined(CO_CUDA_KERNELS)
// squares: float32, zero.
void run_unwhiten_cuda(const std::vector<PreconditionLayer>& layers, const std::vector<WhitenedLayer>& whitened,
                       const PreconditionOptions& options, const WhiteningOptions& whitening, Tensor& squares,
                       const char* op) {
  STD_TORCH_CHECK(!options.float64, op, ": float64 has no CUDA kernel");
  const auto count = static_cast<int64_t>(layers.size());
  const CudaTuning& forced = forced_tuning();
  const int64_t bytes = whitening_workspace_cuda(layers.data(), count, options, whitening, true, forced);
  const Status status = launch_with_workspace(
      squares, bytes, forced, [&](const CudaDevice& device, void* workspace, void* stream, const CudaTuning& tuning) {
        return unwhiten_cuda(layers.data(), whitened.data(), count, options, whitening,
                             squares.mutable_data_ptr<float>(), device, workspace, stream, tuning);
      });
  check_launch(status, op);
  check_status(status, op);
}
#endif

std::tuple<Tensor, Tensor, Tensor> foreach_whiten_(const Tensors& grads, const Tensors& bias_grads, Tensors inputs,
                                                   const Tensors& row_counts, const Tensors& averages,
                                                   const Tensors& average_weights, const Tensors& factors,
                                                   const Ints& bias_layers, const Ints& layer_indices,
                                                   const Ints& groups, double damping, bool trace_scaling, double decay,
                                                   int64_t chunk, int64_t max_rows, int64_t seed, int64_t step) {
  const char* op = "foreach_whiten_";
  PreconditionOptions options = make_options(chunk, max_rows, seed, step, op);
  options.damping = damping;
  options.trace_scaling = trace_scaling;
  options.triangular = true;
  const size_t count = grads.size();
  STD_TORCH_CHECK(count > 0 && inputs.size() == count && row_counts.size() == count && layer_indices.size() == count &&
                      groups.size() == count && factors.size() == count,
                  op, ": got ", count, " grads, ", inputs.size(), " inputs, ", row_counts.size(), " row counts and ",
                  layer_indices.size(), " layer indices");
  const bool averaged = decay > 0;
  STD_TORCH_CHECK(averages.size() == (averaged ? count : 0) && average_weights.size() == averages.size(), op,
                  ": every layer needs an average and its weight where decay > 0, and none where it is 0");
  const auto bias = spread(bias_grads, bias_layers, count, op, "bias_grads");
  check_overlap(grads, bias_grads, op);
  for (size_t l = 0; l < count; ++l) {
    options.float64 |=
        dtype_of(inputs[l], op, "inputs") == DType::kFloat64 || dtype_of(grads[l], op, "grad") == DType::kFloat64;
  }
  const ScalarType compute = options.float64 ? ScalarType::Double : ScalarType::Float;

  Tensor has_gradient = new_flags(grads[0], count);
  std::vector<PreconditionLayer> layers;
  std::vector<size_t> owners;
  for (size_t l = 0; l < count; ++l) {
    const Tensor& grad = grads[l];
    Tensor& x = inputs[l];
    STD_TORCH_CHECK(grad.dim() >= 2 && x.dim() >= 1 && grad.size(1) > 0, op,
                    ": grad must have at least 2 dimensions and 1 unit, got ", grad.dim(), " dimensions");
    const int64_t unit_dim = grad.dim() > 2 && x.dim() == grad.dim() ? 1 : x.dim() - 1;
    const int64_t units = grad.size(1), conv_groups = grad.dim() > 2 ? x.size(unit_dim) / units : 1;
    STD_TORCH_CHECK(conv_groups >= 1 && conv_groups * units == x.size(unit_dim) && grad.size(0) % conv_groups == 0, op,
                    ": grad has ", units, " units and ", grad.size(0), " outputs, inputs have ", x.size(unit_dim),
                    " units");
    STD_TORCH_CHECK(bias[l] == nullptr || bias[l]->numel() == grad.size(0), op, ": bias_grad must have ", grad.size(0),
                    " elements");
    const int64_t total = units + (bias[l] != nullptr ? 1 : 0), chunks = (total + chunk - 1) / chunk;
    STD_TORCH_CHECK(check_matrices(factors[l], total, options, op) == conv_groups, op, ": layer ", l,
                    " must have as many factors as chunks");
    if (averaged) {
      STD_TORCH_CHECK(conv_groups == 1 && check_matrices(averages[l], total, options, op) == 1 &&
                          average_weights[l].numel() == 1 && average_weights[l].scalar_type() == compute,
                      op, ": layer ", l,
                      " must have one group, the average of its chunks, and one weight of its dtype");
    }
    PreconditionLayer layer = empty_layer(layer_indices[l], groups[l], chunk, op);
    set_grad(layer, grad, conv_groups, op);
    set_input(layer, x, unit_dim, op);
    if (bias[l] != nullptr) set_bias(layer, *bias[l], op);
    set_row_count(layer, &row_counts[l], op);
    layer.inverse = factors[l].mutable_data_ptr();
    for (int64_t g = 0; g < conv_groups; ++g) {
      layers.push_back(layer);
      owners.push_back(l);
      to_next_group(layer, chunks * chunk * chunk * (options.float64 ? 8 : 4));
    }
  }
  const int64_t chunks = total_chunks(layers, options);
  Tensor info = empty_contiguous(grads[0], {chunks}, ScalarType::Int);
  Tensor used = empty_contiguous(grads[0], {chunks}, ScalarType::Float);
  set_outputs(layers, options, info.mutable_data_ptr<int32_t>(), used.mutable_data_ptr<float>());
  auto whitened = whitened_layers(layers, owners, has_gradient.mutable_data_ptr<int32_t>());
  for (size_t l = 0; averaged && l < layers.size(); ++l) {
    whitened[l].average = averages[l].mutable_data_ptr();
    whitened[l].average_weight = average_weights[l].mutable_data_ptr();
  }
  run_whiten(layers, whitened, options, decay, grads[0], op);
  return {info, used, has_gradient};
}

Tensor foreach_whiten_by_(const Tensors& grads, const Tensors& bias_grads, const Tensors& factors, const Tensor& info,
                          const Ints& bias_layers, const Ints& layer_indices, const Ints& groups, int64_t chunk,
                          int64_t seed, int64_t step) {
  const char* op = "foreach_whiten_by_";
  PreconditionOptions options = make_options(chunk, 1, seed, step, op);
  options.stages = kStageApply;
  options.triangular = true;
  auto layers = matrix_layers(grads, bias_grads, factors, &PreconditionLayer::inverse, {}, bias_layers, {},
                              layer_indices, groups, options, op);
  check_overlap(grads, bias_grads, op);
  check_info(info, layers, options, op);
  set_outputs(layers, options, const_cast<int32_t*>(info.const_data_ptr<int32_t>()), nullptr);
  Tensor has_gradient = new_flags(grads[0], grads.size());
  const auto whitened = whitened_layers(layers, owners_of(grads, bias_layers, factors, options),
                                        has_gradient.mutable_data_ptr<int32_t>());
  run_whiten(layers, whitened, options, 0, grads[0], op);
  return has_gradient;
}

Tensor foreach_unwhiten_(const Tensors& weights, const Tensors& biases, const Tensors& weights_before,
                         const Tensors& biases_before, const Tensors& factors, const Tensor& info,
                         const Tensor& has_gradient, const Ints& bias_layers, const Ints& layer_indices,
                         const Ints& groups, bool keep_norm, bool finish, int64_t chunk, int64_t seed, int64_t step) {
  const char* op = "foreach_unwhiten_";
  PreconditionOptions options = make_options(chunk, 1, seed, step, op);
  options.stages = kStageApply;
  options.triangular = true;
  auto layers = matrix_layers(weights, biases, factors, &PreconditionLayer::inverse, {}, bias_layers, {}, layer_indices,
                              groups, options, op);
  check_overlap(weights, biases, op);
  check_info(info, layers, options, op);
  set_outputs(layers, options, const_cast<int32_t*>(info.const_data_ptr<int32_t>()), nullptr);
  const int32_t* moves = flags(has_gradient, weights.size(), op, "has_gradient");
  STD_TORCH_CHECK(weights_before.size() == weights.size() && biases_before.size() == biases.size(), op,
                  ": every weight and bias needs what it was before the step");
  const auto bias_before = spread(biases_before, bias_layers, weights.size(), op, "biases_before");
  auto same = [op](const Tensor& now, const Tensor& before) {
    STD_TORCH_CHECK(now.scalar_type() == before.scalar_type() && same_shape(now, before) && same_layout(now, before),
                    op, ": a weight and what it was must have one shape, dtype and strides");
  };
  for (size_t l = 0; l < weights.size(); ++l) same(weights[l], weights_before[l]);
  for (size_t b = 0; b < biases.size(); ++b) same(biases[b], biases_before[b]);

  const auto owners = owners_of(weights, bias_layers, factors, options);
  auto whitened = whitened_layers(layers, owners, const_cast<int32_t*>(moves));
  const bool on_gpu = on_cuda(weights[0]);
  for (size_t l = 0; l < layers.size(); ++l) {
    const size_t owner = owners[l];
    // The groups of a convolution: as far into the other tensor as into the weight.
    const auto offset =
        static_cast<const char*>(layers[l].g) - static_cast<const char*>(weights[owner].const_data_ptr());
    whitened[l].before = static_cast<const char*>(weights_before[owner].const_data_ptr()) + offset;
    if (layers[l].has_bias) {
      size_t b = 0;
      while (bias_layers[b] != static_cast<int64_t>(owner)) ++b;
      const auto bias_offset =
          static_cast<const char*>(layers[l].bias_grad) - static_cast<const char*>(biases[b].const_data_ptr());
      whitened[l].bias_before = static_cast<const char*>(bias_before[owner]->const_data_ptr()) + bias_offset;
    }
    whitened[l].moves = on_gpu || moves[owner] != 0;  // on a GPU the kernel looks
  }
  WhiteningOptions whitening;
  whitening.keep_norm = keep_norm;
  whitening.finish = finish;
#if defined(CO_CUDA_KERNELS)
  if (on_gpu) {
    STD_TORCH_CHECK(layers.size() == weights.size(), op, ": groups of a convolution have no CUDA kernel");
    Tensor squares = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(weights.size()), 2}, ScalarType::Float);
    run_unwhiten_cuda(layers, whitened, options, whitening, squares, op);
    return squares;
  }
#endif
  std::vector<double> of_group(2 * layers.size());
  check_status(unwhiten_cpu(layers.data(), whitened.data(), static_cast<int64_t>(layers.size()), options, whitening,
                            of_group.data(), thread_pool()),
               op);
  Tensor squares = torch::stable::new_zeros(weights[0], {static_cast<int64_t>(weights.size()), 2},
                                            options.float64 ? ScalarType::Double : ScalarType::Float);
  for (size_t l = 0; l < layers.size(); ++l) {
    for (int64_t side = 0; whitened[l].first && side < 2; ++side) {
      const int64_t at = 2 * static_cast<int64_t>(owners[l]) + side;
      const double square = of_group[2 * l + side];
      if (options.float64) {
        squares.mutable_data_ptr<double>()[at] = square;
      } else {
        squares.mutable_data_ptr<float>()[at] = static_cast<float>(square);
      }
    }
  }
  return squares;
}

}  // namespace

CO_REGISTER(m) {
  m.impl("foreach_whiten_", TORCH_BOX(&foreach_whiten_));
  m.impl("foreach_whiten_by_", TORCH_BOX(&foreach_whiten_by_));
  m.impl("foreach_unwhiten_", TORCH_BOX(&foreach_unwhiten_));
}

}  // namespace consistency_ops::bindings
