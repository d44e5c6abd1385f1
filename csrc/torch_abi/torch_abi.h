// What the accelerator against torch's unstable C++ interface offers to Python; see module.cpp.
#pragma once

#include <Python.h>

namespace consistency_ops::torch_abi {

// |x| for a plain real tensor that needs a gradient; None for everything that ops/modulus.py must do itself.
PyObject* modulus(PyObject* module, PyObject* x);

// The fast ways of row capture and of a step; consistency_ops/engine/host_path.py is the only caller.
PyObject* bind_host_path(PyObject* module, PyObject* args);
PyObject* use_host_path(PyObject* module, PyObject* used);
PyObject* plan_step(PyObject* module, PyObject* args);
PyObject* run_step(PyObject* module, PyObject* args);
PyObject* run_stored(PyObject* module, PyObject* args);
PyObject* begin_step(PyObject* module, PyObject* args);
PyObject* reset_states(PyObject* module, PyObject* args);
PyObject* update_averages(PyObject* module, PyObject* args);

}  // namespace consistency_ops::torch_abi
