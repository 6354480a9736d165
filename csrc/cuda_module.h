// The CUDA part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

// Adds `built_with_cuda` to the module, and, where it is true, the submodule `cuda`.
void bind_cuda(pybind11::module_& m);
