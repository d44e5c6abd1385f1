// What the fast ways of row capture (capture.cpp) and of a step (step.cpp) know of the Python classes they serve.
//
// Both do the plain case only: parameters and dense tensors of the CPU, nobody who watches the operators (modes,
// transforms, tracing, the profiler).  They look first and change nothing before they are sure; for everything else
// they leave the call to the Python code, which is the definition.
#pragma once

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include "bindings/host_calls.h"
#include "torch_abi/slots.h"

namespace consistency_ops::torch_abi {

// consistency_ops/engine/capture.py and row_buffer.py
struct CaptureClass {
  PyTypeObject* type = nullptr;
  Slot states{"states"}, index{"index"}, seed{"seed"}, rows{"rows"}, width{"width"}, state{"state"}, count{"count"},
      offered{"offered"}, is_double{"_double"}, room{"_room"}, taken{"_taken"}, grown{"_grown"},
      marked_offered{"_marked_offered"}, mark_due{"_mark_due"}, kept{"_kept"}, weight_name{"weight_name"},
      unit_dim{"unit_dim"}, waits{"waits"}, same_rows{"same_rows"}, last_width{"_width"}, calls{"calls"},
      source{"source"}, last_source{"last_source"}, alone{"_alone"}, lost{"_lost"}, weight{"_weight"},
      mark_handle{"_mark_handle"}, grad{"_grad"}, plain{"_plain"}, marked_calls{"_marked_calls"},
      restarted{"_restarted"}, position{"_position"};
};

// consistency_ops/engine/capture_states.py
struct StatesClass {
  PyTypeObject* type = nullptr;
  Slot stopped{"stopped"}, paused{"paused"}, mask{"mask"}, inputs{"inputs"}, layers{"layers"};
};

// consistency_ops/engine/layer.py
struct LayerClass {
  PyTypeObject* type = nullptr;
  Slot module{"module"}, kind{"kind"}, index{"index"}, joins_bias{"joins_bias"}, tied{"tied"}, capture{"capture"},
      info_slice{"info_slice"}, damping_slice{"damping_slice"}, unfit_gradient{"unfit_gradient"},
      lost_rows{"lost_rows"}, inverse_units{"inverse_units"}, division_id{"division_id"}, pending{"pending"};
};

struct HostPath {
  const bindings::HostCalls* calls = nullptr;  // null: not bound
  bool used = true;                            // the library's kernels compute on the CPU
  CaptureClass capture;
  StatesClass states;
  LayerClass layer;
  // LayerType, TransposedConvolution, InProjection: other subclasses see their weight in a way that Python knows.
  PyTypeObject *kind_type = nullptr, *transposed_type = nullptr, *third_type = nullptr;
  c10::DispatchKeySet plain_keys;  // of a dense tensor of the CPU that is nothing else
  PyObject *training = nullptr, *parameters = nullptr, *bias = nullptr, *matrix = nullptr, *packed = nullptr,
           *id = nullptr, *position = nullptr, *groups = nullptr, *part = nullptr;  // names
};
extern HostPath host;

// Whether the kernels may be called without torch's dispatcher: nobody watches it.
bool unwatched();

inline bool is_parameter(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == ParameterClass; }
inline bool is_tensor(PyObject* object) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == THPVariableClass; }
inline bool is_plain(const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->key_set() == host.plain_keys; }

// The tensor in a slot; null if there is none.
inline const at::Tensor* tensor_in(const Slot& slot, PyObject* object) {
  PyObject* value = slot.get(object);
  return value != nullptr && is_tensor(value) ? &THPVariable_Unpack(value) : nullptr;
}

// What a weak reference refers to, as a new reference; null if it is gone.
inline PyObject* referent(PyObject* weak) {
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  PyWeakref_GetRef(weak, &found);
  return found;
#else
  PyObject* found = PyWeakref_GetObject(weak);
  return found == Py_None ? nullptr : Py_NewRef(found);
#endif
}

// The call of a Capture, in the place of the class's own: tp_call.
PyObject* call_capture(PyObject* self, PyObject* args, PyObject* kwargs);
extern ternaryfunc call_in_python;

}  // namespace consistency_ops::torch_abi
