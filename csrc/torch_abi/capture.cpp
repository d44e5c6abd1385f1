// The forward pre-hook of a layer: consistency_ops/engine/capture.py, Capture.__call__, for the plain case.
//
// A hook is an object of the Python class, as without this file; only its call (tp_call) goes here first.  Dynamo looks
// at the class and traces the Python body.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "bindings/describe.h"
#include "torch_abi/host_path.h"

namespace consistency_ops::torch_abi {

bool unwatched() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         !at::tracer::impl::is_dispatch_enabled() && !at::hasCallbacks();
}

namespace {

constexpr int64_t kReleaseBytes =
    1 << 16;  // below this, other threads wait for the interpreter less than a switch takes

enum class Outcome { kDone, kPython, kError };  // kPython: nothing has changed

// Whether this object's attribute is true, False or something else.
std::optional<bool> truth(PyObject* object, PyObject* name) {
  THPObjectPtr value(PyObject_GetAttr(object, name));
  if (!value) PyErr_Clear();
  if (value.get() == Py_True) return true;
  if (value.get() == Py_False) return false;
  return std::nullopt;
}

// The weight that its module has now, as a new reference; null if it is not simply a parameter.
PyObject* weight_of(PyObject* self, PyObject* module) {
  THPObjectPtr parameters(PyObject_GetAttr(module, host.parameters));
  if (!parameters) PyErr_Clear();
  if (!parameters || !PyDict_CheckExact(parameters.get())) return nullptr;
  PyObject* weight = PyDict_GetItemWithError(parameters.get(), host.capture.weight_name.get(self));
  if (weight == nullptr) PyErr_Clear();
  return weight != nullptr && is_parameter(weight) ? Py_NewRef(weight) : nullptr;
}

// Whether the rows of x are as wide as the buffer, or would be if there were one, and of a type that it can have.
bool fits(PyObject* self, const at::Tensor& x) {
  const CaptureClass& c = host.capture;
  const at::Tensor* state = tensor_in(c.state, self);
  const int64_t dim = x.dim() + c.unit_dim.integer(self, 0), width = c.width.integer(self, -1);
  if (state == nullptr || !is_plain(*state) || dim < 0 || dim >= x.dim() || width < 1 || x.size(dim) != width)
    return false;
  const at::ScalarType type = x.scalar_type();
  const bool half = type == at::kBFloat16 || type == at::kHalf;
  return c.last_width.integer(self, -1) == width && (half || type == at::kFloat || type == at::kDouble) &&
         (type != at::kDouble || c.is_double.is_true(self));
}

// Whether the rows of this call, which fit, go into the buffer as it is.
bool describe(PyObject* self, const at::Tensor& x, CaptureProblem& problem) {
  const CaptureClass& c = host.capture;
  const at::Tensor *rows = tensor_in(c.rows, self), *state = tensor_in(c.state, self);
  const int64_t dim = x.dim() + c.unit_dim.integer(self, 0), width = x.size(dim), index = c.index.integer(self, -1);
  if (rows == nullptr || !is_plain(*rows) || rows->size(1) != width || index < 0 || index >= state->size(0))
    return false;
  PyObject* dtype = reinterpret_cast<PyObject*>(torch::getTHPDtype(x.scalar_type()));
  if (!c.taken.is(self, dtype) || x.numel() == 0 ||
      c.offered.integer(self, 0) + x.numel() / width > c.room.integer(self, -1)) {
    return false;
  }
  if (!bindings::collapse(x, dim, 0, kMaxCaptureDims, problem.row_size, problem.row_stride)) return false;
  problem.x = x.const_data_ptr();
  problem.unit_stride = x.stride(dim);
  problem.units = width;
  problem.x_dtype = bindings::dtype_of(x, "capture_rows_", "x");
  problem.rows_dtype = bindings::dtype_of(*rows, "capture_rows_", "rows");
  problem.rows = rows->mutable_data_ptr();
  problem.capacity = rows->size(0);
  problem.state = static_cast<CaptureState*>(state->mutable_data_ptr()) + index;
  problem.layer = static_cast<uint32_t>(index);
  problem.seed = static_cast<uint64_t>(c.seed.integer(self, 0));
  problem.in_backward = false;
  problem.marks = c.mark_due.is_true(self);
  return true;
}

// An input, and who has captured it in this step: an entry of CaptureStates.inputs.
struct Input {
  PyObject* object;
  const at::Tensor& x;
  PyObject* inputs;
  THPObjectPtr key;
  int64_t version, calls;  // `calls`: of the layer, with this one
};

// As Capture._shares: another layer has captured this tensor in this call, and `self` has not.
bool shares(PyObject* self, Input& input, PyObject* seen) {
  const CaptureClass& c = host.capture;
  if (!PyTuple_CheckExact(seen) || PyTuple_GET_SIZE(seen) != 4) return false;
  THPObjectPtr before(referent(PyTuple_GET_ITEM(seen, 0)));
  if (before.get() != input.object || PyLong_AsLongLong(PyTuple_GET_ITEM(seen, 1)) != input.version) return false;
  PyObject* source = PyTuple_GET_ITEM(seen, 2);
  const int64_t call = PyLong_AsLongLong(PyTuple_GET_ITEM(seen, 3));
  return source != self && Py_TYPE(source) == c.type && !c.alone.is_true(self) &&
         c.unit_dim.integer(source, 0) == c.unit_dim.integer(self, 1) &&
         c.is_double.get(source) == c.is_double.get(self) && c.calls.integer(source, -1) == call &&
         call == input.calls && (call == 1 || c.source.is(self, source));
}

// Writes the call down: what is left of Capture._shares, and the bookkeeping of Capture._put.
Outcome take_down(PyObject* self, PyObject* states, Input& input, const CaptureProblem& problem) {
  const CaptureClass& c = host.capture;
  THPObjectPtr weak(PyWeakref_NewRef(input.object, nullptr));
  if (!weak) return Outcome::kError;
  THPObjectPtr entry(Py_BuildValue("(OLOL)", weak.get(), static_cast<long long>(input.version), self,
                                   static_cast<long long>(input.calls)));
  if (!entry) return Outcome::kError;
  if (PyDict_GET_SIZE(input.inputs) > 2 * host.states.layers.integer(states, 0)) PyDict_Clear(input.inputs);
  if (PyDict_SetItem(input.inputs, input.key.get(), entry.get()) < 0) return Outcome::kError;
  c.plain.set(self, Py_True);
  const int64_t offered = c.offered.integer(self, 0);
  if (problem.marks) {
    c.mark_due.set(self, Py_False);
    if (!c.marked_offered.set_integer(self, offered)) return Outcome::kError;
  }
  const bool written =
      c.calls.set_integer(self, input.calls) && c.offered.set_integer(self, offered + input.x.numel() / problem.units);
  return written ? Outcome::kDone : Outcome::kError;
}

Outcome capture(PyObject* self, PyObject* module, PyObject* args) {
  const CaptureClass& c = host.capture;
  PyObject* states = c.states.get(self);
  if (states == nullptr || Py_TYPE(states) != host.states.type) return Outcome::kPython;
  const std::optional<bool> training = truth(module, host.training);
  if (!training.has_value()) return Outcome::kPython;
  if (!*training) return Outcome::kDone;
  THPObjectPtr weight(weight_of(self, module));
  if (!weight) return Outcome::kPython;
  if (!at::GradMode::is_enabled() || !THPVariable_Unpack(weight.get()).requires_grad()) return Outcome::kDone;

  const int64_t position = c.position.integer(self, -1);
  if (position < 0 || position >= PyTuple_GET_SIZE(args)) return Outcome::kPython;
  PyObject* object = PyTuple_GET_ITEM(args, position);
  if (!is_tensor(object) || c.same_rows.is(self, Py_None)) return Outcome::kPython;
  const at::Tensor& x = THPVariable_Unpack(object);
  if (!is_plain(x) || !host.states.mask.is(states, Py_None) || !unwatched()) return Outcome::kPython;
  if (host.states.stopped.is_true(states) || (host.states.paused.is_true(states) && !c.waits.is_true(self))) {
    return Outcome::kDone;
  }
  if (torch::autograd::get_current_graph_task_id() != -1) return Outcome::kPython;  // perhaps a recomputation
  if (!fits(self, x)) return Outcome::kPython;

  PyObject* inputs = host.states.inputs.get(states);
  if (inputs == nullptr || !PyDict_CheckExact(inputs)) return Outcome::kPython;
  Input input{object,
              x,
              inputs,
              THPObjectPtr(PyLong_FromVoidPtr(object)),
              x.is_inference() ? 0 : static_cast<int64_t>(x._version()),
              c.calls.integer(self, 0) + 1};
  if (!input.key) return Outcome::kError;
  PyObject* seen = PyDict_GetItemWithError(inputs, input.key.get());
  if (seen != nullptr && shares(self, input, seen)) {
    c.source.set(self, PyTuple_GET_ITEM(seen, 2));
    return c.calls.set_integer(self, input.calls) ? Outcome::kDone : Outcome::kError;
  }
  CaptureProblem problem{};
  // With a source it goes on alone from here, with a copy of the rows.
  if (!c.source.is(self, Py_None) || !describe(self, x, problem)) return Outcome::kPython;
  const Outcome outcome = take_down(self, states, input, problem);
  if (outcome != Outcome::kDone) return outcome;

  // References, because another thread may take the buffer away while the interpreter is free.
  const at::Tensor kept[] = {x, *tensor_in(c.rows, self), *tensor_in(c.state, self)};
  std::optional<pybind11::gil_scoped_release> released;
  if (static_cast<int64_t>(x.nbytes()) >= kReleaseBytes) released.emplace();
  const Status status = host.calls->capture_rows(problem);
  released.reset();
  TORCH_CHECK(status == Status::kOk, "capture_rows_: the arguments break a bound that consistency_ops.ops checks");
  return Outcome::kDone;
}

}  // namespace

PyObject* call_capture(PyObject* self, PyObject* args, PyObject* kwargs) {
  HANDLE_TH_ERRORS
  const bool fits = host.calls != nullptr && host.used && Py_TYPE(self) == host.capture.type &&
                    (kwargs == nullptr || PyDict_GET_SIZE(kwargs) == 0) && PyTuple_GET_SIZE(args) == 3 &&
                    PyTuple_CheckExact(PyTuple_GET_ITEM(args, 1));
  if (fits) {
    const Outcome outcome = capture(self, PyTuple_GET_ITEM(args, 0), PyTuple_GET_ITEM(args, 1));
    if (outcome == Outcome::kError) return nullptr;
    if (outcome == Outcome::kDone) Py_RETURN_NONE;
  }
  return call_in_python(self, args, kwargs);
  END_HANDLE_TH_ERRORS
}

}  // namespace consistency_ops::torch_abi
