// The Python module `supclap_kernels._native`: pointers in, nothing of torch.
#include <pybind11/pybind11.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <utility>

#include "cpu/bf16_gemm.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cuda_module.h"
#include "direct.h"

namespace py = pybind11;
using namespace supclap;

namespace {

py::list isa_names(bool only_running) {
  py::list names;
  for (const Isa& isa : isas())
    if (isa.runs || !only_running) names.append(isa.name);
  return names;
}

// A pointer field of CpuProblem as an integer property.
template <class Pointer>
void pointer(py::class_<CpuProblem>& cls, const char* name, Pointer CpuProblem::* field) {
  cls.def_property(
      name, [field](const CpuProblem& p) { return reinterpret_cast<uintptr_t>(p.*field); },
      [field](CpuProblem& p, uintptr_t address) { p.*field = reinterpret_cast<Pointer>(address); });
}

template <class Type>
Type* at(uintptr_t address) {
  return reinterpret_cast<Type*>(address);
}

// The bfloat16 products; `bf16_products` says whether they are compiled in and of this processor.
void bind_bf16(py::module_& m) {
#if SUPCLAP_HAVE_AVX512BF16
  m.attr("bf16_products") =
      bool(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "bf16_pack",
      [](uintptr_t Y, int64_t N, int64_t D, bool transposed, uintptr_t out, int threads) {
        (transposed ? bf16::pack_transposed : bf16::pack)(at<uint16_t>(Y), N, D, at<uint16_t>(out),
                                                          threads);
      },
      Release());
  m.def(
      "bf16_convert",
      [](uintptr_t W, int64_t rows, int64_t columns, bool transposed, uintptr_t out, int threads) {
        bf16::convert(at<float>(W), rows, columns, transposed, at<uint16_t>(out), threads);
      },
      Release());
  m.def(
      "bf16_multiply",
      [](uintptr_t X, int64_t ldx, uintptr_t Y, int64_t group_stride, uintptr_t C, int64_t ldc,
         int64_t M, int64_t N, int64_t K, bool accumulate, int threads) {
        bf16::multiply(at<uint16_t>(X), ldx, at<uint16_t>(Y), group_stride, at<float>(C), ldc, M, N,
                       K, accumulate, threads);
      },
      Release());
#else
  m.attr("bf16_products") = false;
#endif
}

// The family of an AMD processor, 0 of any other: 25 is Zen 3 and 4, 26 is Zen 5.
int amd_family() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
  return int((a >> 8 & 15) + (a >> 20 & 255));
#else
  return 0;
#endif
}

// Products, and the pass of a small batch: SmallBatch's fields in their order.
void bind_small(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.attr("amd_family") = amd_family();
  m.def(
      "multiply",
      [](bool is_double, uintptr_t X, int64_t x_row, int64_t x_column, uintptr_t Y, int64_t y_row,
         int64_t y_column, int64_t M, int64_t N, int64_t K, uintptr_t C, int64_t ldc, bool add,
         int threads) {
        kernels().multiply(Product{is_double, at<void>(X), at<void>(Y), x_row, x_column, y_row,
                                   y_column, M, N, K, at<void>(C), ldc, add, threads});
      },
      Release());
  m.def("small_bytes", [](const CpuProblem& p, bool normalize) {
    SmallBatch batch{};
    batch.problem = p;
    batch.normalize = normalize;
    return kernels().small_bytes(batch);
  });
  m.def(
      "small_pass",
      [](const CpuProblem& p, bool normalize, uintptr_t text, uintptr_t audio, uintptr_t radius,
         uintptr_t scale, uintptr_t bias, uintptr_t ids, uintptr_t weight, uintptr_t upstream,
         uintptr_t state, uintptr_t memory, uintptr_t loss, uintptr_t terms, uintptr_t similarity,
         uintptr_t dT, uintptr_t dA, uintptr_t dR, uintptr_t scalars) {
        SmallBatch batch{};
        batch.problem = p;
        batch.problem.R = at<void>(radius);
        batch.problem.w = at<void>(weight);
        batch.problem.upstream = at<void>(upstream);
        batch.problem.state = at<void>(state);
        batch.normalize = normalize;
        batch.text = at<void>(text);
        batch.audio = at<void>(audio);
        batch.scale = at<void>(scale);
        batch.bias = at<void>(bias);
        batch.ids = at<int64_t>(ids);
        batch.memory = at<void>(memory);
        batch.loss = at<void>(loss);
        batch.terms = at<double>(terms);
        batch.similarity = at<double>(similarity);
        batch.dT = at<void>(dT);
        batch.dA = at<void>(dA);
        batch.dR = at<void>(dR);
        batch.scalars = at<void>(scalars);
        kernels().small_pass(batch);
      },
      Release());
  m.def(
      "scale_gradients",
      [](const CpuProblem& p, uintptr_t kept, uintptr_t upstream, uintptr_t dA, uintptr_t dT,
         uintptr_t dR, uintptr_t dk, uintptr_t db) {
        void* const out[] = {at<void>(dA), at<void>(dT), at<void>(dR), at<void>(dk), at<void>(db)};
        kernels().scale_gradients(p, at<void>(kept), at<void>(upstream), out);
      },
      Release());
}

