// Attributes of Python objects that lie in slots of their class (__slots__), read and written where they are.
//
// The objects stay what Python made them: nothing is kept twice, and Python code may read and write them at any time.
#pragma once

#include <Python.h>
#include <structmember.h>

#if defined(Py_GIL_DISABLED)
#error "csrc/torch_abi relies on the global interpreter lock: build with CONSISTENCY_OPS_TORCH_ABI=0"
#endif

namespace consistency_ops::torch_abi {

class Slot {
 public:
  explicit Slot(const char* name) : name_(name) {}

  // False, with a Python error, if the class has no such slot.
  bool find(PyObject* type) {
    PyObject* found = PyObject_GetAttrString(type, name_);
    if (found == nullptr) return false;
    const bool fits = Py_IS_TYPE(found, &PyMemberDescr_Type) &&
                      reinterpret_cast<PyMemberDescrObject*>(found)->d_member->type == T_OBJECT_EX;
    if (fits) {
      offset_ = reinterpret_cast<PyMemberDescrObject*>(found)->d_member->offset;
    } else {
      PyErr_Format(PyExc_TypeError, "%R has no slot %s", type, name_);
    }
    Py_DECREF(found);
    return fits;
  }

  // Borrowed; null if nothing has been assigned yet.
  PyObject* get(PyObject* object) const { return *at(object); }
  bool is(PyObject* object, PyObject* value) const { return *at(object) == value; }
  bool is_true(PyObject* object) const { return *at(object) == Py_True; }

  // The integer in it; `other` if there is none.
  int64_t integer(PyObject* object, int64_t other) const {
    PyObject* value = *at(object);
    return value != nullptr && PyLong_CheckExact(value) ? PyLong_AsLongLong(value) : other;
  }

  // Does not take over the caller's reference.
  void set(PyObject* object, PyObject* value) const {
    PyObject* before = *at(object);
    if (before == value) return;
    *at(object) = Py_NewRef(value);
    Py_XDECREF(before);  // last: it may run Python code
  }

  // False, with a Python error, if there is no memory.
  bool set_integer(PyObject* object, int64_t value) const {
    PyObject* number = PyLong_FromLongLong(value);
    if (number == nullptr) return false;
    set(object, number);
    Py_DECREF(number);
    return true;
  }

 private:
  PyObject** at(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

  const char* name_;
  Py_ssize_t offset_ = 0;
};

}  // namespace consistency_ops::torch_abi
