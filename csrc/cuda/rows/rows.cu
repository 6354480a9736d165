// Launchers of the kernels that have rows, not tiles.
#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/rows/kernels.cuh"

namespace supclap::cuda {

int device_count() {
#ifdef __CUDACC__
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // clears it: having no driver is no error of a later launch
#endif
  return 0;
}

int current_device() {
  int device = -1;
#ifdef __CUDACC__
  if (cudaGetDevice(&device) != cudaSuccess) cudaGetLastError();
#endif
  return device;
}

std::string pack_rows(const CudaProblem& p, bool text, Stream stream) {
  return by_dtype(p.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const auto* from = static_cast<const Scalar*>(text ? p.text : p.audio);
    auto* to = static_cast<Scalar*>(text ? p.T : p.A);
    return launch("pack_rows", pack_rows_kernel<Scalar>, {blocks_for(p.N, kWarps)}, stream, p, from,
                  text ? p.text_n : p.audio_n, text ? p.text_d : p.audio_d, to);
  });
}

std::string prepare_rows(const CudaProblem& p, Stream stream) {
  return by_dtype(p.dtype, [&](auto scalar) {
    return launch("prepare_rows", prepare_rows_kernel<decltype(scalar)>, {blocks_for(p.N, kWarps)},
                  stream, p);
  });
}

std::string finish_statistics(const CudaProblem& p, Stream stream) {
  return launch("finish_statistics", finish_statistics_kernel, {blocks_for(p.N, kThreads)}, stream,
                p);
}

std::string start_gradients(const CudaProblem& p, Stream stream) {
  const Grid grid{blocks_for(p.N, kThreads), kWarps * sizeof(float)};
  const std::string error = launch("row_weights", row_weights_kernel, grid, stream, p);
  return error.empty() ? launch("row_factors", row_factors_kernel, grid, stream, p) : error;
}

std::string finish_gradients(const CudaProblem& p, Stream stream) {
  // Few rows are done soonest by one block each, many by one warp each.
  const int team = p.N > kWarps * int64_t(multiprocessors()) ? kWarp : kThreads;
  const Grid grid{blocks_for(p.N, kThreads / team), kWarps * sizeof(double)};
  return by_dtype(p.dtype, [&](auto scalar) {
    return launch("finish_gradients", finish_gradients_kernel<decltype(scalar)>, grid, stream, p,
                  team);
  });
}

std::string list_literal(const CudaProblem& p, int* index, int* count, Stream stream) {
  return launch("list_literal", list_literal_kernel, {1, kWarps * sizeof(int)}, stream, p, index,
                count);
}

namespace {
// The host does not know how many rows are literal: two blocks a multiprocessor take turns with
// them.
Grid literal_grid(const CudaProblem& p) {
  const int64_t most = 2 * int64_t(multiprocessors());
  return {unsigned(p.N < most ? p.N : most), literal_scratch(p.width) * sizeof(float)};
}
}  // namespace

std::string literal_statistics(const CudaProblem& p, const int* index, const int* count,
                               Stream stream) {
  return by_dtype(p.dtype, [&](auto scalar) {
    return launch("literal_statistics", literal_statistics_kernel<decltype(scalar)>,
                  literal_grid(p), stream, p, index, count);
  });
}

std::string literal_gradients(const CudaProblem& p, const int* index, const int* count,
                              Stream stream) {
  return by_dtype(p.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    const std::string error = launch("literal_rows", literal_rows_kernel<Scalar>, literal_grid(p),
                                     stream, p, index, count);
    if (!error.empty()) return error;
    return launch("literal_columns", literal_columns_kernel<Scalar>, literal_grid(p), stream, p,
                  index, count);
  });
}

}  // namespace supclap::cuda
