// Binds the fast ways of capture.cpp and step.cpp to the Python classes that they serve.
#include "torch_abi/host_path.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>

#include <initializer_list>

#include "torch_abi/torch_abi.h"

namespace consistency_ops::torch_abi {

HostPath host;
ternaryfunc call_in_python = nullptr;

namespace {

bool find(PyObject* type, std::initializer_list<Slot*> slots) {
  for (Slot* slot : slots) {
    if (!slot->find(type)) return false;
  }
  return true;
}

}  // namespace

// bind_host_path(address of a HostCalls, Capture, CaptureStates, Layer, LayerType, TransposedConvolution,
// InProjection): False if the library was built from other sources.  From now on a call of a Capture goes to C++ first.
PyObject* bind_host_path(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  unsigned long long address = 0;
  PyObject *capture = nullptr, *states = nullptr, *layer = nullptr, *kind = nullptr, *transposed = nullptr,
           *third = nullptr;
  if (!PyArg_ParseTuple(args, "KO!O!O!O!O!O!", &address, &PyType_Type, &capture, &PyType_Type, &states, &PyType_Type,
                        &layer, &PyType_Type, &kind, &PyType_Type, &transposed, &PyType_Type, &third)) {
    return nullptr;
  }
  const auto* calls = reinterpret_cast<const bindings::HostCalls*>(static_cast<uintptr_t>(address));
  if (calls->layout != bindings::kHostCallsLayout) Py_RETURN_FALSE;

  CaptureClass& c = host.capture;
  StatesClass& s = host.states;
  LayerClass& l = host.layer;
  const bool found =
      find(capture,
           {&c.states,      &c.index,          &c.seed,         &c.rows,       &c.width,       &c.state,      &c.count,
            &c.offered,     &c.is_double,      &c.room,         &c.taken,      &c.grown,       &c.mark_due,   &c.kept,
            &c.weight_name, &c.marked_offered, &c.unit_dim,     &c.waits,      &c.same_rows,   &c.last_width, &c.calls,
            &c.source,      &c.alone,          &c.lost,         &c.weight,     &c.mark_handle, &c.grad,       &c.plain,
            &c.restarted,   &c.position,       &c.marked_calls, &c.last_source}) &&
      find(states, {&s.stopped, &s.paused, &s.mask, &s.inputs, &s.layers}) &&
      find(layer, {&l.module, &l.kind, &l.index, &l.joins_bias, &l.tied, &l.capture, &l.info_slice, &l.damping_slice,
                   &l.unfit_gradient, &l.lost_rows, &l.inverse_units, &l.division_id, &l.pending});
  if (!found) return nullptr;
  const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  host.training = name("training");
  host.parameters = name("_parameters");
  host.bias = name("bias");
  host.matrix = name("matrix");
  host.packed = name("packed");
  host.id = name("id");
  host.position = name("position");
  host.groups = name("groups");
  host.part = name("part");
  if (PyErr_Occurred()) return nullptr;
  host.plain_keys = at::empty({0}, at::kFloat).unsafeGetTensorImpl()->key_set();
  for (PyObject* type : {capture, states, layer, kind, transposed, third}) Py_INCREF(type);  // for good, as this module
  c.type = reinterpret_cast<PyTypeObject*>(capture);
  s.type = reinterpret_cast<PyTypeObject*>(states);
  l.type = reinterpret_cast<PyTypeObject*>(layer);
  host.kind_type = reinterpret_cast<PyTypeObject*>(kind);
  host.transposed_type = reinterpret_cast<PyTypeObject*>(transposed);
  host.third_type = reinterpret_cast<PyTypeObject*>(third);
  host.calls = calls;
  if (c.type->tp_call != call_capture) {
    call_in_python = c.type->tp_call;
    c.type->tp_call = call_capture;
  }
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

// use_host_path(used): whether the kernels compute on the CPU, and not torch's operations in their place.  Returns what
// it was before.
PyObject* use_host_path(PyObject* /*module*/, PyObject* used) {
  const bool before = host.used;
  host.used = PyObject_IsTrue(used) == 1;
  return PyBool_FromLong(before);
}

}  // namespace consistency_ops::torch_abi
