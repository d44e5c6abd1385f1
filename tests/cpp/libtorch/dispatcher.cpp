// Corrects two gradients in place through torch's dispatcher, without Python, and compares with torch's own solve.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <tuple>
#include <vector>

namespace {

using Correct = std::tuple<at::Tensor, at::Tensor>(at::TensorList grads, at::TensorList bias_grads,
                                                   at::TensorList inputs, at::TensorList permutations,
                                                   at::TensorList row_counts, at::IntArrayRef bias_layers,
                                                   at::IntArrayRef permutation_layers, at::IntArrayRef row_count_layers,
                                                   at::IntArrayRef layers, at::IntArrayRef groups, double damping,
                                                   bool trace_scaling, int64_t chunk, int64_t max_rows, int64_t seed,
                                                   int64_t step);

}  // namespace

int main() {
  // Loading registers the operators.  RTLD_LAZY: the library is also a Python module, whose symbols stay unresolved.
  if (dlopen(CONSISTENCY_OPS_LIBRARY, RTLD_LAZY | RTLD_LOCAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const auto handle = c10::Dispatcher::singleton().findSchema({"consistency_ops::foreach_precondition_", ""});
  if (!handle.has_value()) {
    std::fprintf(stderr, "consistency_ops::foreach_precondition_ is not registered\n");
    return 1;
  }
  const auto correct = handle->typed<Correct>();

  at::manual_seed(0);
  const std::vector<at::Tensor> inputs = {at::randn({200, 48}), at::randn({100, 64})};
  const std::vector<at::Tensor> original = {at::randn({10, 48}), at::randn({7, 64})};
  const std::vector<at::Tensor> grads = {original[0].clone(), original[1].clone()};
  const double damping = 0.1;
  // Optional lists (bias_grads, permutations, row_counts) hold only what there is; *_layers says whose it is.
  const auto [info, damping_used] = correct.call(grads, {}, inputs, {}, {}, {}, {}, {}, /*layers=*/{0, 1},
                                                 /*groups=*/{8, 8}, damping, /*trace_scaling=*/false, /*chunk=*/64,
                                                 /*max_rows=*/10000, /*seed=*/0, /*step=*/0);
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor x = inputs[i].to(at::kDouble);
    const at::Tensor a = x.t().mm(x) / x.size(0) + damping * at::eye(x.size(1), at::kDouble);
    const at::Tensor expected = at::linalg_solve(a, original[i].to(at::kDouble).t()).t();
    const double error = (grads[i].to(at::kDouble) - expected).abs().max().item<double>();
    std::printf("layer %zu: info %d, error %.2g\n", i, info[static_cast<int64_t>(i)].item<int>(), error);
    if (!(error < 1e-4)) return 1;
  }

  try {
    correct.call(grads, {}, inputs, {}, {}, {}, {}, {}, {0, 1}, {8, 8}, damping, false, /*chunk=*/257, 10000, 0, 0);
  } catch (const std::exception& error) {  // not a c10::Error: the library uses torch's stable ABI
    std::printf("%s\n", error.what());
    return info.any().item<bool>() ? 1 : 0;
  }
  return 1;
}
