// The running averages of all layers of a step: what Correction.average of consistency_ops/engine/correction.py does
// for one, with the same bits, where all tensors are plain.  Python calls torch some fifteen times a layer for it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "torch_abi/host_path.h"
#include "torch_abi/torch_abi.h"

namespace consistency_ops::torch_abi {
namespace {

// Above this, torch's operations use all threads, and their calls do not count.
constexpr int64_t kMostNumbers = int64_t{1} << 20;

struct One {
  at::Tensor covariance, total, weight, count;  // total and weight are undefined where nothing is stored
  std::vector<at::Tensor> gradients;
};

// Inf and NaN have all bits of the exponent.
template <typename Bits>
bool has_exponent(const void* data, int64_t count, Bits mask) {
  const auto* bits = static_cast<const Bits*>(data);
  unsigned found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<unsigned>((bits[i] & mask) == mask);
  return found != 0;
}

bool is_finite(const at::Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return !has_exponent<uint64_t>(data, tensor.numel(), uint64_t{0x7FF} << 52);
    case at::kFloat:
      return !has_exponent<uint32_t>(data, tensor.numel(), 0xFFu << 23);
    case at::kBFloat16:
      return !has_exponent<uint16_t>(data, tensor.numel(), 0x7F80);
    default:
      return !has_exponent<uint16_t>(data, tensor.numel(), 0x7C00);
  }
}

// As torch computes `decay * old + (1 - decay) * new`: scalars in the type of the tensor, every operation rounded.  The
// products have loops of their own, because a compiler may join a product and a sum of one expression into one
// rounding.
template <typename T>
void update(const One& one, bool enters, double decay, T* total, T* weight, T* average) {
  const int64_t count = one.covariance.numel();
  const T keep = static_cast<T>(decay), take = static_cast<T>(1 - decay);
  const bool stored = one.total.defined();
  const T* old = stored ? static_cast<const T*>(one.total.const_data_ptr()) : nullptr;
  const T old_weight = stored ? *static_cast<const T*>(one.weight.const_data_ptr()) : T(0);
  if (enters) {
    const T* fresh = static_cast<const T*>(one.covariance.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) average[i] = take * fresh[i];
    for (int64_t i = 0; i < count; ++i) total[i] = keep * (stored ? old[i] : T(0));
    for (int64_t i = 0; i < count; ++i) total[i] += average[i];
    volatile T kept = keep * old_weight;
    *weight = kept + take;
  } else {
    if (stored) {
      std::memcpy(total, old, one.covariance.nbytes());
    } else {
      std::memset(total, 0, one.covariance.nbytes());
    }
    *weight = old_weight;
  }
  const T divisor = *weight;
  for (int64_t i = 0; i < count; ++i) average[i] = total[i] / divisor;
}

bool plain_and_dense(const at::Tensor& tensor) { return is_plain(tensor) && tensor.is_non_overlapping_and_dense(); }

bool read(PyObject* object, at::Tensor& tensor, bool contiguous) {
  if (!is_tensor(object)) return false;
  tensor = THPVariable_Unpack(object);
  return contiguous ? is_plain(tensor) && tensor.is_contiguous() : plain_and_dense(tensor);
}

// False: Python is to do it.
bool describe(PyObject* covariance, PyObject* total, PyObject* weight, PyObject* count, PyObject* gradients, One& one) {
  if (!read(covariance, one.covariance, true) || !read(count, one.count, true) || !PyList_CheckExact(gradients)) {
    return false;
  }
  const at::ScalarType type = one.covariance.scalar_type();
  if ((type != at::kFloat && type != at::kDouble) || one.count.scalar_type() != at::kLong || one.count.numel() != 1) {
    return false;
  }
  if (total != Py_None) {
    if (!read(total, one.total, true) || !read(weight, one.weight, true)) return false;
    const bool fits = one.total.scalar_type() == type && one.weight.scalar_type() == type &&
                      one.total.sizes() == one.covariance.sizes() && one.weight.dim() == 1 && one.weight.numel() == 1;
    if (!fits) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(gradients); ++i) {
    if (!read(PyList_GET_ITEM(gradients, i), one.gradients.emplace_back(), false)) return false;
    const at::ScalarType kind = one.gradients.back().scalar_type();
    if (kind != at::kFloat && kind != at::kDouble && kind != at::kBFloat16 && kind != at::kHalf) return false;
  }
  return true;
}

bool enters(const One& one) {
  if (*one.count.const_data_ptr<int64_t>() <= 0 || !is_finite(one.covariance)) return false;
  for (const at::Tensor& gradient : one.gradients) {
    if (!is_finite(gradient)) return false;
  }
  return true;
}

}  // namespace

