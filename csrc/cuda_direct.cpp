// The direct calls of the single launch (cuda/single): on a GPU, or where the host stands in for
// it.
#include "cuda_direct.h"

#if SUPCLAP_WITH_CUDA

#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"
#include "direct.h"

namespace py = pybind11;

namespace supclap::cuda {

namespace {

constexpr int64_t kAlignment = 32;  // floats, as in plan.cu

int64_t aligned(int64_t floats) { return (floats + kAlignment - 1) / kAlignment * kAlignment; }

Stream stream_of(const TensorView& view) {
  if (view.device_type != kOnCuda) return 0;
  void* stream = nullptr;
  if (exchange_table()->stream(view.device_type, view.device_index, &stream) != 0)
    throw py::error_already_set();
  return reinterpret_cast<Stream>(stream);
}

// What `pretend` was told of a device that is not there; nothing is launched then.
struct Pretended {
  int multiprocessors = 0;
  int64_t shared = 0;
};
Pretended pretended;

SinglePlan plan_of(const CudaProblem& p, bool gradient) {
  const Pretended& chip = pretended;
  const SinglePlan plan = chip.multiprocessors
                              ? plan_single(p, gradient, 0, chip.multiprocessors, chip.shared)
                              : plan_single(p, gradient, 0);
  if (!plan.blocks) throw std::runtime_error("single: the batch does not fit on the chip");
  return plan;
}

// Calls a launcher, whose error becomes an exception.
template <class Launcher>
void launch(const Launcher& launcher) {
  if (pretended.multiprocessors) return;
  std::string error;
  {
    py::gil_scoped_release release;
    error = launcher();
  }
  if (!error.empty()) throw std::runtime_error(error);
}

int dtype_of(const TensorView& view) {
  if (view.type_code == kFloat && view.type_bits == 32) return kFloat32;
  if (view.type_code == kBfloat && view.type_bits == 16) return kBfloat16;
  if (view.type_code == kFloat && view.type_bits == 16) return kFloat16;
  return -1;
}

// One call: its forward also takes the sums of the gradients, for an upstream gradient of 1, from
// which every backward makes them.
class SingleCall : public DirectCall {
 public:
  SingleCall(const CudaProblem& options, const Arguments& arguments)
      : DirectCall(arguments, 4), problem_(options), where_(arguments.views[kAudioRow]) {
    CudaProblem& p = problem_;
    p.N = N_;
    p.D = D_;
    p.dtype = dtype_of(where_);
    const int64_t piece = p.dtype == kFloat32 ? 4 : 8;
    p.width = (p.D + piece - 1) / piece * piece;
    p.per_row_radius = per_row_radius_;
    if (!arguments.present[kRadius]) p.mode = kPlain;
    p.row_scale = p.row_scale > 0 ? float(1.0 / double(p.N)) : 1.0f;
    p.text_n = p.audio_n = p.D;
    p.text_d = p.audio_d = 1;
  }

  // The loss.
  py::object forward() {
    PyObject* const like = tensors_[kScale].ptr();  // a number in float32
    if (!like) throw std::logic_error("forward was called before");
    const py::object loss = new_empty(like, py::tuple());
    CudaProblem p = described(values_);
    const SinglePlan plan = plan_of(p, gradient_);
    const py::object scratch = new_empty(like, (plan.scratch + 3) / 4);
    const int64_t state = aligned(kStateRows * p.N);
    kept_ = new_empty(like, gradient_ ? state + sums_elements() + 3 * p.N : state);
    p.state = static_cast<float*>(memory_of(kept_.ptr()));
    if (gradient_) give_sums(p, p.state + state);
    auto* const out = static_cast<float*>(memory_of(loss.ptr()));
    const auto memory = reinterpret_cast<uintptr_t>(memory_of(scratch.ptr()));
    const Stream stream = stream_of(where_);
    launch([&] { return single(p, plan, memory, out, gradient_, stream); });
    let_go();
    return loss;
  }

  // What backward needs of forward; only once.
  py::object kept() { return std::move(kept_); }

