// Whether the tensors of a call lie where they did and are what they were. watch.py says what for; it has the same
// check in Python, which is what runs where this file cannot be compiled.
//
// One pass over a call's tensors, which reads their fields as PyTorch's headers have them: address and version of a
// tensor stand in one place, and no Python object is made of either. Only where a Python tensor holds its C++ one is in
// no header that is quick to compile: it is looked for, and found right or not at all, when a watch is made.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <c10/core/TensorImpl.h>

#include <cstring>
#include <memory>
#include <vector>

namespace {

struct Seen {
  Py_ssize_t position;
  const void *address;
  bool versioned;
  uint32_t version;
};

struct Watch {
  Py_ssize_t length = 0;  // of the tuples that it looks at
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  Py_ssize_t offset = 0;  // from a Python tensor to the pointer to its TensorImpl
  std::vector<Seen> seen;
  PyObject *types = nullptr;  // keeps both

  ~Watch() { Py_XDECREF(types); }

  bool is_plain(PyObject *value) const {  // a class of its own may read its address otherwise
    PyTypeObject *type = Py_TYPE(value);
    return type == tensor || type == parameter;
  }
};

constexpr const char *kName = "fuseline.watch";

c10::TensorImpl *tensor_at(PyObject *tensor, Py_ssize_t offset) {
  c10::TensorImpl *found;
  std::memcpy(&found, reinterpret_cast<const char *>(tensor) + offset, sizeof(found));
  return found;
}

// As Tensor.data_ptr has it: memory that is shared until somebody writes is no longer shared then.
const void *address_of(c10::TensorImpl *tensor) { return tensor->mutable_data(); }

bool same(const Watch &watch, PyObject *values) {
  if (!PyTuple_CheckExact(values) || PyTuple_GET_SIZE(values) != watch.length) return false;
  for (const Seen &seen : watch.seen) {
    PyObject *value = PyTuple_GET_ITEM(values, seen.position);
    if (!watch.is_plain(value)) return false;
    c10::TensorImpl *tensor = tensor_at(value, watch.offset);
    if (address_of(tensor) != seen.address) return false;
    if (seen.versioned && tensor->version_counter().current_version() != seen.version) return false;
  }
  return true;
}

PyObject *call(PyObject *capsule, PyObject *values) {
  const auto *watch = static_cast<const Watch *>(PyCapsule_GetPointer(capsule, kName));
  if (watch == nullptr) return nullptr;
  try {
    return PyBool_FromLong(same(*watch, values));
  } catch (...) {  // a tensor without memory of its own has no address, an inference tensor no version
    Py_RETURN_FALSE;
  }
}

PyMethodDef same_method = {"same", call, METH_O, "Whether the tensors of this tuple are those that were watched."};

void destroy(PyObject *capsule) { delete static_cast<Watch *>(PyCapsule_GetPointer(capsule, kName)); }

// Where all of these tensors hold the TensorImpl that `handles` says they have, directly or behind a flag; 0: nowhere.
Py_ssize_t offset_of(const Watch &watch, PyObject *values, const std::vector<void *> &handles) {
  constexpr Py_ssize_t word = sizeof(void *);
  for (Py_ssize_t offset : {Py_ssize_t(sizeof(PyObject)), Py_ssize_t(sizeof(PyObject)) + word}) {
    bool here = watch.tensor->tp_basicsize >= offset + word && watch.parameter->tp_basicsize >= offset + word;
    for (size_t i = 0; here && i < handles.size(); ++i)
      here = tensor_at(PyTuple_GET_ITEM(values, watch.seen[i].position), offset) == handles[i];
    if (here) return offset;
  }
  return 0;
}

// The tensors to look at, (position, TensorImpl, whether the version counts) each; false with an exception set.
bool fill(Watch &watch, PyObject *values, PyObject *entries, std::vector<void *> &handles) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); ++i) {
    Seen seen{};
    PyObject *handle = nullptr;
    int versioned = 0;
    PyObject *entry = PyList_GET_ITEM(entries, i);
    if (!PyTuple_Check(entry)) {
      PyErr_SetString(PyExc_TypeError, "an entry is a tuple: a position, where the tensor lies, whether versions count");
      return false;
    }
    if (!PyArg_ParseTuple(entry, "nOp", &seen.position, &handle, &versioned)) return false;
    if (seen.position < 0 || seen.position >= watch.length) {
      PyErr_SetString(PyExc_IndexError, "a watched position is outside of the arguments");
      return false;
    }
    if (!watch.is_plain(PyTuple_GET_ITEM(values, seen.position))) {
      PyErr_SetString(PyExc_TypeError, "a watched argument is no tensor, or one of a class of its own");
      return false;
    }
    handles.push_back(PyLong_AsVoidPtr(handle));
    if (PyErr_Occurred()) return false;
    seen.versioned = versioned != 0;
    watch.seen.push_back(seen);
  }
  return true;
}

// watch((Tensor, Parameter), values, entries) → a function of another tuple, or None for tensors laid out otherwise.
PyObject *watch(PyObject *, PyObject *args) {
  PyObject *types, *values, *entries;
  try {
    auto made = std::make_unique<Watch>();
    std::vector<void *> handles;
    if (!PyArg_ParseTuple(args, "O!O!O!", &PyTuple_Type, &types, &PyTuple_Type, &values, &PyList_Type, &entries) ||
        !PyArg_ParseTuple(types, "O!O!", &PyType_Type, &made->tensor, &PyType_Type, &made->parameter))
      return nullptr;
    Py_INCREF(types);
    made->types = types;
    made->length = PyTuple_GET_SIZE(values);
    if (!fill(*made, values, entries, handles)) return nullptr;
    made->offset = offset_of(*made, values, handles);
    if (made->offset == 0) Py_RETURN_NONE;
    for (Seen &seen : made->seen) {
      c10::TensorImpl *tensor = tensor_at(PyTuple_GET_ITEM(values, seen.position), made->offset);
      seen.address = address_of(tensor);
      if (seen.versioned) seen.version = tensor->version_counter().current_version();
    }
    PyObject *capsule = PyCapsule_New(made.get(), kName, destroy);
    if (capsule == nullptr) return nullptr;
    made.release();
    PyObject *function = PyCFunction_New(&same_method, capsule);
    Py_DECREF(capsule);
    return function;
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"watch", watch, METH_VARARGS, "A function that looks at one call's tensors."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "watch", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_watch(void) { return PyModule_Create(&definition); }
