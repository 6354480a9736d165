// Launches a kernel and returns what went wrong; in tests a host stands in for the device.
#pragma once

#include <string>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "shim.h"
#endif

#include "cuda/device/device.cuh"

namespace supclap::cuda {

struct Grid {
  dim3 blocks;
  size_t shared = 0;  // bytes of dynamic shared memory
  bool cooperative = false;
  unsigned threads = kThreads;
};

inline unsigned blocks_for(int64_t count, int64_t each) {
  return unsigned((count + each - 1) / each);
}

#ifdef __CUDACC__

inline std::string message(const char* kernel, cudaError_t error) {
  return std::string(kernel) + ": " + cudaGetErrorString(error);
}

// An attribute of the current device; -1 without one.
inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = -1;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : -1;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int64_t shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Launches a kernel; returns "" or a message that begins with the kernel's name. Never waits for
// the device.
template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), const Grid& grid,
                   uintptr_t stream, const Arguments&... arguments) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared > 48 * 1024) {
    const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            int(grid.shared));
    if (error != cudaSuccess) return message(name, error);
  }
  const auto to = reinterpret_cast<cudaStream_t>(stream);
  const auto go = [&](Parameters... values) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    return grid.cooperative ? cudaLaunchCooperativeKernel(function, grid.blocks, dim3(grid.threads),
                                                          pointers, grid.shared, to)
                            : cudaLaunchKernel(function, grid.blocks, dim3(grid.threads), pointers,
                                               grid.shared, to);
  };
  const auto error = go(arguments...);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clears it: it is no error of a later launch
  return message(name, error);
}

#else

inline int multiprocessors() { return shim::multiprocessors(); }
inline int64_t shared_limit() { return 227 * 1024; }

template <class... Parameters, class... Arguments>
std::string launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, uintptr_t,
                   const Arguments&... arguments) {
  (void)name;
  shim::launch(grid.blocks, grid.threads, grid.shared, grid.cooperative,
               [=] { kernel(arguments...); });
  return "";
}

#endif

// Calls go(scalar) with a value of the embeddings' type.
template <class Go>
std::string by_dtype(int dtype, const Go& go) {
  switch (dtype) {
    case kFloat32:
      return go(float{});
    case kBfloat16:
      return go(Bfloat16{});
    default:
      return go(Float16{});
  }
}

}  // namespace supclap::cuda
