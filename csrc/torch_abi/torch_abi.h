// What the accelerator against torch's unstable C++ interface offers to Python; see module.cpp.
#pragma once

#include <Python.h>

namespace consistency_ops::torch_abi {

// |x| for a plain real tensor that needs a gradient; None for everything that ops/modulus.py must do itself.
PyObject* modulus(PyObject* module, PyObject* x);

}  // namespace consistency_ops::torch_abi
