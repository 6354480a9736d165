// What the C++ side may ask of the CUDA side.
//
// Pointers and streams are addresses of device memory and of a cudaStream_t as integers, so that
// neither torch nor the CUDA headers are needed to call these. A launcher returns an empty string,
// or a message that begins with its kernel's name; it never waits for the device.
#pragma once

#include <cstdint>
#include <string>

namespace supclap::cuda {

// Devices the driver offers; 0 also where there is no driver.
int device_count();

// r_i = sqrt(|a_i - t_i|^2 + eps^2), see row_gap.cuh.
std::string launch_row_gap(uintptr_t A,  // [N, D] float32, row-major
                           uintptr_t T,  // [N, D] float32, row-major
                           uintptr_t r,  // [N] float32, written
                           int64_t N, int64_t D, float eps, uintptr_t stream);

}  // namespace supclap::cuda
