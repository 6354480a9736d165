#include "direct.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace supclap {

namespace {

// What is asked of PyTorch in every call; looked up once.
struct Torch {
  py::object tensor, parameter, grad_enabled, modes, transforms, tracing, forward_mode, is_neg,
      saving_hooks;
  py::str requires_grad{"requires_grad"}, new_empty{"new_empty"}, level{"_current_level"};
  const ExchangeTable* table = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch"), c = torch.attr("_C");
    tensor = torch.attr("Tensor");
    parameter = torch.attr("nn").attr("Parameter");
    grad_enabled = c.attr("is_grad_enabled");
    modes = c.attr("_len_torch_dispatch_stack");
    transforms = c.attr("_are_functorch_transforms_active");
    tracing = c.attr("_is_tracing");
    saving_hooks = c.attr("_autograd").attr("_top_saved_tensors_default_hooks");
    forward_mode = py::module_::import("torch.autograd.forward_ad");
    is_neg = tensor.attr("is_neg");
    const char* name = "__dlpack_c_exchange_api__";
    if (!py::hasattr(tensor, name)) return;
    const py::object capsule = tensor.attr(name);
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (!pointer) PyErr_Clear();
    table = static_cast<const ExchangeTable*>(pointer);
    if (table && table->major != 1) table = nullptr;
  }

  bool is_tensor(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor.ptr() || type == parameter.ptr();
  }
};

// Never destroyed: Python may be gone by then.
const Torch& torch() {
  static const Torch* found = nullptr;  // no static guard: to import may hand the GIL over
  if (!found) found = new Torch;
  return *found;
}

