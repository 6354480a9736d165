// Binds the CUDA launchers; always compiled, so that `built_with_cuda` is always there.
#include "cuda_module.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>

#if SUPCLAP_WITH_CUDA
#include "cuda/launchers.h"
#include "cuda_direct.h"
#endif

namespace py = pybind11;

#if SUPCLAP_WITH_CUDA

using namespace supclap::cuda;

namespace {

// The GPU targets that the kernels were compiled for, as SUPCLAP_CUDA_ARCHS spells them.
py::list architectures() {
  py::list names;
  const std::string all = SUPCLAP_CUDA_ARCHS;
  for (size_t start = 0, end; start < all.size(); start = end + 1) {
    end = std::min(all.find(';', start), all.size());
    names.append(all.substr(start, end - start));
  }
  return names;
}

void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

using Address = uintptr_t;

template <class Type>
Type* at(Address address) {
  return reinterpret_cast<Type*>(address);
}

using Fields = std::unordered_map<std::string_view, std::function<void(CudaProblem&, Address)>>;

// The setters of the fields that are addresses, by name.
Fields& pointers() {
  static Fields fields;
  return fields;
}

template <class Type>
void pointer(py::class_<CudaProblem>& cls, const char* name, Type* CudaProblem::* field) {
  const auto set = [field](CudaProblem& p, Address address) { p.*field = at<Type>(address); };
  cls.def_property(
      name, [field](const CudaProblem& p) { return reinterpret_cast<Address>(p.*field); }, set);
  pointers()[name] = set;
}

// Sets pointers by name, any number in one crossing of the boundary.
void give(CudaProblem& p, const py::kwargs& addresses) {
  for (const auto& [name, address] : addresses)
    pointers().at(name.cast<std::string_view>())(p, address.cast<Address>());
}

// Makes a problem of the numbers and tensors that came with a call, in one crossing of the
// boundary.
CudaProblem described(int64_t N, int64_t D, int64_t width, int dtype, int mode, bool infonce,
                      bool renormalize, bool normalize, bool stats, bool per_row_radius,
                      float alpha, float beta, float row_scale, Address text, int64_t text_n,
                      int64_t text_d, Address audio, int64_t audio_n, int64_t audio_d,
                      Address radius, Address scale, Address bias, Address weight, Address ids) {
  CudaProblem p{};
  p.N = N;
  p.D = D;
  p.width = width;
  p.dtype = dtype;
  p.mode = mode;
  p.infonce = infonce;
  p.renormalize = renormalize;
  p.normalize = normalize;
  p.stats = stats;
  p.per_row_radius = per_row_radius;
  p.alpha = alpha;
  p.beta = beta;
  p.row_scale = row_scale;
  p.text = at<void>(text);
  p.text_n = text_n;
  p.text_d = text_d;
  p.audio = at<void>(audio);
  p.audio_n = audio_n;
  p.audio_d = audio_d;
  p.radius = at<float>(radius);
  p.scale = at<float>(scale);
  p.bias = at<float>(bias);
  p.weight = at<float>(weight);
  p.ids = at<int64_t>(ids);
  return p;
}

void bind_problem(py::module_& m) {
  py::class_<CudaProblem> problem(m, "CudaProblem", py::module_local(),
                                  "See csrc/cuda/problem.h: fields and shapes.");
  problem.def(py::init([] { return CudaProblem{}; }));
  problem.def(py::init(&described));
#define NUMBER(name) problem.def_readwrite(#name, &CudaProblem::name)
  NUMBER(N);
  NUMBER(D);
  NUMBER(width);
  NUMBER(dtype);
  NUMBER(mode);
  NUMBER(infonce);
  NUMBER(renormalize);
  NUMBER(normalize);
  NUMBER(stats);
  NUMBER(per_row_radius);
  NUMBER(per_row_upstream);
  NUMBER(out_single);
  NUMBER(split);
  NUMBER(alpha);
  NUMBER(beta);
  NUMBER(row_scale);
  NUMBER(text_n);
  NUMBER(text_d);
  NUMBER(audio_n);
  NUMBER(audio_d);
#undef NUMBER
#define POINTER(name) pointer(problem, #name, &CudaProblem::name)
  POINTER(text);
  POINTER(audio);
  POINTER(T);
  POINTER(A);
  POINTER(radius);
  POINTER(scale);
  POINTER(bias);
  POINTER(weight);
  POINTER(ids);
  POINTER(upstream);
  POINTER(state);
  POINTER(running);
  POINTER(similarity);
  POINTER(omega);
  POINTER(bounds);
  POINTER(factors);
  POINTER(unit);
  POINTER(sums);
  POINTER(dT);
  POINTER(dA);
  POINTER(row_loss);
  POINTER(terms);
  POINTER(out_text);
  POINTER(out_audio);
  POINTER(after);
  POINTER(row_scalars);
  POINTER(row_radius);
  POINTER(out_scale);
  POINTER(out_bias);
  POINTER(out_radius);
  POINTER(counter);
#undef POINTER
  problem.def("give", &give);
}

// Binds a launcher of (CudaProblem, stream), whose error becomes an exception.
template <class Launcher>
void bind_rows(py::module_& m, const char* name, Launcher launcher) {
  m.def(
      name, [launcher](const CudaProblem& p, Stream stream) { raise_if(launcher(p, stream)); },
      py::call_guard<py::gil_scoped_release>());
}

using LiteralLauncher = std::string (*)(const CudaProblem&, const int*, const int*, Stream);
void bind_literal(py::module_& m, const char* name, LiteralLauncher launcher) {
  m.def(
      name,
      [launcher](const CudaProblem& p, Address index, Address count, Stream stream) {
        raise_if(launcher(p, at<int>(index), at<int>(count), stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

using TileLauncher = std::string (*)(const CudaProblem&, const PanelTile&, const PanelScratch&,
                                     Stream);
void bind_tile(py::module_& m, const char* name, TileLauncher launcher) {
  m.def(
      name,
      [launcher](const CudaProblem& p, int64_t i0, int ni, int64_t j0, int nj, int64_t ld,
                 int64_t size, Address panel, Address weights, Address part_i, Address part_j,
                 Address sums_i, Address sums_j, Stream stream) {
        const PanelTile tile{i0, j0, ni, nj, ld, size};
        const PanelScratch scratch{at<float>(panel),  at<void>(weights), at<float>(part_i),
                                   at<float>(part_j), at<float>(sums_i), at<float>(sums_j)};
        raise_if(launcher(p, tile, scratch, stream));
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_single(py::module_& m) {
  py::class_<SinglePlan>(m, "SinglePlan", py::module_local(), "See csrc/cuda/problem.h.")
      .def_readonly("side", &SinglePlan::side)
      .def_readonly("pairs", &SinglePlan::pairs)
      .def_readonly("kept", &SinglePlan::kept)
      .def_readonly("blocks", &SinglePlan::blocks)
      .def_readonly("shared", &SinglePlan::shared)
      .def_readonly("scratch", &SinglePlan::scratch);
  m.def("plan_single", py::overload_cast<const CudaProblem&, bool, int>(&plan_single));
  m.def("plan_single",
        py::overload_cast<const CudaProblem&, bool, int, int, int64_t>(&plan_single));
  m.def("single_limit", py::overload_cast<const CudaProblem&, int>(&single_limit));
  m.def("single_limit", py::overload_cast<CudaProblem, int, int, int64_t>(&single_limit));
  m.def(
      "single",
      [](const CudaProblem& p, const SinglePlan& plan, Address scratch, Address loss, bool gradient,
         Stream stream) { raise_if(single(p, plan, scratch, at<float>(loss), gradient, stream)); },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace

void bind_cuda(py::module_& parent) {
  parent.attr("built_with_cuda") = true;
  py::module_ m = parent.def_submodule("cuda", "Launchers of the kernels of csrc/cuda.");
  m.def("architectures", &architectures, "GPU targets the kernels were compiled for.");
  m.def("device_count", &device_count, "Devices the driver offers, 0 without one.");
  m.attr("THREADS") = kThreads;
  m.attr("PANEL_SHARED") = panel_shared();
  m.attr("HOPPER_SHARED") = kHopperShared;
  m.attr("PANEL_BLOCK") = py::make_tuple(kPanelRows, kPanelColumns);
  bind_problem(m);
  m.def(
      "pack_rows",
      [](const CudaProblem& p, bool text, Stream stream) { raise_if(pack_rows(p, text, stream)); },
      py::call_guard<py::gil_scoped_release>());
  bind_rows(m, "prepare_rows", &prepare_rows);
  bind_rows(m, "finish_statistics", &finish_statistics);
  bind_rows(m, "start_gradients", &start_gradients);
  bind_rows(m, "finish_gradients", &finish_gradients);
  bind_tile(m, "panel_tile", &panel_tile);
  bind_tile(m, "panel_merge", &panel_merge);
#if SUPCLAP_WITH_HOPPER
  bind_tile(m, "hopper_tile", &hopper_tile);
  m.def("hopper_copies_whole", &hopper_copies_whole);
#endif
  m.def(
      "list_literal",
      [](const CudaProblem& p, Address index, Address count, Stream stream) {
        raise_if(list_literal(p, at<int>(index), at<int>(count), stream));
      },
      py::call_guard<py::gil_scoped_release>());
  bind_literal(m, "literal_statistics", &literal_statistics);
  bind_literal(m, "literal_gradients", &literal_gradients);
  bind_single(m);
  bind_direct(m);
}

#else

void bind_cuda(py::module_& m) { m.attr("built_with_cuda") = false; }

#endif
