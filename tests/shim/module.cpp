// The Python module `supclap_shim`: the CUDA launchers with their kernels on the host, and what
// the tests set.
#include <pybind11/pybind11.h>

#include "cuda_module.h"
#include "shim.h"

PYBIND11_MODULE(supclap_shim, m) {
  bind_cuda(m);
  auto cuda = m.attr("cuda").cast<pybind11::module_>();
  cuda.attr("SCHEDULES") = shim::schedules();
  cuda.def("set_schedule", &shim::set_schedule);
  cuda.def("remove_barrier", &shim::remove_barrier, "(\"file:line\" or \"\", log)");
  cuda.def("set_multiprocessors", &shim::set_multiprocessors);
  cuda.def("record", &shim::record);
  cuda.def("replay", &shim::replay);
}
