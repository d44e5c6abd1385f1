// The host's part of a step: what consistency_ops/engine/layer_step.py and Correction.fused do for all layers, where
// all of them are the plain case.  consistency_ops/engine/host_path.py calls the three functions at the end.
#include "torch_abi/step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/describe.h"
#include "torch_abi/torch_abi.h"

namespace consistency_ops::torch_abi {
namespace {

enum class Look { kPlanned, kNothing, kPython };  // kNothing: this layer has nothing to correct in this step

PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* value = PyObject_GetAttr(object, name);
  if (value == nullptr) PyErr_Clear();
  return value;
}

// As LayerType.view and bias_view, which are views of the whole here, too.
void learn(PyObject* object, Kind& kind) {
  PyTypeObject* type = Py_TYPE(object);
  kind.of = object;
  kind.form = Kind::Form::kPython;
  kind.inverse_key = nullptr;
  kind.info_key = nullptr;
  if (type != host.kind_type && type != host.transposed_type && type != host.third_type) return;
  kind.bias = THPObjectPtr(attribute(object, host.bias));
  THPObjectPtr matrix(attribute(object, host.matrix)), packed(attribute(object, host.packed)),
      position(attribute(object, host.position));
  if (!kind.bias || matrix.get() != Py_None || !packed || !position || !PyLong_CheckExact(position.get())) return;
  kind.third = PyLong_AsLongLong(position.get());
  kind.third_of_bias = type == host.third_type;
  if (kind.third_of_bias && (kind.third < 0 || kind.third > 2)) return;
  if (packed.get() == Py_False) {
    kind.form = type == host.transposed_type ? Kind::Form::kTransposed : Kind::Form::kWhole;
  } else if (packed.get() == Py_True && type == host.third_type) {
    kind.form = Kind::Form::kThird;
  }
}

// A third of a tensor's first dimension; undefined if it has none.
at::Tensor third_of(const at::Tensor& whole, int64_t which) {
  const int64_t size = whole.dim() > 0 ? whole.size(0) / 3 : 0;
  return size > 0 && whole.size(0) == 3 * size ? whole.narrow(0, which * size, size) : at::Tensor();
}

// Transposed convolutions with one group; undefined if Python is to find it: with more it may be a copy.
at::Tensor transposed(const at::Tensor& whole, PyObject* module) {
  THPObjectPtr groups(attribute(module, host.groups));
  const bool one = groups && PyLong_CheckExact(groups.get()) && PyLong_AsLongLong(groups.get()) == 1;
  return one && whole.dim() > 1 ? whole.transpose(0, 1) : at::Tensor();
}

bool owns(PyObject* owned, PyObject* parameter) {
  if (owned == Py_None) return true;
  THPObjectPtr key(PyLong_FromVoidPtr(parameter));
  const int found = key ? PySet_Contains(owned, key.get()) : -1;
  if (found < 0) PyErr_Clear();
  return found == 1;
}

// The gradient of a parameter, if it can be corrected where it lies.
bool plain_gradient(const at::Tensor& grad) {
  if (!is_plain(grad)) return false;
  THPObjectPtr object(THPVariable_Wrap(grad));  // it may be of a subclass that only Python sees
  return object && is_tensor(object.get()) &&
         (grad.is_contiguous() || at::has_internal_overlap(grad) != at::MemOverlap::Yes);
}

// As Capture._follows: the weight is the one that was hooked, and is so still.
bool follows(PyObject* capture, PyObject* weight) {
  const CaptureClass& c = host.capture;
  PyObject *known = c.weight.get(capture), *handle = c.mark_handle.get(capture);
  if (known == nullptr || !PyLong_CheckExact(known) || handle == nullptr || handle == Py_None) return false;
  if (PyLong_AsVoidPtr(known) != weight) return false;
  PyObject* hooks = reinterpret_cast<THPVariable*>(weight)->post_accumulate_grad_hooks;
  THPObjectPtr hook(attribute(handle, host.id));
  return hook && hooks != nullptr && PyDict_Check(hooks) && PyDict_Contains(hooks, hook.get()) == 1;
}

// The bias of a layer that joins it to its units, if it has a gradient of this optimizer.
bool find_bias(PyObject* layer, Kind& kind, PyObject* parameters, PyObject* owned, at::Tensor& grad) {
  if (!host.layer.joins_bias.is_true(layer)) return true;
  PyObject* bias = kind.bias.get() == Py_None ? nullptr : PyDict_GetItemWithError(parameters, kind.bias.get());
  if (bias == nullptr || bias == Py_None) return true;
  if (!is_parameter(bias)) return false;
  if (!owns(owned, bias) || !THPVariable_Unpack(bias).grad().defined()) return true;
  grad = THPVariable_Unpack(bias).grad();
  if (!plain_gradient(grad) || grad.dim() != 1) return false;
  if (kind.third_of_bias) grad = third_of(grad, kind.third);
  return grad.defined();
}

void fetch_object(const void* object, int lines) {
  for (int i = 0; object != nullptr && i < lines; ++i) __builtin_prefetch(static_cast<const char*>(object) + 64 * i);
}

// Between two steps forward and backward pass have pushed all this out of the first caches.  What a layer needs hangs
// together by pointers, so it is fetched in three turns, while the layers before it are looked at.
void fetch_ahead(PyObject* layers, Py_ssize_t i) {
  const LayerClass& l = host.layer;
  const CaptureClass& c = host.capture;
  const auto layer_at = [&](Py_ssize_t at) {
    PyObject* layer = at < PyList_GET_SIZE(layers) ? PyList_GET_ITEM(layers, at) : nullptr;
    return layer != nullptr && Py_TYPE(layer) == l.type ? layer : nullptr;
  };
  const auto capture_of = [&](PyObject* layer) {
    PyObject* capture = layer == nullptr ? nullptr : l.capture.get(layer);
    return capture != nullptr && Py_TYPE(capture) == c.type ? capture : nullptr;
  };
  if (i + 6 < PyList_GET_SIZE(layers)) fetch_object(PyList_GET_ITEM(layers, i + 6), 3);
  if (PyObject* layer = layer_at(i + 4)) {
    fetch_object(l.capture.get(layer), 7);
    fetch_object(l.module.get(layer), 1);
  }
  if (PyObject* capture = capture_of(layer_at(i + 2))) {
    fetch_object(c.rows.get(capture), 1);
    fetch_object(c.count.get(capture), 1);
    fetch_object(c.mark_handle.get(capture), 1);
    PyObject* weight = c.weight.get(capture);  // its id
    if (weight != nullptr && PyLong_CheckExact(weight)) fetch_object(PyLong_AsVoidPtr(weight), 2);
  }
  if (PyObject* capture = capture_of(layer_at(i + 1))) {
    for (const Slot* slot : {&c.rows, &c.count}) {
      if (const at::Tensor* tensor = tensor_in(*slot, capture)) fetch_object(tensor->unsafeGetTensorImpl(), 3);
    }
  }
}

// state: the optimizer's, by parameter, where the matrices of the last refresh are applied; null for the rows of this
// step.
Look look(PyObject* layer, PyObject* owned, int64_t chunk, int64_t group, PyObject* state, Kind& kind, Planned& found,
          PreconditionLayer& p) {
  const LayerClass& l = host.layer;
  const CaptureClass& c = host.capture;
  PyObject *capture = l.capture.get(layer), *tied = l.tied.get(layer);
  if (capture == nullptr || Py_TYPE(capture) != c.type) return Look::kPython;
  if (state != nullptr && (c.waits.is_true(capture) || !c.source.is(capture, Py_None))) return Look::kPython;
  if (kind.of != l.kind.get(layer)) learn(l.kind.get(layer), kind);
  if (kind.form == Kind::Form::kPython) return Look::kPython;
  THPObjectPtr module(referent(l.module.get(layer)));
  THPObjectPtr parameters(module ? attribute(module.get(), host.parameters) : nullptr);
  if (!parameters || !PyDict_CheckExact(parameters.get()) || !PyUnicode_Check(tied)) return Look::kPython;
  PyObject* weight_object = PyDict_GetItemWithError(parameters.get(), c.weight_name.get(capture));
  if (weight_object == nullptr || !is_parameter(weight_object)) return Look::kPython;
  if (PyUnicode_GET_LENGTH(tied) > 0 || !owns(owned, weight_object)) return Look::kNothing;

  const at::Tensor& weight = THPVariable_Unpack(weight_object);
  PyObject* source = c.source.get(capture);
  if (source == nullptr || source == Py_None) source = capture;
  PyObject* kept = c.kept.get(source);
  const bool plain = weight.requires_grad() && is_plain(weight) && follows(capture, weight_object) &&
                     Py_TYPE(source) == c.type && !c.lost.is_true(capture) && !l.lost_rows.is_true(layer) &&
                     !l.unfit_gradient.is_true(layer) && c.calls.integer(source, -1) == c.calls.integer(capture, -2) &&
                     kept != nullptr && PyList_Check(kept) && PyList_GET_SIZE(kept) == 0 &&
                     c.restarted.integer(source, 1) == 0 &&
                     c.is_double.is_true(capture) == (weight.scalar_type() == at::kDouble);
  if (!plain) return Look::kPython;
  const at::Tensor& whole = weight.grad();
  if (!whole.defined()) return Look::kNothing;
  if (!plain_gradient(whole)) return Look::kPython;
  switch (kind.form) {
    case Kind::Form::kThird:
      found.grad = third_of(whole, kind.third);
      break;
    case Kind::Form::kTransposed:
      found.grad = transposed(whole, module.get());
      break;
    default:
      found.grad = whole;
  }
  if (!found.grad.defined()) return Look::kPython;

  const at::Tensor &grad = found.grad, *rows = tensor_in(c.rows, source), *count = tensor_in(c.count, source);
  if (state == nullptr && (rows == nullptr || count == nullptr || !is_plain(*rows) || !is_plain(*count))) {
    return Look::kPython;
  }
  if (!find_bias(layer, kind, parameters.get(), owned, found.bias_grad)) return Look::kPython;
  if (grad.dim() < 2 || grad.dim() > 2 + kMaxTapDims || grad.size(1) == 0) return Look::kPython;
  if (state == nullptr && (rows->dim() != 2 || rows->size(0) == 0)) return Look::kPython;
  const int64_t width = state == nullptr ? rows->size(1) : c.width.integer(capture, 0);
  found.convolution_groups = width / grad.size(1);
  const bool sizes_fit = width > 0 && found.convolution_groups * grad.size(1) == width &&
                         (grad.dim() > 2 || found.convolution_groups == 1) &&
                         grad.size(0) % found.convolution_groups == 0 &&
                         (!found.bias_grad.defined() || found.bias_grad.size(0) == grad.size(0));
  if (!sizes_fit) return Look::kPython;

  found.layer = THPObjectPtr(Py_NewRef(layer));
  bindings::set_grad(p, grad, found.convolution_groups, "foreach_precondition_");
  if (found.bias_grad.defined()) bindings::set_bias(p, found.bias_grad, "foreach_precondition_");
  p.layer = static_cast<uint32_t>(l.index.integer(layer, 0));
  for (int64_t& size : p.x_row_size) size = 1;
  if (state != nullptr) {
    found.is_double = c.is_double.is_true(capture);
    return find_stored(layer, state, weight_object, chunk, group, kind, found, p) ? Look::kPlanned : Look::kPython;
  }
  found.rows = *rows;
  found.count = *count;
  found.rows_id = reinterpret_cast<int64_t>(c.rows.get(source));
  found.is_double = rows->scalar_type() == at::kDouble;
  p.x = rows->const_data_ptr();
  p.x_row_size[kMaxRowDims - 1] = rows->size(0);
  p.x_row_stride[kMaxRowDims - 1] = rows->size(1);
  p.x_unit_stride = 1;
  p.x_dtype = bindings::dtype_of(*rows, "foreach_precondition_", "inputs");
  p.row_count = count->const_data_ptr<int64_t>();
  p.group = group_of(p, group, chunk);
  return Look::kPlanned;
}

// As in_order_of_input of layer_step.py.
void put_same_rows_together(Plan& plan) {
  std::map<std::tuple<int64_t, bool, DType>, size_t> run_of;
  std::vector<std::vector<size_t>> runs;
  for (size_t i = 0; i < plan.layers.size(); ++i) {
    const PreconditionLayer& p = plan.problems[i];
    const bool alone = plan.layers[i].convolution_groups != 1;
    const int64_t id = alone ? -1 - static_cast<int64_t>(i) : plan.layers[i].rows_id;
    const auto [at, is_new] = run_of.try_emplace({id, p.has_bias, p.g_dtype}, runs.size());
    if (is_new) runs.emplace_back();
    runs[at->second].push_back(i);
  }
  Plan ordered;
  ordered.layers.reserve(plan.layers.size());
  ordered.problems.reserve(plan.layers.size());
  for (const auto& run : runs) {
    const uint32_t division = plan.problems[run.front()].layer;
    for (size_t i : run) {
      ordered.layers.push_back(std::move(plan.layers[i]));
      ordered.problems.push_back(plan.problems[i]);
      ordered.problems.back().layer = division;
    }
  }
  plan.layers.swap(ordered.layers);
  plan.problems.swap(ordered.problems);
}

bool gradients_overlap(const std::vector<Planned>& plan) {
  std::vector<std::pair<const char*, const char*>> extents;
  extents.reserve(2 * plan.size());
  for (const Planned& planned : plan) {
    for (const at::Tensor* tensor : {&planned.grad, &planned.bias_grad}) {
      if (!tensor->defined() || tensor->numel() == 0 || !tensor->is_contiguous()) continue;
      const char* begin = static_cast<const char*>(tensor->const_data_ptr());
      extents.emplace_back(begin, begin + tensor->nbytes());
    }
  }
  return bindings::overlap(extents);
}

void forget(PyObject* capsule) { delete static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlan)); }

}  // namespace

