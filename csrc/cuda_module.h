// The CUDA part of the Python module.
#pragma once

#include <pybind11/pybind11.h>

// Adds `built_with_cuda`, and what was built with it, to `m`.
void bind_cuda(pybind11::module_& m);