py::object called(const py::object& function) {
  PyObject* result = PyObject_CallNoArgs(function.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

bool is_true(const py::object& value) { return value.ptr() == Py_True; }

bool same_type(const TensorView& a, const TensorView& b) {
  return a.type_code == b.type_code && a.type_bits == b.type_bits;
}

bool same_device(const TensorView& a, const TensorView& b) {
  return a.device_type == b.device_type && a.device_index == b.device_index;
}

bool is_contiguous(const TensorView& view) {
  int64_t step = 1;
  for (int n = view.ndim - 1; n >= 0; --n) {
    if (view.shape[n] != 1 && view.strides[n] != step) return false;
    step *= view.shape[n];
  }
  return true;
}

bool is_vector(const TensorView& view, int64_t N) { return view.ndim == 1 && view.shape[0] == N; }

}  // namespace

const ExchangeTable* exchange_table() { return torch().table; }

bool view_of(PyObject* tensor, TensorView& out) {
  if (torch().table->view(tensor, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

bool unwatched() {
  const Torch& t = torch();
  const auto number = [](const py::object& value) { return PyLong_AsLong(value.ptr()); };
  if (number(called(t.modes)) > 0 || is_true(called(t.transforms)) || is_true(called(t.tracing)))
    return false;
  if (number(t.forward_mode.attr(t.level)) >= 0) return false;
  const char* debug = std::getenv("SUPCLAP_DEBUG");
  return !debug || std::strcmp(debug, "1") != 0;
}

bool grad_enabled() { return is_true(called(torch().grad_enabled)); }

bool saves_plainly() {
  PyObject* hooks = PyObject_CallOneArg(torch().saving_hooks.ptr(), Py_True);
  if (!hooks) throw py::error_already_set();
  Py_DECREF(hooks);
  return hooks == Py_None;
}

bool is_plain(PyObject* tensor, const TensorView& view) {
  if (!view.data) return false;
  PyObject* negated = PyObject_CallOneArg(torch().is_neg.ptr(), tensor);
  if (!negated) throw py::error_already_set();
  Py_DECREF(negated);
  return negated != Py_True;
}

bool examine(const py::tuple& objects, bool infonce, Arguments& out) {
  if (!unwatched() || objects.size() != kArguments) return false;
  const Torch& t = torch();
  const bool recording = grad_enabled();
  for (int n = 0; n < kArguments; ++n) {
    PyObject* object = out.objects[n] = PyTuple_GET_ITEM(objects.ptr(), n);
    out.present[n] = object != Py_None;
    out.is_tensor[n] = out.present[n] && t.is_tensor(object);
    if (n < kDifferentiable) out.needs[n] = false;
    if (!out.present[n]) continue;
    if (!out.is_tensor[n]) {
      const bool number_allowed = n == kRadius || n == kScale || n == kBiasArgument;
      if (!number_allowed || !PyFloat_CheckExact(object)) return false;
      out.numbers[n] = PyFloat_AS_DOUBLE(object);
      if (std::isfinite(out.numbers[n]) && std::fabs(out.numbers[n]) > FLT_MAX) return false;
      continue;
    }
    TensorView& view = out.views[n];
    if (!view_of(object, view) || !is_plain(object, view) || !is_contiguous(view)) return false;
    if (n > 0 && !same_device(view, out.views[0])) return false;
    if (n < kDifferentiable && recording) {
      PyObject* required = PyObject_GetAttr(object, t.requires_grad.ptr());
      if (!required) throw py::error_already_set();
      out.needs[n] = required == Py_True;
      Py_DECREF(required);
    }
  }
  const TensorView &audio = out.views[kAudioRow], &text = out.views[kTextRow];
  if (!out.is_tensor[kAudioRow] || !out.is_tensor[kTextRow] || !out.present[kScale]) return false;
  if (audio.ndim != 2 || text.ndim != 2 || !same_type(audio, text)) return false;
  out.N = audio.shape[0];
  out.D = audio.shape[1];
  if (out.N < 1 || out.D < 1 || text.shape[0] != out.N || text.shape[1] != out.D) return false;
  if (out.present[kBiasArgument] && infonce) return false;
  for (const int n : {kScale, kBiasArgument})
    if (out.is_tensor[n] && out.views[n].ndim != 0) return false;
  if (out.is_tensor[kRadius]) {
    if (Py_TYPE(out.objects[kRadius]) == reinterpret_cast<PyTypeObject*>(t.parameter.ptr()))
      return false;  // watch.py wants to see it
    const TensorView& radius = out.views[kRadius];
    if (radius.ndim != 0 && !is_vector(radius, out.N)) return false;
  }
  const TensorView &ids = out.views[kIds], &weight = out.views[kWeight];
  if (out.present[kWeight] && !is_vector(weight, out.N)) return false;
  if (out.present[kIds])
    return is_vector(ids, out.N) && ids.type_code == kInteger && ids.type_bits == 64;
  return true;
}

void* memory_of(PyObject* tensor) {
  TensorView view;
  if (!view_of(tensor, view)) throw std::runtime_error("a tensor has no memory");
  return view.start();
}

py::object new_empty(PyObject* like, const py::tuple& shape) {
  PyObject* made = PyObject_CallMethodOneArg(like, torch().new_empty.ptr(), shape.ptr());
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

py::object new_empty(PyObject* like, int64_t elements) {
  return new_empty(like, py::make_tuple(elements));
}

bool Decisions::ours(const Arguments& arguments, int threads) {
  const TensorView& audio = arguments.views[kAudioRow];
  const Kind kind{audio.device_type,
                  audio.device_index,
                  audio.type_code * 256 + audio.type_bits,
                  arguments.N,
                  arguments.D,
                  arguments.present[kRadius],
                  threads};
  const auto found = known_.find(kind);
  if (found != known_.end()) return found->second;
  const py::object answer =
      decide_(py::handle(arguments.objects[kAudioRow]), arguments.present[kRadius]);
  if (answer.is_none()) return false;
  if (known_.size() > 4096) known_.clear();
  return known_[kind] = answer.cast<bool>();
}

DirectCall::DirectCall(const Arguments& arguments, int64_t real)
    : N_(arguments.N),
      D_(arguments.D),
      real_(real),
      gradient_(arguments.any_needs()),
      per_row_radius_(arguments.is_tensor[kRadius] && arguments.views[kRadius].ndim == 1) {
  for (int n = 0; n < kDifferentiable; ++n) needs_[n] = arguments.needs[n];
  for (int n = 0; n < kArguments; ++n) {
    values_[n] = nullptr;
    is_number_[n] = arguments.present[n] && !arguments.is_tensor[n];
    if (is_number_[n]) {
      doubles_[n] = arguments.numbers[n];
      singles_[n] = float(arguments.numbers[n]);
      values_[n] = real == 8 ? static_cast<void*>(&doubles_[n]) : &singles_[n];
    }
    if (arguments.is_tensor[n]) {
      const TensorView& view = arguments.views[n];
      tensors_[n] = py::reinterpret_borrow<py::object>(arguments.objects[n]);
      values_[n] = view.start();
      views_[n] = view;
      std::copy_n(view.shape, view.ndim, shapes_[n]);
    }
  }
}

void DirectCall::let_go() {
  for (py::object& tensor : tensors_) tensor = py::object();
}

bool DirectCall::finds_again(const py::tuple& inputs, Values& found) const {
  for (int n = 0; n < kArguments; ++n) {
    found[n] = values_[n];
    if (!values_[n] || is_number_[n]) continue;
    const py::object tensor = inputs[n];
    TensorView view;
    if (!view_of(tensor.ptr(), view) || !is_plain(tensor.ptr(), view) || !is_contiguous(view) ||
        !same_device(view, views_[n]) || !same_type(view, views_[n]) ||
        !std::equal(view.shape, view.shape + view.ndim, shapes_[n], shapes_[n] + views_[n].ndim))
      return false;
    found[n] = view.start();
  }
  return true;
}

bool DirectCall::takes(const py::object& upstream, TensorView& view) const {
  return unwatched() && view_of(upstream.ptr(), view) && is_plain(upstream.ptr(), view) &&
         view.type_code == kFloat && view.type_bits == 8 * real_;
}

py::tuple DirectCall::shape_of(int argument) const {
  if (argument == kAudioRow || argument == kTextRow) return py::make_tuple(N_, D_);
  return argument == kRadius && per_row_radius_ ? py::make_tuple(N_) : py::tuple();
}

py::tuple DirectCall::tensors() const {
  py::tuple found(kArguments);
  for (int n = 0; n < kArguments; ++n) found[n] = tensors_[n] ? tensors_[n] : py::none();
  return found;
}

py::tuple DirectCall::numbers() const {
  py::tuple found(kArguments);
  for (int n = 0; n < kArguments; ++n)
    found[n] = is_number_[n] ? py::object(py::float_(doubles_[n])) : py::none();
  return found;
}

py::tuple DirectCall::needs() const {
  py::tuple found(kDifferentiable);
  for (int n = 0; n < kDifferentiable; ++n) found[n] = needs_[n];
  return found;
}

}  // namespace supclap