bool set_slice(const Slot& slot, PyObject* layer, PyObject* tensor, int64_t begin, int64_t end) {
  THPObjectPtr first(PyLong_FromLongLong(begin)), last(PyLong_FromLongLong(end));
  THPObjectPtr slice(first && last ? PyTuple_Pack(3, tensor, first.get(), last.get()) : nullptr);
  if (slice) slot.set(layer, slice.get());
  return static_cast<bool>(slice);
}

// plan_step(layers, owned, chunk, group, state): what this step corrects, to be given to run_step, or to run_stored if
// there is a state; None if a layer is not the plain case or there is nothing to correct.  owned: a frozenset of the
// ids of the optimizer's parameters, or None for all; group: 0 for the default; state: the optimizer's dictionary, in
// which the matrices are that are to be applied, or None to correct by the rows of this step.  Changes nothing.
PyObject* plan_step(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *layers = nullptr, *owned = nullptr, *state = nullptr;
  long long chunk = 0, group = 0;
  if (!PyArg_ParseTuple(args, "O!OLLO", &PyList_Type, &layers, &owned, &chunk, &group, &state)) return nullptr;
  if (state == Py_None) {
    state = nullptr;
  } else if (!PyDict_Check(state)) {
    Py_RETURN_NONE;
  }
  if (host.calls == nullptr || !host.used || (owned != Py_None && !PyFrozenSet_CheckExact(owned)) || !unwatched()) {
    Py_RETURN_NONE;
  }
  auto plan = std::make_unique<Plan>();
  plan->layers.reserve(PyList_GET_SIZE(layers));
  plan->problems.reserve(PyList_GET_SIZE(layers));
  bool shared = false;
  Kind kind;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(layers); ++i) {
    PyObject* layer = PyList_GET_ITEM(layers, i);
    if (Py_TYPE(layer) != host.layer.type) Py_RETURN_NONE;
    fetch_ahead(layers, i);
    Planned& planned = plan->layers.emplace_back();
    const Look seen = look(layer, owned, chunk, group, state, kind, planned, plan->problems.emplace_back());
    if (seen == Look::kPython || (seen == Look::kPlanned && planned.is_double != plan->layers.front().is_double)) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (seen == Look::kNothing) {
      plan->layers.pop_back();
      plan->problems.pop_back();
      plan->others.emplace_back(Py_NewRef(layer));
      continue;
    }
    shared = shared || !host.capture.source.is(host.layer.capture.get(layer), Py_None);
  }
  if (plan->layers.empty() || gradients_overlap(plan->layers)) Py_RETURN_NONE;
  if (shared) put_same_rows_together(*plan);
  PyObject* capsule = PyCapsule_New(plan.get(), kPlan, forget);
  if (capsule != nullptr) plan.release();
  return capsule;
  END_HANDLE_TH_ERRORS
}

