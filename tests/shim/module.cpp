// The Python module `supclap_shim`: the CUDA launchers with their kernels on the host, and what
// the tests set.
#include <pybind11/pybind11.h>

#include "cuda_module.h"
#include "shim.h"

PYBIND11_MODULE(supclap_shim, m) {
  bind_cuda(m);
  m.attr("SCHEDULES") = shim::schedules();
  m.def("set_schedule", &shim::set_schedule);
  m.def("remove_barrier", &shim::remove_barrier, "\"file:line\", or \"\" for none.");
  m.def("set_multiprocessors", &shim::set_multiprocessors);
}