// constants.h and the layouts of params.h by Python's names, for the test that compares them.
void bind_layout(py::module_& m) {
  py::dict constants;
  constants["HIDDEN"] = kHidden;
  constants["EPS"] = kEps;
  constants["LITERAL_C"] = kLiteralC;
  constants["LITERAL_GAP"] = kLiteralGap;
  constants["LITERAL_LENGTH"] = kLiteralLength;
  constants["MIN_LENGTH"] = kMinLength;
  constants["MIN_NORM"] = kMinNorm;
  m.attr("CONSTANTS") = constants;
  py::dict layout;
  const std::pair<const char*, int> numbers[] = {
      {"TEXT_ROWS", kTextRows},
      {"AUDIO_ROWS", kAudioRows},
      {"SUPPORT_ROWS", kSupportRows},
      {"OTHER_ROWS", kOtherRows},
      {"DIRECTIONS", kDirections},
      {"STATE_L", kStateL},
      {"STATE_OTHERS", kStateOthers},
      {"STATE_GEOMETRY", kStateGeometry},
      {"STATE_ROWS", kStateRows},
      {"GAP", kGap},
      {"C", kC},
      {"TILE_C", kTileC},
      {"OFFSET", kOffset},
      {"TEXT_INVERSE", kTextInverse},
      {"AUDIO_INVERSE", kAudioInverse},
      {"POSITIVE", kPositive},
      {"STEP_TEXT", kStepText},
      {"STEP_AUDIO", kStepAudio},
      {"PANEL_POSITIVE", kPanelPositive},
      {"GEOMETRY_ROWS", kGeometryRows},
      {"BASE", kBase},
      {"BIAS", kBias},
      {"RHO_TEXT", kRhoText},
      {"RHO_AUDIO", kRhoAudio},
      {"SUPPORT_TEXT", kSupportText},
      {"SUPPORT_AUDIO", kSupportAudio},
      {"RHO_LITERAL", kRhoLiteral},
      {"TILE_SUMS", kTileSums},
      {"ROW_SUMS", kRowSums},
      {"PLAIN", kPlain},
      {"ONE_SIDED", kOneSided},
      {"SHARED", kShared},
      {"MIRROR", kMirror},
      {"SIMILARITY", kSimilarity},
      {"PLANES", kPlanes},
  };
  for (const auto& [name, number] : numbers) layout[name] = number;
  m.attr("LAYOUT") = layout;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::list compiled = isa_names(false);
#if SUPCLAP_HAVE_AVX512BF16
  compiled.append("avx512bf16");  // the bfloat16 products only: not a name for set_isa
#endif
  m.attr("isa_compiled") = compiled;
  m.attr("isa_running") = isa_names(true);
  m.def("isa", [] { return isa_in_use().name; }, "Instruction set in use.");
  m.def("set_isa", &set_isa, "Chooses an instruction set by hand.");
  m.def("parallel_runtime", &parallel_runtime, "Where the threads come from.");
  m.attr("MAX_TILE") = kMaxTile;
  bind_layout(m);

  py::class_<CpuProblem> problem(m, "CpuProblem", "See csrc/params.h: every field with its shape.");
  problem.def(py::init([] { return CpuProblem{}; }))
      .def_readwrite("N", &CpuProblem::N)
      .def_readwrite("D", &CpuProblem::D)
      .def_readwrite("is_double", &CpuProblem::is_double)
      .def_readwrite("infonce", &CpuProblem::infonce)
      .def_readwrite("svr", &CpuProblem::svr)
      .def_readwrite("mirror", &CpuProblem::mirror)
      .def_readwrite("shared", &CpuProblem::shared)
      .def_readwrite("renormalize", &CpuProblem::renormalize)
      .def_readwrite("mean", &CpuProblem::mean)
      .def_readwrite("per_row", &CpuProblem::per_row)
      .def_readwrite("per_row_radius", &CpuProblem::per_row_radius)
      .def_readwrite("threads", &CpuProblem::threads)
      .def_readwrite("split", &CpuProblem::split)
      .def_readwrite("k", &CpuProblem::k)
      .def_readwrite("b", &CpuProblem::b)
      .def_readwrite("alpha", &CpuProblem::alpha)
      .def_readwrite("beta", &CpuProblem::beta);
  pointer(problem, "T", &CpuProblem::T);
  pointer(problem, "A", &CpuProblem::A);
  pointer(problem, "R", &CpuProblem::R);
  pointer(problem, "w", &CpuProblem::w);
  pointer(problem, "code", &CpuProblem::code);
  pointer(problem, "rows", &CpuProblem::rows);
  pointer(problem, "running", &CpuProblem::running);
  pointer(problem, "state", &CpuProblem::state);
  pointer(problem, "upstream", &CpuProblem::upstream);
  pointer(problem, "omega", &CpuProblem::omega);
  pointer(problem, "factors", &CpuProblem::factors);
  pointer(problem, "sums", &CpuProblem::sums);

  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("prepare_rows", [](const CpuProblem& p) { kernels().prepare_rows(p); }, Release());
  m.def("count_literal", [](const CpuProblem& p) { return kernels().count_literal(p); }, Release());
  m.def(
      "hide_pairs",
      [](const CpuProblem& p, int64_t i0, int64_t ni, int64_t j0, int64_t nj, uintptr_t panel) {
        kernels().hide_pairs(p, Tile{i0, ni, j0, nj}, at<void>(panel));
      },
      Release());
  m.def(
      "statistics",
      [](const CpuProblem& p, int64_t i0, int64_t ni, int64_t j0, int64_t nj, uintptr_t panel) {
        kernels().statistics(p, Tile{i0, ni, j0, nj}, at<void>(panel));
      },
      Release());
  m.def(
      "finish_statistics",
      [](const CpuProblem& p, uintptr_t loss, uintptr_t terms) {
        kernels().finish_statistics(p, at<void>(loss), at<double>(terms));
      },
      Release());
  m.def("prepare_weights", [](const CpuProblem& p) { kernels().prepare_weights(p); }, Release());
  m.def(
      "weights",
      [](const CpuProblem& p, int64_t i0, int64_t ni, int64_t j0, int64_t nj, uintptr_t panel,
         uintptr_t out) {
        kernels().weights(p, Tile{i0, ni, j0, nj}, at<void>(panel), at<void>(out));
      },
      Release());
  m.def(
      "finish_gradients",
      [](const CpuProblem& p, uintptr_t dT, uintptr_t dA, uintptr_t dR, uintptr_t scalars) {
        kernels().finish_gradients(p, at<void>(dT), at<void>(dA), at<void>(dR), at<void>(scalars));
      },
      Release());
  m.def(
      "one_way_statistics",
      [](const CpuProblem& p, int direction, int64_t i0, int64_t ni, int64_t nj, uintptr_t code,
         uintptr_t panel) {
        kernels().one_way_statistics(p, OneWay{direction, i0, ni, nj, at<int32_t>(code)},
                                     at<void>(panel));
      },
      Release());
  m.def(
      "one_way_weights",
      [](const CpuProblem& p, int direction, int64_t i0, int64_t ni, int64_t nj, uintptr_t code,
         uintptr_t panel, uintptr_t out) {
        kernels().one_way_weights(p, OneWay{direction, i0, ni, nj, at<int32_t>(code)},
                                  at<void>(panel), at<void>(out));
      },
      Release());
  m.def(
      "literal_statistics", [](const CpuProblem& p) { kernels().literal_statistics(p); },
      Release());
  m.def(
      "literal_gradients",
      [](const CpuProblem& p, uintptr_t dT, uintptr_t dA) {
        kernels().literal_gradients(p, at<void>(dT), at<void>(dA));
      },
      Release());
  bind_small(m);
  bind_cpu_direct(m);
  bind_bf16(m);
  bind_cuda(m);
}
