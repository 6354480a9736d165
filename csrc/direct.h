// Ordinary calls of the loss, from Python's arguments to the kernels without Python in between.
//
// A call is ordinary if nothing has to be converted, nothing looks at what PyTorch does, and every
// argument is what the documentation asks for. Any other call is declined, and Python's own way
// through checks.py and ops.py takes it: so errors and conversions are written once, there.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <map>
#include <tuple>

#include "exchange.h"

namespace supclap {

// The arguments, in the order of backends/call.py's Tensors.
enum Argument { kAudioRow, kTextRow, kRadius, kScale, kBiasArgument, kIds, kWeight };
constexpr int kArguments = 7, kDifferentiable = 5;

struct Arguments {
  PyObject* objects[kArguments];  // borrowed
  TensorView views[kArguments];
  bool present[kArguments], is_tensor[kArguments];
  double numbers[kArguments];  // of those that are Python floats
  bool needs[kDifferentiable];
  int64_t N, D;

  bool any_needs() const {
    for (const bool need : needs)
      if (need) return true;
    return false;
  }
};

// Whether nothing looks at operators: no mode, transform, tracer or tangent, and no debugging.
bool unwatched();

// Whether what autograd saves is kept as it is. Otherwise a hook may want to move or to drop all
// that forward leaves for backward, and a direct call leaves more than it saves.
bool saves_plainly();

// Whether a gradient is recorded.
bool grad_enabled();

// A tensor's memory holds its values: it is neither negated in name only, nor zeros without memory.
bool is_plain(PyObject* tensor, const TensorView& view);

// Fills `out` from the arguments in the order of Argument; false if the call is not ordinary.
bool examine(const pybind11::tuple& objects, bool infonce, Arguments& out);

// Where a tensor's memory starts. Raises where it has none.
void* memory_of(PyObject* tensor);

// An uninitialised tensor of this shape, of the dtype and on the device of `like`.
pybind11::object new_empty(PyObject* like, const pybind11::tuple& shape);
pybind11::object new_empty(PyObject* like, int64_t elements);

// Which of the ways of dispatch.py computes a kind of call, asked for once: `decide(audio,
// has_radius)` says whether it is ours (None: not now, ask again).
class __attribute__((visibility("hidden"))) Decisions {
 public:
  explicit Decisions(pybind11::object decide) : decide_(std::move(decide)) {}
  bool ours(const Arguments& arguments, int threads = 0);

 private:
  using Kind = std::tuple<int32_t, int32_t, int, int64_t, int64_t, bool, int>;
  pybind11::object decide_;
  std::map<Kind, bool> known_;
};

// Memory of each argument, of a tensor or of a number; null: there is none.
using Values = std::array<void*, kArguments>;

// What a call keeps of its arguments from forward to backward.
class __attribute__((visibility("hidden"))) DirectCall {
 public:
  // The arguments that are tensors, until forward; those that are numbers; None for the others.
  pybind11::tuple tensors() const;
  pybind11::tuple numbers() const;
  // Which of the differentiable ones want a gradient, and whether any does.
  pybind11::tuple needs() const;
  bool gradient() const { return gradient_; }

 protected:
  // `real` bytes of a number: 4 or 8.
  DirectCall(const Arguments& arguments, int64_t real);
  // From here on autograd keeps the tensors.
  void let_go();
  // The memory of the arguments as autograd hands them back; false where one of them has another
  // layout now, such as by an assignment to its `data`.
  bool finds_again(const pybind11::tuple& inputs, Values& found) const;
  // Whether `upstream` is a number as the kernels read it, and nothing looks at operators.
  bool takes(const pybind11::object& upstream, TensorView& view) const;
  // The shape of the gradient of a differentiable argument.
  pybind11::tuple shape_of(int argument) const;

  int64_t N_, D_, real_;
  bool gradient_, per_row_radius_, needs_[kDifferentiable];
  pybind11::object tensors_[kArguments];
  Values values_;

 private:
  TensorView views_[kArguments];  // of the tensors that forward had; their shapes are below
  int64_t shapes_[kArguments][2];
  bool is_number_[kArguments];
  double doubles_[kArguments];
  float singles_[kArguments];
};

// Binds what Python asks of every direct call.
template <class Call>
pybind11::class_<Call> bind_call(pybind11::module_& m, const char* name) {
  return pybind11::class_<Call>(m, name, pybind11::module_local(), "An ordinary call.")
      .def("forward", &Call::forward)
      .def("backward", &Call::backward)
      .def_property_readonly("kept", &Call::kept)
      .def_property_readonly("tensors", &Call::tensors)
      .def_property_readonly("numbers", &Call::numbers)
      .def_property_readonly("needs", &Call::needs)
      .def_property_readonly("gradient", &Call::gradient);
}

// The direct calls of the CPU.
void bind_cpu_direct(pybind11::module_& m);

}  // namespace supclap