// run_step(plan, damping, trace_scaling, chunk, max_rows, seed, step): corrects the gradients, and tells the layers as
// Correction.record_outcome does.  False: the kernel refused, with nothing written.
PyObject* run_step(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* capsule = nullptr;
  double damping = 0;
  int trace_scaling = 0;
  long long chunk = 0, max_rows = 0, seed = 0, step = 0;
  if (!PyArg_ParseTuple(args, "OdpLLLL", &capsule, &damping, &trace_scaling, &chunk, &max_rows, &seed, &step)) {
    return nullptr;
  }
  auto* plan = static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlan));
  if (plan == nullptr) return nullptr;
  PreconditionOptions options;
  options.damping = damping;
  options.trace_scaling = trace_scaling != 0;
  options.chunk = static_cast<int32_t>(chunk);
  options.max_rows = max_rows;
  options.seed = static_cast<uint64_t>(seed);
  options.step = static_cast<uint64_t>(step);

  int64_t chunks = 0;
  bool has_groups = false;
  for (size_t i = 0; i < plan->layers.size(); ++i) {
    const Planned& planned = plan->layers[i];
    options.float64 = options.float64 || planned.is_double || plan->problems[i].g_dtype == DType::kFloat64;
    chunks += planned.convolution_groups * num_chunks(plan->problems[i], options);
    has_groups = has_groups || planned.convolution_groups > 1;
  }
  std::vector<PreconditionLayer> groups;  // one a group of a convolution
  for (size_t i = 0; has_groups && i < plan->layers.size(); ++i) {
    PreconditionLayer problem = plan->problems[i];
    for (int64_t g = 0; g < plan->layers[i].convolution_groups; ++g, bindings::to_next_group(problem))
      groups.push_back(problem);
  }
  std::vector<PreconditionLayer>& problems = has_groups ? groups : plan->problems;
  bindings::find_same_inputs(problems);
  const at::Tensor info = at::empty({chunks}, at::kInt), used = at::empty({chunks}, at::kFloat);
  int64_t begin = 0;
  for (PreconditionLayer& problem : problems) {
    problem.info = info.mutable_data_ptr<int32_t>() + begin;
    problem.damping_used = used.mutable_data_ptr<float>() + begin;
    begin += num_chunks(problem, options);
  }
  Status status = Status::kOk;
  {
    const pybind11::gil_scoped_release released;
    status = host.calls->precondition(problems.data(), static_cast<int64_t>(problems.size()), options);
  }
  if (status != Status::kOk) Py_RETURN_FALSE;

  THPObjectPtr info_object(THPVariable_Wrap(info)), used_object(THPVariable_Wrap(used));
  if (!info_object || !used_object) return nullptr;
  begin = 0;
  for (size_t i = 0; i < plan->layers.size(); ++i) {
    const LayerClass& l = host.layer;
    PyObject* layer = plan->layers[i].layer.get();
    const PreconditionLayer& p = plan->problems[i];
    const int64_t end = begin + plan->layers[i].convolution_groups * num_chunks(p, options);
    const bool told = set_slice(l.info_slice, layer, info_object.get(), begin, end) &&
                      set_slice(l.damping_slice, layer, used_object.get(), begin, end) &&
                      l.inverse_units.set_integer(layer, p.units + (p.has_bias ? 1 : 0)) &&
                      l.division_id.set_integer(layer, p.layer);
    if (!told) return nullptr;
    begin = end;
  }
  for (THPObjectPtr& layer : plan->others) host.layer.info_slice.set(layer.get(), Py_None);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// begin_step(layers, finished): Capture.begin_step of every layer, in their order; False if Python is to do it.
