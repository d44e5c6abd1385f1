// The Python module _torch_abi_<version of torch>: the one optional accelerator against torch's unstable C++ interface.
//
// The main library uses torch's stable ABI and serves every torch >= 2.10 and every Python, but that ABI has no
// autograd in C++.  This one serves only the torch and the Python that it was compiled for: it is built by every
// installation from source, loaded only by that torch (consistency_ops/ops/library.py), and absent from published
// wheels.  Nothing needs it: Python code is the definition of everything here, and the fallback.
#include "torch_abi/torch_abi.h"

#define CO_CONCATENATE_(a, b) a##b
#define CO_CONCATENATE(a, b) CO_CONCATENATE_(a, b)

PyMODINIT_FUNC CO_CONCATENATE(PyInit_, TORCH_EXTENSION_NAME)(void) {
  using namespace consistency_ops::torch_abi;
  static PyMethodDef methods[] = {{"modulus", modulus, METH_O, nullptr},
                                  {"bind_host_path", bind_host_path, METH_VARARGS, nullptr},
                                  {"use_host_path", use_host_path, METH_O, nullptr},
                                  {"plan_step", plan_step, METH_VARARGS, nullptr},
                                  {"run_step", run_step, METH_VARARGS, nullptr},
                                  {"run_stored", run_stored, METH_VARARGS, nullptr},
                                  {"begin_step", begin_step, METH_VARARGS, nullptr},
                                  {"reset_states", reset_states, METH_VARARGS, nullptr},
                                  {"update_averages", update_averages, METH_VARARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {};
  definition.m_name = "_torch_abi";
  definition.m_size = -1;
  definition.m_methods = methods;
  PyObject* module = PyModule_Create(&definition);
  // Of the files that it was built from: Python files of another commit may call it otherwise.
  if (module != nullptr && PyModule_AddStringConstant(module, "digest", CONSISTENCY_OPS_DIGEST) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