  // The gradients of the differentiable arguments, None for those without; or None where something
  // looks at operators, or the tensors are not as they were. `inputs`: those that forward had, and
  // what it kept.
  py::object backward(const py::object& upstream, const py::tuple& inputs) {
    TensorView arrives;
    if (!takes(upstream, arrives)) return py::none();
    Values values;
    if (!finds_again(inputs, values)) return py::none();
    CudaProblem p = described(values);
    const py::object kept = inputs[kArguments], audio = inputs[kAudioRow];
    p.state = static_cast<float*>(memory_of(kept.ptr()));
    float* const sums = p.state + aligned(kStateRows * p.N);
    give_sums(p, sums);
    p.after = static_cast<const float*>(arrives.start());
    p.row_scalars = sums + sums_elements();
    py::tuple gradients(kDifferentiable);
    void* out[kDifferentiable] = {};
    for (int n = 0; n < kDifferentiable; ++n) {
      py::object gradient = py::none();
      if (needs_[n]) {
        gradient = new_empty((n <= kTextRow ? audio : kept).ptr(), shape_of(n));
        out[n] = memory_of(gradient.ptr());
      }
      gradients[n] = std::move(gradient);
    }
    p.out_audio = out[kAudioRow];
    p.out_text = out[kTextRow];
    p.row_radius = p.row_scalars + 2 * p.N;
    if (per_row_radius_ && out[kRadius])
      p.row_radius = static_cast<float*>(out[kRadius]);
    else
      p.out_radius = static_cast<float*>(out[kRadius]);
    p.out_scale = static_cast<float*>(out[kScale]);
    p.out_bias = static_cast<float*>(out[kBiasArgument]);
    const Stream stream = stream_of(where_);
    launch([&] { return finish_gradients(p, stream); });
    return gradients;
  }

 private:
  int64_t sums_elements() const {
    return 2 * problem_.N * problem_.width + (kRowSums + 1) * problem_.N + 2;
  }

  CudaProblem described(const Values& values) const {
    CudaProblem p = problem_;
    p.text = values[kTextRow];
    p.audio = values[kAudioRow];
    p.radius = static_cast<const float*>(values[kRadius]);
    p.scale = static_cast<const float*>(values[kScale]);
    p.bias = static_cast<const float*>(values[kBiasArgument]);
    p.weight = static_cast<const float*>(values[kWeight]);
    p.ids = static_cast<const int64_t*>(values[kIds]);
    return p;
  }

  // The parts of what a launch leaves for backward.
  void give_sums(CudaProblem& p, float* start) const {
    p.dT = needs_[kTextRow] ? start : nullptr;
    p.dA = needs_[kAudioRow] ? start + p.N * p.width : nullptr;
    p.sums = start + 2 * p.N * p.width;
    p.omega = p.sums + kRowSums * p.N;
    p.unit = p.omega + p.N;
    p.counter = reinterpret_cast<unsigned*>(p.unit + 1);
  }

  CudaProblem problem_;
  TensorView where_;
  py::object kept_ = py::none();  // from forward until `kept`
};

// The calls with some options.
class SingleCalls {
 public:
  SingleCalls(bool infonce, int mode, bool renormalize, bool normalize, bool mean, float alpha,
              float beta, bool on_host, py::object decide)
      : on_host_(on_host), decisions_(std::move(decide)) {
    options_.infonce = infonce;
    options_.mode = mode;
    options_.renormalize = renormalize;
    options_.normalize = normalize;
    options_.alpha = alpha;
    options_.beta = beta;
    options_.row_scale = mean ? 1.0f : 0.0f;  // of N rows: known to a call
  }

  // A SingleCall, or None if the call is not an ordinary one of a batch that fits on the chip.
  py::object operator()(const py::tuple& objects) {
    Arguments arguments;
    if (!examine(objects, options_.infonce, arguments)) return py::none();
    const TensorView& rows = arguments.views[kAudioRow];
    if (rows.device_type != (on_host_ ? kOnCpu : kOnCuda) || dtype_of(rows) < 0) return py::none();
    for (const int n : {kRadius, kScale, kBiasArgument, kWeight})
      if (arguments.present[n] &&
          (!arguments.is_tensor[n] || dtype_of(arguments.views[n]) != kFloat32))
        return py::none();  // a number must be sent to the device first
    if (!on_host_ && rows.device_index != current_device()) return py::none();
    if (!decisions_.ours(arguments)) return py::none();
    if (arguments.any_needs() && !saves_plainly()) return py::none();
    return py::cast(std::make_unique<SingleCall>(options_, arguments));
  }

 private:
  CudaProblem options_{};
  bool on_host_;
  Decisions decisions_;
};

}  // namespace

void bind_direct(py::module_& m) {
  bind_call<SingleCall>(m, "SingleCall");
  py::class_<SingleCalls>(m, "SingleCalls", py::module_local(), "Ordinary calls with some options.")
      .def(py::init<bool, int, bool, bool, bool, float, float, bool, py::object>())
      .def("__call__", &SingleCalls::operator());
  m.def(
      "pretend", [](int multiprocessors, int64_t shared) { pretended = {multiprocessors, shared}; },
      "Plan for a device of so many multiprocessors and bytes of shared memory, and launch "
      "nothing.");
}

}  // namespace supclap::cuda

#endif
