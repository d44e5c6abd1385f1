// A step between two refreshes (`every`): the gradients times the inverses that were kept, as Correction.apply_stored.
#include <ATen/core/Tensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>
#include <vector>

#include "bindings/describe.h"
#include "torch_abi/step.h"
#include "torch_abi/torch_abi.h"

namespace consistency_ops::torch_abi {
namespace {

// The keys of StateStore (engine/state.py) for a layer of this kind.
bool learn_keys(Kind& kind) {
  if (kind.inverse_key) return true;
  THPObjectPtr part(PyObject_GetAttr(kind.of, host.part));
  if (!part || !PyUnicode_CheckExact(part.get())) {
    PyErr_Clear();
    return false;
  }
  const char* dot = PyUnicode_GET_LENGTH(part.get()) > 0 ? "." : "";
  kind.inverse_key = THPObjectPtr(PyUnicode_FromFormat("consistency_%U%sinverse", part.get(), dot));
  kind.info_key = THPObjectPtr(PyUnicode_FromFormat("consistency_%U%sinfo", part.get(), dot));
  return kind.inverse_key && kind.info_key;
}

const at::Tensor* entry(PyObject* entries, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(entries, key);
  if (value == nullptr || !is_tensor(value)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  return is_plain(tensor) && tensor.is_contiguous() ? &tensor : nullptr;
}

}  // namespace

bool find_stored(PyObject* layer, PyObject* entries, PyObject* weight, int64_t chunk, int64_t group, Kind& kind,
                 Planned& found, PreconditionLayer& p) {
  PyObject* pending = host.layer.pending.get(layer);
  if (pending == nullptr || !PyDict_CheckExact(pending) || PyDict_GET_SIZE(pending) > 0 || !learn_keys(kind)) {
    return false;
  }
  const int64_t units = p.units + (p.has_bias ? 1 : 0), groups = found.convolution_groups;
  if (!host.layer.inverse_units.is(layer, Py_None) && host.layer.inverse_units.integer(layer, -1) != units) {
    return false;
  }
  PyObject* own = PyDict_GetItemWithError(entries, weight);
  if (own == nullptr || !PyDict_CheckExact(own)) return false;
  const at::Tensor *inverse = entry(own, kind.inverse_key.get()), *info = entry(own, kind.info_key.get());
  if (inverse == nullptr || info == nullptr || inverse->dim() != 3 || info->dim() != 1) return false;
  // Correction.chunk_of
  const int64_t width = groups > 1 ? std::min(chunk, units) : chunk;
  const int64_t matrices = groups * ((units + width - 1) / width);
  const bool fits = inverse->size(0) == matrices && inverse->size(1) == width && inverse->size(2) == width &&
                    info->size(0) == matrices && info->scalar_type() == at::kInt &&
                    inverse->scalar_type() == (found.is_double ? at::kDouble : at::kFloat);
  if (!fits) return false;
  found.inverse = *inverse;
  found.info = *info;
  p.inverse = const_cast<void*>(inverse->const_data_ptr());
  p.info = const_cast<int32_t*>(info->const_data_ptr<int32_t>());
  p.group = group_of(p, group, width);
  return true;
}

// run_stored(plan, chunk, seed, step): corrects the gradients of a plan that was made with the optimizer's state.
// False: the kernel refused, with nothing written.
PyObject* run_stored(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject* capsule = nullptr;
  long long chunk = 0, seed = 0, step = 0;
  if (!PyArg_ParseTuple(args, "OLLL", &capsule, &chunk, &seed, &step)) return nullptr;
  auto* plan = static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlan));
  if (plan == nullptr) return nullptr;
  PreconditionOptions options;
  options.max_rows = 1;
  options.seed = static_cast<uint64_t>(seed);
  options.step = static_cast<uint64_t>(step);
  options.stages = kStageApply;
  options.float64 = plan->layers.front().is_double;

  std::map<int64_t, std::vector<PreconditionLayer>> by_width;  // one launch each: most have one only
  for (size_t i = 0; i < plan->layers.size(); ++i) {
    const Planned& planned = plan->layers[i];
    const int64_t groups = planned.convolution_groups, count = planned.info.size(0) / groups;
    std::vector<PreconditionLayer>& problems = by_width[planned.inverse.size(1)];
    PreconditionLayer problem = plan->problems[i];
    for (int64_t g = 0; g < groups; ++g) {
      problems.push_back(problem);
      bindings::to_next_group(problem, static_cast<int64_t>(planned.inverse.nbytes()) / groups);
      problem.info += count;
    }
  }
  Status status = Status::kOk;
  bool written = false;
  {
    const pybind11::gil_scoped_release released;
    for (auto& [width, problems] : by_width) {
      options.chunk = static_cast<int32_t>(width);
      status = host.calls->precondition(problems.data(), static_cast<int64_t>(problems.size()), options);
      if (status != Status::kOk) break;
      written = true;
    }
  }
  if (status != Status::kOk && !written) Py_RETURN_FALSE;
  TORCH_CHECK(status == Status::kOk, "foreach_apply_: out of memory");

  for (Planned& planned : plan->layers) {
    THPObjectPtr info(THPVariable_Wrap(planned.info));
    if (!info || !set_slice(host.layer.info_slice, planned.layer.get(), info.get(), 0, planned.info.size(0))) {
      return nullptr;
    }
  }
  for (THPObjectPtr& layer : plan->others) host.layer.info_slice.set(layer.get(), Py_None);
  Py_RETURN_TRUE;
  END_HANDLE_TH_ERRORS
}

}  // namespace consistency_ops::torch_abi
