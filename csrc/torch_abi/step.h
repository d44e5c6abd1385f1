// What a step of the accelerator is planned in: step.cpp makes it, and corrects by the rows of the step; stored.cpp
// corrects by matrices that were kept.
#pragma once

#include <Python.h>
#include <torch/csrc/utils/object_ptr.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "torch_abi/host_path.h"

namespace consistency_ops::torch_abi {

// The name of the capsule that Python holds.
inline constexpr char kPlan[] = "consistency_ops.host_plan";

// One layer of a step; the tensors keep the memory that its problem points to.
struct Planned {
  THPObjectPtr layer;
  at::Tensor grad, bias_grad, rows, count, inverse, info;
  int64_t convolution_groups, rows_id;
  bool is_double;
};
struct Plan {
  std::vector<Planned> layers;
  std::vector<PreconditionLayer> problems;  // one a layer, in their order: of its first group, if it has several
  std::vector<THPObjectPtr> others;         // layers that have nothing to correct in this step
};

// What is needed of a LayerType; most layers of a network have that of the layer before.
struct Kind {
  enum class Form { kPython, kWhole, kTransposed, kThird };  // how the matrix lies in the parameter

  PyObject* of = nullptr;  // borrowed from a layer
  Form form = Form::kPython;
  THPObjectPtr bias;  // its name, or None
  bool third_of_bias = false;
  int64_t third = 0;                   // which
  THPObjectPtr inverse_key, info_key;  // in the optimizer's state; see find_stored
};

// A layer's matrices of the last refresh, from `entries`, the optimizer's state by parameter; false if Python is to do
// it.  As Correction.stored_inverse.
bool find_stored(PyObject* layer, PyObject* entries, PyObject* weight, int64_t chunk, int64_t group, Kind& kind,
                 Planned& found, PreconditionLayer& problem);

// PreconditionLayer::group; `group`: 0 for the default, as default_group of ops/arguments.py.
inline int32_t group_of(const PreconditionLayer& problem, int64_t group, int64_t chunk) {
  return static_cast<int32_t>(std::min(group > 0 ? group : 32 / element_size(problem.g_dtype), chunk));
}

// Layer.info_slice or damping_slice; false with a Python error.
bool set_slice(const Slot& slot, PyObject* layer, PyObject* tensor, int64_t begin, int64_t end);

}  // namespace consistency_ops::torch_abi
