// Whether the tensors of a call lie where they did and are what they were. watch.py says what for; it has the same
// check in Python, which is what runs where this file cannot be compiled.
//
// Needs Python's headers alone. PyTorch hands over what reads an address, as it does to the code that Inductor
// generates, and the getter of a version is its type's own.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <memory>
#include <new>
#include <vector>

namespace {

using AddressOf = void *(*)(PyObject *);

struct Address {
  Py_ssize_t position;
  void *value;
};

struct Version {
  Py_ssize_t position;
  long long value;
};

struct Watch {
  Py_ssize_t length;  // of the tuples that it looks at
  PyTypeObject *tensor, *parameter;
  AddressOf address_of;
  getter version_of;
  void *closure;
  std::vector<Address> addresses;
  std::vector<Version> versions;
  PyObject *kept = nullptr;  // the types and the getter's descriptor

  ~Watch() { Py_XDECREF(kept); }
};

constexpr const char *kName = "fuseline.watch";

// A version is read through Python's C interface: any trouble is "not the same", and is looked into in Python.
bool same_version(const Watch &watch, PyObject *tensor, long long expected) {
  PyObject *found = watch.version_of(tensor, watch.closure);
  if (found == nullptr) {
    PyErr_Clear();
    return false;
  }
  const long long value = PyLong_AsLongLong(found);
  Py_DECREF(found);
  if (value == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return value == expected;
}

bool same(const Watch &watch, PyObject *values) {
  if (!PyTuple_CheckExact(values) || PyTuple_GET_SIZE(values) != watch.length) return false;
  for (const Address &seen : watch.addresses) {
    PyObject *tensor = PyTuple_GET_ITEM(values, seen.position);
    PyTypeObject *type = Py_TYPE(tensor);
    if (type != watch.tensor && type != watch.parameter) return false;
    if (watch.address_of(tensor) != seen.value) return false;
  }
  for (const Version &seen : watch.versions) {  // all of them are among the addresses: their types are known
    if (!same_version(watch, PyTuple_GET_ITEM(values, seen.position), seen.value)) return false;
  }
  return true;
}

PyObject *call(PyObject *capsule, PyObject *values) {
  const auto *watch = static_cast<const Watch *>(PyCapsule_GetPointer(capsule, kName));
  if (watch == nullptr) return nullptr;
  try {
    return PyBool_FromLong(same(*watch, values));
  } catch (...) {  // a tensor without memory of its own has no address
    Py_RETURN_FALSE;
  }
}

PyMethodDef same_method = {"same", call, METH_O, "Whether the tensors of this tuple are those that were watched."};

void destroy(PyObject *capsule) { delete static_cast<Watch *>(PyCapsule_GetPointer(capsule, kName)); }

// Pairs of integers, (position, value), of a list of tuples; positions are checked against the tuples' length.
template <typename Item, typename Read>
bool fill(std::vector<Item> &items, PyObject *list, Py_ssize_t length, Read read) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject *position = nullptr, *value = nullptr;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(list, i), "OO", &position, &value)) return false;
    const Item item{PyLong_AsSsize_t(position), read(value)};
    if (PyErr_Occurred()) return false;
    if (item.position < 0 || item.position >= length) {
      PyErr_SetString(PyExc_IndexError, "a watched position is outside of the arguments");
      return false;
    }
    items.push_back(item);
  }
  return true;
}

// watch(length, (Tensor, Parameter), address_of, version, addresses, versions): see watch.py.
PyObject *watch(PyObject *, PyObject *args) {
  PyObject *types, *pointer, *version, *addresses, *versions;
  auto made = std::unique_ptr<Watch>(new (std::nothrow) Watch());
  if (!made) return PyErr_NoMemory();
  if (!PyArg_ParseTuple(args, "nO!OO!O!O!", &made->length, &PyTuple_Type, &types, &pointer, &PyGetSetDescr_Type,
                        &version, &PyList_Type, &addresses, &PyList_Type, &versions))
    return nullptr;
  if (!PyArg_ParseTuple(types, "O!O!", &PyType_Type, &made->tensor, &PyType_Type, &made->parameter)) return nullptr;
  PyTypeObject *owner = PyDescr_TYPE(version);
  if (!PyType_IsSubtype(made->tensor, owner) || !PyType_IsSubtype(made->parameter, owner)) {
    PyErr_SetString(PyExc_TypeError, "the version's getter belongs to another type");
    return nullptr;
  }
  made->address_of = reinterpret_cast<AddressOf>(PyLong_AsVoidPtr(pointer));
  if (made->address_of == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "nothing that reads an address was given");
    return nullptr;
  }
  const PyGetSetDef *getset = reinterpret_cast<PyGetSetDescrObject *>(version)->d_getset;
  made->version_of = getset->get;
  made->closure = getset->closure;
  try {
    if (!fill(made->addresses, addresses, made->length, PyLong_AsVoidPtr) ||
        !fill(made->versions, versions, made->length, PyLong_AsLongLong))
      return nullptr;
  } catch (const std::bad_alloc &) {
    return PyErr_NoMemory();
  }
  made->kept = PyTuple_Pack(2, types, version);
  if (made->kept == nullptr) return nullptr;
  PyObject *capsule = PyCapsule_New(made.get(), kName, destroy);
  if (capsule == nullptr) return nullptr;
  made.release();
  PyObject *function = PyCFunction_New(&same_method, capsule);
  Py_DECREF(capsule);
  return function;
}

PyMethodDef methods[] = {{"watch", watch, METH_VARARGS, "A function that looks at one call's tensors."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "watch", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_watch(void) { return PyModule_Create(&definition); }
