// The direct calls of small batches on a CPU (cpu/small.h).
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "direct.h"

namespace py = pybind11;

namespace supclap {

namespace {

constexpr size_t kLine = 64;

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kLine)); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(int64_t bytes) {
  return Memory(::operator new(size_t(bytes), std::align_val_t(kLine)));
}

// One call. Forward computes the gradients, too, for an upstream gradient of 1; the first backward
// gives them away, and any later one computes them again.
class SmallCall : public DirectCall {
 public:
  SmallCall(const CpuProblem& options, bool normalize, const Arguments& arguments, int threads)
      : DirectCall(arguments, arguments.views[kAudioRow].type_bits / 8) {
    CpuProblem& p = batch_.problem = options;
    p.N = N_;
    p.D = D_;
    p.is_double = real_ == 8;
    p.threads = threads;
    p.svr = p.svr && arguments.present[kRadius];
    p.mirror = p.mirror && p.svr;
    p.shared = p.shared && p.svr;
    p.per_row_radius = per_row_radius_;
    batch_.normalize = normalize;
  }

  // The loss.
  py::object forward() {
    PyObject* const like = tensors_[kAudioRow].ptr();
    if (!like) throw std::logic_error("forward was called before");
    const py::object loss = new_empty(like, py::tuple());
    gradients_ = compute(values_, memory_of(loss.ptr()), like);
    let_go();
    return loss;
  }

  // Autograd keeps the arguments. The gradients wait here: they are given away.
  py::object kept() { return py::none(); }

  // The gradients of the differentiable arguments, None for those without; or None where something
  // looks at operators, or the tensors are not as they were. `inputs`: those that forward had.
  py::object backward(const py::object& upstream, const py::tuple& inputs) {
    TensorView arrives;
    if (!takes(upstream, arrives)) return py::none();
    Gradients ready;
    ready.swap(gradients_);  // at once: another thread may go backward, too
    if (ready.empty()) {
      double loss;
      Values values;
      if (!finds_again(inputs, values)) return py::none();
      const py::object audio = inputs[kAudioRow];
      ready = compute(values, &loss, audio.ptr());
    }
    const int64_t sizes[] = {N_ * D_, N_ * D_, per_row_radius_ ? N_ : 1, 1, 1};
    py::tuple gradients(kDifferentiable);
    for (int n = 0; n < kDifferentiable; ++n) {
      if (needs_[n])
        kernels().scale(real_ == 8, memory_of(ready[n].ptr()), sizes[n], arrives.start());
      gradients[n] = needs_[n] ? std::move(ready[n]) : py::none();
    }
    return gradients;
  }

 private:
  using Gradients = std::vector<py::object>;

  // The pass: the loss, and the gradients where any is needed. Several threads may be here.
  Gradients compute(const Values& values, void* loss, PyObject* like) const {
    SmallBatch batch = batch_;
    CpuProblem& p = batch.problem;
    double scalars[2];
    void* out[kDifferentiable] = {};
    Gradients gradients(gradient_ ? kDifferentiable : 0);
    for (int n = 0; n < kDifferentiable; ++n) {
      if (!needs_[n]) continue;
      gradients[n] = new_empty(like, shape_of(n));
      out[n] = memory_of(gradients[n].ptr());
    }
    batch.text = values[kTextRow];
    batch.audio = values[kAudioRow];
    p.R = values[kRadius];
    p.w = values[kWeight];
    batch.scale = values[kScale];
    batch.bias = values[kBiasArgument];
    batch.ids = static_cast<const int64_t*>(values[kIds]);
    batch.loss = loss;
    {
      py::gil_scoped_release release;
      const Memory memory = allocate(kernels().small_bytes(batch));
      const Memory rows = allocate((kStateRows + 1) * N_ * real_);  // and dR, unless it is wanted
      batch.memory = memory.get();
      p.state = rows.get();
      if (gradient_) {
        batch.dA = out[kAudioRow];
        batch.dT = out[kTextRow];
        void* const spare = static_cast<char*>(rows.get()) + kStateRows * N_ * real_;
        batch.dR = per_row_radius_ && out[kRadius] ? out[kRadius] : spare;
        batch.scalars = scalars;
      }
      kernels().small_pass(batch);
      if (out[kRadius] && out[kRadius] != batch.dR)
        std::memcpy(out[kRadius], batch.dR, size_t(real_));
    }
    for (const int n : {kScale, kBiasArgument})
      if (out[n])
        std::memcpy(out[n], reinterpret_cast<char*>(scalars) + (n - kScale) * real_, size_t(real_));
    return gradients;
  }

  SmallBatch batch_{};
  Gradients gradients_;  // from forward until the first backward
};

// The calls with some options.
class SmallCalls {
 public:
  SmallCalls(bool infonce, bool support, bool mirror, bool shared, bool renormalize, bool normalize,
             bool mean, double alpha, double beta, py::object decide, py::object threads)
      : normalize_(normalize), decisions_(std::move(decide)), threads_(std::move(threads)) {
    options_.infonce = infonce;
    options_.svr = support;
    options_.mirror = mirror;
    options_.shared = shared;
    options_.renormalize = renormalize;
    options_.mean = mean;
    options_.alpha = alpha;
    options_.beta = beta;
  }

  // A SmallCall, or None if the call is not an ordinary one of a small batch.
  py::object operator()(const py::tuple& objects) {
    Arguments arguments;
    if (!examine(objects, options_.infonce, arguments)) return py::none();
    const TensorView& rows = arguments.views[kAudioRow];
    const int bits = rows.type_bits;
    if (rows.device_type != kOnCpu || rows.type_code != kFloat || (bits != 32 && bits != 64))
      return py::none();
    for (const int n : {kRadius, kScale, kBiasArgument, kWeight}) {
      const TensorView& view = arguments.views[n];
      if (arguments.is_tensor[n] && (view.type_code != kFloat || view.type_bits != bits))
        return py::none();
    }
    const int threads = threads_().cast<int>();
    if (!decisions_.ours(arguments, threads)) return py::none();
    if (arguments.any_needs() && !saves_plainly()) return py::none();
    return py::cast(std::make_unique<SmallCall>(options_, normalize_, arguments, threads));
  }

 private:
  CpuProblem options_{};
  bool normalize_;
  Decisions decisions_;
  py::object threads_;
};

}  // namespace

void bind_cpu_direct(py::module_& m) {
  bind_call<SmallCall>(m, "SmallCall");
  py::class_<SmallCalls>(m, "SmallCalls", "Ordinary calls with some options.")
      .def(py::init<bool, bool, bool, bool, bool, bool, bool, double, double, py::object,
                    py::object>())
      .def("__call__", &SmallCalls::operator());
  m.def(
      "has_exchange", [] { return exchange_table() != nullptr; },
      "Whether this PyTorch hands out tensors through DLPack's table.");
}

}  // namespace supclap
