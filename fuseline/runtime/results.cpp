// Copies of a capture's results, in memory from PyTorch's allocator. results.py says what for; where this file cannot
// be compiled, `clone` does it.
//
// The allocator, one copy on the stream, and a tensor around it: nothing goes through the dispatcher, whose way to a
// copy is ten times the code, and is not in the processor's caches when a step comes to it.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <ATen/core/TensorBase.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/TensorImpl.h>
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <vector>

PyObject *THPVariable_Wrap(const at::TensorBase &tensor);  // torch/csrc/autograd/python_variable.h, slow to compile

namespace {

// cuMemcpyDtoDAsync, of CUDA's driver: to, from, bytes, stream → 0 where all is well.
using DeviceCopy = int (*)(unsigned long long, unsigned long long, size_t, void *);

struct Result {
  Py_ssize_t position;
  c10::TensorImpl *tensor;
  size_t bytes;
};

struct Copier {
  PyObject *values = nullptr;  // a tuple: the results, which lie where they do as long as this lives
  PyObject *otherwise = nullptr;  // does the same in PyTorch's way
  bool single = false;
  c10::Device device{c10::kCPU};
  void *stream = nullptr;
  DeviceCopy device_copy = nullptr;
  std::vector<Result> results;

  ~Copier() {
    Py_XDECREF(values);
    Py_XDECREF(otherwise);
  }
};

constexpr const char *kName = "fuseline.results";

// A tensor like `result`, over memory of its own that holds the same bytes; none where the copy could not be launched.
// It is an inference tensor where the caller is in that mode: TensorImpl sees to it.
c10::intrusive_ptr<c10::TensorImpl> copied(const Copier &copier, const Result &result) {
  c10::Allocator *allocator = result.tensor->storage().allocator();
  c10::DataPtr memory = allocator->allocate(result.bytes);
  const void *from = result.tensor->data();
  if (copier.device_copy == nullptr) {
    std::memcpy(memory.get(), from, result.bytes);
  } else {
    const auto to = reinterpret_cast<unsigned long long>(memory.get());
    if (copier.device_copy(to, reinterpret_cast<unsigned long long>(from), result.bytes, copier.stream) != 0) return {};
  }
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), result.bytes, std::move(memory), allocator, /*resizable=*/true);
  auto made = c10::make_intrusive<c10::TensorImpl>(
      c10::Storage(std::move(storage)), result.tensor->key_set(), result.tensor->dtype());
  made->set_sizes_and_strides(result.tensor->sizes(), result.tensor->strides());
  return made;
}

// The copies as tensors of Python's. Where anything failed (there is no memory, say), PyTorch does it or says what.
PyObject *call(PyObject *capsule, PyObject *) {
  const auto *copier = static_cast<const Copier *>(PyCapsule_GetPointer(capsule, kName));
  if (copier == nullptr) return nullptr;
  std::vector<c10::intrusive_ptr<c10::TensorImpl>> made(copier->results.size());
  bool done = true;
  Py_BEGIN_ALLOW_THREADS;  // as PyTorch does: the allocator has locks of its own
  try {
    const c10::DeviceGuard guard(copier->device);
    for (size_t i = 0; done && i < made.size(); ++i) {
      made[i] = copied(*copier, copier->results[i]);
      done = made[i].defined();
    }
  } catch (...) {
    done = false;
  }
  Py_END_ALLOW_THREADS;
  if (!done) return PyObject_CallNoArgs(copier->otherwise);
  try {
    if (copier->single) return THPVariable_Wrap(at::TensorBase(std::move(made[0])));
    const Py_ssize_t count = PyTuple_GET_SIZE(copier->values);
    PyObject *answer = PyTuple_New(count);
    size_t next = 0;
    for (Py_ssize_t i = 0; answer != nullptr && i < count; ++i) {
      PyObject *item = nullptr;
      if (next < made.size() && copier->results[next].position == i) {
        item = THPVariable_Wrap(at::TensorBase(std::move(made[next++])));
      } else {
        item = PyTuple_GET_ITEM(copier->values, i);
        Py_INCREF(item);
      }
      if (item == nullptr) Py_CLEAR(answer);
      else PyTuple_SET_ITEM(answer, i, item);
    }
    return answer;
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef call_method = {"copies", call, METH_NOARGS, "The results, copied."};

void destroy(PyObject *capsule) { delete static_cast<Copier *>(PyCapsule_GetPointer(capsule, kName)); }

DeviceCopy device_copy() {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return driver == nullptr ? nullptr : reinterpret_cast<DeviceCopy>(dlsym(driver, "cuMemcpyDtoDAsync_v2"));
}

// copier(values, single, tensors, stream, otherwise) → a function without arguments, or None where the device has no
// copy. values: a tuple, of one tensor if `single`; tensors: (position among them, TensorImpl) of each tensor, dense, all
// on one device; stream: its handle; otherwise: does the same, at a higher cost.
PyObject *copier(PyObject *, PyObject *args) {
  PyObject *values, *tensors, *stream, *otherwise;
  int single = 0;
  try {
    auto made = std::make_unique<Copier>();
    if (!PyArg_ParseTuple(args, "O!pO!OO", &PyTuple_Type, &values, &single, &PyList_Type, &tensors, &stream, &otherwise))
      return nullptr;
    made->stream = PyLong_AsVoidPtr(stream);
    if (PyErr_Occurred()) return nullptr;
    made->single = single != 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
      Result result{};
      PyObject *handle = nullptr, *entry = PyList_GET_ITEM(tensors, i);
      if (!PyTuple_Check(entry)) {
        PyErr_SetString(PyExc_TypeError, "a tensor is given as a tuple: its position, and where it lies");
        return nullptr;
      }
      if (!PyArg_ParseTuple(entry, "nO", &result.position, &handle)) return nullptr;
      result.tensor = static_cast<c10::TensorImpl *>(PyLong_AsVoidPtr(handle));
      if (PyErr_Occurred()) return nullptr;
      result.bytes = result.tensor->numel() * result.tensor->itemsize();
      if (result.tensor->storage().allocator() == nullptr) Py_RETURN_NONE;
      made->results.push_back(result);
    }
    if (made->results.empty()) Py_RETURN_NONE;
    made->device = made->results.front().tensor->device();
    if (!made->device.is_cpu()) {
      made->device_copy = made->device.is_cuda() ? device_copy() : nullptr;
      if (made->device_copy == nullptr) Py_RETURN_NONE;
    }
    Py_INCREF(values);
    Py_INCREF(otherwise);
    made->values = values;
    made->otherwise = otherwise;
    PyObject *capsule = PyCapsule_New(made.get(), kName, destroy);
    if (capsule == nullptr) return nullptr;
    made.release();
    PyObject *function = PyCFunction_New(&call_method, capsule);
    Py_DECREF(capsule);
    return function;
  } catch (const std::exception &error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"copier", copier, METH_VARARGS, "A function that copies one capture's results."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "results", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_results(void) { return PyModule_Create(&definition); }