// update_averages(decay, covariances, totals, weights, counts, gradients): lists with one entry a layer; totals and
// weights are None where nothing is stored, gradients are lists.  Returns a list of (total, weight, average), all new;
// None if Python is to do it.
PyObject* update_averages(PyObject* /*module*/, PyObject* args) {
  HANDLE_TH_ERRORS
  double decay = 0;
  PyObject *covariances = nullptr, *totals = nullptr, *weights = nullptr, *counts = nullptr, *gradients = nullptr;
  if (!PyArg_ParseTuple(args, "dO!O!O!O!O!", &decay, &PyList_Type, &covariances, &PyList_Type, &totals, &PyList_Type,
                        &weights, &PyList_Type, &counts, &PyList_Type, &gradients)) {
    return nullptr;
  }
  if (host.calls == nullptr || !host.used || !unwatched()) Py_RETURN_NONE;
  const Py_ssize_t layers = PyList_GET_SIZE(covariances);
  for (PyObject* list : {totals, weights, counts, gradients}) {
    if (PyList_GET_SIZE(list) != layers) Py_RETURN_NONE;
  }
  std::vector<One> all(layers);
  int64_t numbers = 0;
  for (Py_ssize_t i = 0; i < layers; ++i) {
    if (!describe(PyList_GET_ITEM(covariances, i), PyList_GET_ITEM(totals, i), PyList_GET_ITEM(weights, i),
                  PyList_GET_ITEM(counts, i), PyList_GET_ITEM(gradients, i), all[i])) {
      Py_RETURN_NONE;
    }
    numbers += all[i].covariance.numel();
    for (const at::Tensor& gradient : all[i].gradients) numbers += gradient.numel();
  }
  if (numbers > kMostNumbers) Py_RETURN_NONE;
  THPObjectPtr results(PyList_New(layers));
  if (!results) return nullptr;
  for (Py_ssize_t i = 0; i < layers; ++i) {
    const One& one = all[i];
    const at::Tensor total = at::empty_like(one.covariance), average = at::empty_like(one.covariance);
    const at::Tensor weight = at::empty({1}, one.covariance.options());
    const bool counts_in = enters(one);
    if (one.covariance.scalar_type() == at::kDouble) {
      update<double>(one, counts_in, decay, total.mutable_data_ptr<double>(), weight.mutable_data_ptr<double>(),
                     average.mutable_data_ptr<double>());
    } else {
      update<float>(one, counts_in, decay, total.mutable_data_ptr<float>(), weight.mutable_data_ptr<float>(),
                    average.mutable_data_ptr<float>());
    }
    THPObjectPtr items[] = {THPObjectPtr(THPVariable_Wrap(total)), THPObjectPtr(THPVariable_Wrap(weight)),
                            THPObjectPtr(THPVariable_Wrap(average))};
    if (!items[0] || !items[1] || !items[2]) return nullptr;
    PyObject* triple = PyTuple_Pack(3, items[0].get(), items[1].get(), items[2].get());
    if (triple == nullptr) return nullptr;
    PyList_SET_ITEM(results.get(), i, triple);
  }
  return results.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace consistency_ops::torch_abi
