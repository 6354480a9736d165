// Binds the CUDA launchers; always compiled, so that `built_with_cuda` is always there.
#include "cuda_module.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#if SUPCLAP_WITH_CUDA
#include "cuda/launchers.h"
#endif

namespace py = pybind11;

#if SUPCLAP_WITH_CUDA

namespace {

// GPU targets the kernels were compiled for, as SUPCLAP_CUDA_ARCHS spells them.
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

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("built_with_cuda") = true;
  m.def("cuda_architectures", &architectures, "GPU targets the CUDA kernels were compiled for.");
  m.def("cuda_device_count", &supclap::cuda::device_count,
        "Devices the driver offers, 0 without one.");
  m.def(
      "cuda_row_gap",
      [](uintptr_t A, uintptr_t T, uintptr_t r, int64_t N, int64_t D, float eps, uintptr_t stream) {
        py::gil_scoped_release release;
        raise_if(supclap::cuda::launch_row_gap(A, T, r, N, D, eps, stream));
      },
      py::arg("A"), py::arg("T"), py::arg("r"), py::arg("N"), py::arg("D"), py::arg("eps"),
      py::arg("stream"),
      "r_i = sqrt(|a_i - t_i|^2 + eps^2). A, T [N, D] and r [N] are addresses of contiguous\n"
      "float32 device memory, stream that of a cudaStream_t (0: the default stream).");
}

#else

void bind_cuda(py::module_& m) { m.attr("built_with_cuda") = false; }

#endif
