// The Python module, _C.  It is empty: importing it loads the library, and loading registers the operators.
#include "bindings/build.h"
// build.h first: it may define USE_CUDA
#include <Python.h>

#include "consistency_ops/c_api.h"
#include "torch/headeronly/version.h"

#define CO_TEXT_(x) #x
#define CO_TEXT(x) CO_TEXT_(x)
#if defined(USE_CUDA)
#include <cuda_runtime_api.h>
#define CO_CUDA "cuda=" CO_TEXT(CUDART_VERSION) "\ncuda_archs=" CONSISTENCY_OPS_CUDA_ARCHS "\n"
#else
#define CO_CUDA ""
#endif
#if defined(__clang__)
#define CO_COMPILER __VERSION__
#else
#define CO_COMPILER "GCC " __VERSION__
#endif

// What the library was built with, `key=value` lines; read by consistency_ops/environment.py.
CO_API const char* co_build_config(void);
const char* co_build_config(void) { return "torch=" TORCH_VERSION "\ncompiler=" CO_COMPILER "\n" CO_CUDA; }

// The schemas of its operators; compared with the file by consistency_ops/ops/library.py.
CO_API const char* co_schemas(void);
const char* co_schemas(void) {
  return
#include "bindings/schemas.inc"
      ;
}

#define CO_JOIN_(a, b) a##b
#define CO_JOIN(a, b) CO_JOIN_(a, b)

PyMODINIT_FUNC CO_JOIN(PyInit_, TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {};
  definition.m_name = CO_TEXT(TORCH_EXTENSION_NAME);
  definition.m_size = -1;
  return PyModule_Create(&definition);
}