PyObject* begin_step(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *layers = nullptr, *finished = nullptr;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &layers, &PyBool_Type, &finished)) return nullptr;
  if (host.calls == nullptr || !host.used) Py_RETURN_FALSE;
  const CaptureClass& c = host.capture;
  THPObjectPtr zero(PyLong_FromLong(0)), method(PyUnicode_InternFromString("begin_step"));
  if (!zero || !method) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(layers); ++i) {
    THPObjectPtr capture(Py_XNewRef(host.layer.capture.get(PyList_GET_ITEM(layers, i))));
    if (!capture || capture.get() == Py_None) continue;
    PyObject* self = capture.get();
    PyObject* kept = c.kept.get(self);
    if (c.grown.is_true(self) || kept == nullptr || !PyList_CheckExact(kept) || PyList_GET_SIZE(kept) > 0) {
      THPObjectPtr done(PyObject_CallMethodOneArg(self, method.get(), finished));
      if (!done) return nullptr;
      continue;
    }
    if (finished == Py_True) {
      PyObject* source = c.source.get(self);
      c.last_source.set(self, c.index.get(source == Py_None ? self : source));
    }
    for (const Slot* slot : {&c.offered, &c.marked_offered, &c.calls, &c.marked_calls, &c.restarted}) {
      slot->set(self, zero.get());
    }
    for (const Slot* slot : {&c.mark_due, &c.lost, &c.plain}) slot->set(self, Py_False);
    for (const Slot* slot : {&c.source, &c.grad}) slot->set(self, Py_None);
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// reset_states(state, last, step, paused, finished): the tensors of one device in CaptureStates.reset; False if Python
// is to do it.  paused: None if it is what it was.
PyObject* reset_states(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *state_object = nullptr, *last_object = nullptr, *paused = nullptr, *finished = nullptr;
  long long step = 0;
  if (!PyArg_ParseTuple(args, "OOLOO!", &state_object, &last_object, &step, &paused, &PyBool_Type, &finished)) {
    return nullptr;
  }
  if (host.calls == nullptr || !host.used || !is_tensor(state_object) || !is_tensor(last_object) || !unwatched()) {
    Py_RETURN_FALSE;
  }
  const at::Tensor &state = THPVariable_Unpack(state_object), &last = THPVariable_Unpack(last_object);
  const bool fits = is_plain(state) && is_plain(last) && state.is_contiguous() && last.is_contiguous() &&
                    state.scalar_type() == at::kLong && last.scalar_type() == at::kLong && state.dim() == 2 &&
                    state.size(1) == kCaptureStateSize && state.sizes() == last.sizes();
  if (!fits) Py_RETURN_FALSE;
  auto* entries = static_cast<CaptureState*>(state.mutable_data_ptr());
  const int64_t count = state.size(0);
  if (finished == Py_True && count > 0) std::memcpy(last.mutable_data_ptr(), entries, state.nbytes());
  for (int64_t i = 0; i < count; ++i) {
    CaptureState& entry = entries[i];
    entry.used = entry.seen = entry.stride = entry.next = entry.mark = entry.thinned = entry.forward = 0;
    entry.step = step;
    if (paused != Py_None) entry.paused = paused == Py_True ? 1 : 0;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace consistency_ops::torch_abi
