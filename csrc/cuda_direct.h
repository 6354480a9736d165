// Binds the direct calls of the single launch.
#pragma once

#include <pybind11/pybind11.h>

namespace supclap::cuda {

void bind_direct(pybind11::module_& m);

}  // namespace supclap::cuda
