// The modulus as a C++ node of autograd.
//
// For a thousand elements the Python of an autograd function costs more than both kernels.  This node does the plain
// case: a dense real tensor that needs a gradient, outside every transform and mode.  consistency_ops/ops/modulus.py
// does all else, also a backward that is differentiated or transformed itself.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>

#include "torch_abi/torch_abi.h"

namespace {

using at::Tensor;
using torch::autograd::InputMetadata;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::IValuePacker;
using torch::dynamo::autograd::SwapSavedVariables;
using Strides = c10::SmallVector<int64_t, 5>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> forward_operator(const Tensor& x) {
  static const auto op =
      find_operator<std::tuple<Tensor, Tensor>(const Tensor&, int64_t)>("consistency_ops::modulus_forward");
  const at::AutoDispatchBelowAutograd guard;
  return op.call(x, 0);
}

Tensor backward_operator(const Tensor& grad, const Tensor& signs, at::IntArrayRef strides) {
  if (!grad.defined()) return grad;
  static const auto op =
      find_operator<Tensor(const Tensor&, const Tensor&, at::OptionalIntArrayRef)>("consistency_ops::modulus_backward");
  const at::AutoDispatchBelowAutograd guard;
  return op.call(grad, signs, strides);
}

bool transforming() {  // as torch._C._are_functorch_transforms_active
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

struct ModulusBackward final : Node {
  SavedVariable signs;
  Strides strides;  // of the result of the forward

  std::string name() const override { return "ModulusBackward"; }

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    const Tensor bits = unpack();
    if (!grad.defined()) return {grad};
    const bool differentiated = at::GradMode::is_enabled() && grad.requires_grad();
    if (differentiated || transforming() || has_tangent(grad)) {
      const pybind11::gil_scoped_acquire gil;
      const pybind11::tuple layout = pybind11::cast(std::vector<int64_t>(strides.begin(), strides.end()));
      const auto flip = pybind11::module_::import("consistency_ops.ops.modulus").attr("_flip");
      return {flip(grad, bits, layout).cast<Tensor>()};
    }
    return {backward_operator(grad, bits, strides)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    signs.reset_data();
  }

  // Compiled autograd: what to specialise on, and the call that goes into its graph.
  void compiled_args(CompiledNodeArgs& args) const override {
    args.collect(signs, /*is_output=*/false);
    args.collect(std::vector<int64_t>(strides.begin(), strides.end()));
  }

  variable_list apply_with_saved(const variable_list& grads, SwapSavedVariables& saved) override {
    saved.before(signs);
    const std::vector<c10::IValue> arguments = {unpack(), at::IntArrayRef(strides)};
    const auto outputs = IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(
        torch::dynamo::autograd::get_input_metadata(next_edges()));
    const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
    const std::string bound = compiler->bind_function(
        saved.get_py_compiler(), name(),
        [](const variable_list& grads, const std::vector<c10::IValue>& arguments) -> variable_list {
          return {backward_operator(grads[0], arguments[0].toTensor(), arguments[1].toIntVector())};
        },
        {arguments[0].type(), arguments[1].type()}, /*is_custom_function=*/true, /*is_traceable=*/true);
    auto result =
        compiler->call_function(saved.get_py_compiler(), "apply_functional", bound, grads, arguments, outputs);
    saved.after(signs);
    return result;
  }

 private:
  Tensor unpack() {
    const std::lock_guard<std::mutex> lock(mutex_);  // two threads may run backward over one graph
    return signs.unpack();
  }
};

// Nodes are held by shared_ptr in older releases of torch, by intrusive_ptr in newer ones.
template <typename Pointer>
Pointer own(ModulusBackward* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return Pointer(node, [](auto* last) { deleteNode(last); });  // not by recursion along the graph
  } else {
    return Pointer::unsafe_steal_from_new(node);
  }
}

bool is_plain_case(PyObject* object) {
  if (!THPVariable_CheckExact(object) || !at::GradMode::is_enabled()) return false;
  const Tensor& x = THPVariable_Unpack(object);
  const at::ScalarType type = x.scalar_type();
  return x.requires_grad() && x.layout() == at::kStrided && !x.is_nested() &&
         (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf) && !transforming() &&
         !has_tangent(x) && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::impl::torch_function_mode_enabled() && !at::tracer::impl::is_dispatch_enabled();
}

}  // namespace

PyObject* consistency_ops::torch_abi::modulus(PyObject* /*module*/, PyObject* object) {
  HANDLE_TH_ERRORS
  if (!is_plain_case(object)) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(object);
  Tensor y;
  {
    const pybind11::gil_scoped_release no_gil;
    auto* node = new ModulusBackward();
    const auto owner = own<decltype(torch::autograd::Edge::function)>(node);
    node->set_next_edges(torch::autograd::collect_next_edges(x));
    Tensor bits;
    std::tie(y, bits) = forward_operator(x);
    node->signs = SavedVariable(bits, /*is_output=*/false);
    node->strides.assign(y.strides().begin(), y.strides().end());
    torch::autograd::set_history(y, owner);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}
