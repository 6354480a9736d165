// Launcher of row_gap.cuh.
#include <cuda_runtime.h>

#include "cuda/launchers.h"
#include "cuda/row_gap.cuh"

namespace supclap::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears it: having no driver is no error of a later launch
  return 0;
}

std::string launch_row_gap(uintptr_t A, uintptr_t T, uintptr_t r, int64_t N, int64_t D, float eps,
                           uintptr_t stream) {
  if (N == 0) return "";
  const int64_t blocks = (N + kRowsPerBlock - 1) / kRowsPerBlock;
  if (blocks > INT32_MAX) return "row_gap: N = " + std::to_string(N) + " rows exceed one grid";
  const auto* a = reinterpret_cast<const float*>(A);
  const auto* t = reinterpret_cast<const float*>(T);
  auto* out = reinterpret_cast<float*>(r);
  const bool vector = D % 4 == 0 && A % 16 == 0 && T % 16 == 0;
  const auto kernel = vector ? row_gap<true> : row_gap<false>;
  kernel<<<unsigned(blocks), kWarp * kRowsPerBlock, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      a, t, out, N, D, eps);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : std::string("row_gap: ") + cudaGetErrorString(error);
}

}  // namespace supclap::cuda
