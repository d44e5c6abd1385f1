// Corrects two gradients in place through torch's dispatcher, without Python, and compares with torch's own solve.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <vector>

namespace {

// Calls an operator with arguments by name; later versions may add arguments, which have defaults.
c10::Stack call(const c10::OperatorHandle& op, const std::map<std::string, c10::IValue>& given) {
  c10::Stack stack;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto found = given.find(argument.name());
    stack.push_back(found != given.end() ? found->second : argument.default_value().value());
  }
  op.callBoxed(stack);
  return stack;
}

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

  at::manual_seed(0);
  const std::vector<at::Tensor> inputs = {at::randn({200, 48}), at::randn({100, 64})};
  const std::vector<at::Tensor> original = {at::randn({10, 48}), at::randn({7, 64})};
  const std::vector<at::Tensor> grads = {original[0].clone(), original[1].clone()};
  const double damping = 0.1;
  // Optional lists (bias_grads, permutations, row_counts) hold only what there is; *_layers says whose it is.
  const std::vector<at::Tensor> no_tensors;
  const std::vector<int64_t> no_layers;
  // Made anew for every call: lists are handed over to the operator.
  const auto arguments = [&](int64_t chunk) -> std::map<std::string, c10::IValue> {
    return {
        {"grads", grads},
        {"bias_grads", no_tensors},
        {"inputs", inputs},
        {"permutations", no_tensors},
        {"row_counts", no_tensors},
        {"bias_layers", no_layers},
        {"permutation_layers", no_layers},
        {"row_count_layers", no_layers},
        {"layers", std::vector<int64_t>{0, 1}},
        {"groups", std::vector<int64_t>{8, 8}},
        {"damping", damping},
        {"trace_scaling", false},
        {"chunk", chunk},
        {"max_rows", 10000},
        {"seed", 0},
        {"step", 0},
    };
  };
  const at::Tensor info = call(*handle, arguments(64))[0].toTensor();  // [1]: the damping that every chunk needed
  for (size_t i = 0; i < grads.size(); ++i) {
    const at::Tensor x = inputs[i].to(at::kDouble);
    const at::Tensor a = x.t().mm(x) / x.size(0) + damping * at::eye(x.size(1), at::kDouble);
    const at::Tensor expected = at::linalg_solve(a, original[i].to(at::kDouble).t()).t();
    const double error = (grads[i].to(at::kDouble) - expected).abs().max().item<double>();
    std::printf("layer %zu: info %d, error %.2g\n", i, info[static_cast<int64_t>(i)].item<int>(), error);
    if (!(error < 1e-4)) return 1;
  }

  try {
    call(*handle, arguments(257));
  } catch (const std::exception& error) {  // not a c10::Error: the library uses torch's stable ABI
    std::printf("%s\n", error.what());
    return info.any().item<bool>() ? 1 : 0;
  }
  return 1;
}
