// The kernels that work on rows, not tiles: each row has a warp, a thread or a block.
#pragma once

#include "cuda/rows/literal.cuh"

namespace supclap::cuda {

// Writes an operand, where it is not the rows as given. A warp has one row.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    pack_rows_kernel(const __grid_constant__ CudaProblem p, const Scalar* X, int64_t stride_n,
                     int64_t stride_d, Scalar* out) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < p.N) pack_row(p, X + i * stride_n, stride_d, out + i * p.width);
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    prepare_rows_kernel(const __grid_constant__ CudaProblem p) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i < p.N) prepare_row<Scalar>(p, i);
}

static __global__ void finish_statistics_kernel(const __grid_constant__ CudaProblem p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.N) return;
  LogSum negatives[kDirections];
  for (int d = 0; d < kDirections; ++d)
    negatives[d] = {p.running[2 * d * p.N + i], p.running[(2 * d + 1) * p.N + i]};
  finish_row_statistics(p, i, negatives);
}

// Writes omega, and for each block what bounds it and the weights.
static __global__ void row_weights_kernel(const __grid_constant__ CudaProblem p) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = i < p.N;
  const float omega = inside ? omega_of(p, i) : 0, gain = inside ? weight_gain(p, i) : 0;
  if (inside) p.omega[i] = omega;
  const float largest[] = {block_max(fmaxf(omega, 0.0f), scratch),
                           block_max(fmaxf(-omega, 0.0f), scratch), block_max(gain, scratch)};
  if (threadIdx.x != 0) return;
  for (int n = 0; n < 3; ++n) p.bounds[n * gridDim.x + blockIdx.x] = largest[n];
}

// Writes m and omega / (l unit) of every direction; the grid is that of row_weights_kernel.
static __global__ void row_factors_kernel(const __grid_constant__ CudaProblem p) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  float largest[3];
  for (int n = 0; n < 3; ++n) {
    largest[n] = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += kThreads)
      largest[n] = fmaxf(largest[n], p.bounds[n * gridDim.x + block]);
    largest[n] = block_max(largest[n], scratch);
  }
  const auto& [up, down, gain] = largest;
  // The unit has the omegas' sign where all have the same: omegas over it are positive.
  const float unit = unit_of(fmaxf(up, down) * gain) * (up == 0 && down > 0 ? -1 : 1);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    p.unit[0] = unit;
    p.unit[1] = (up > 0 && down > 0) || (p.mode != kPlain && p.alpha < 0);
  }
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.N) return;
  for (int d = 0; d < kDirections; ++d) {
    if (!direction_used(p, d)) continue;
    p.factors[d * p.N + i] = p.infonce ? p.state[d * p.N + i] : 0;
    p.factors[(kDirections + d) * p.N + i] =
        factor_of(p, d, p.state[(kStateL + d) * p.N + i], p.omega[i], unit);
  }
}

// A row has `team` threads: a warp or a block. The last block adds up dk, db and dR.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 3)
    finish_gradients_kernel(const __grid_constant__ CudaProblem p, int team) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / team;
  if (i < p.N) finish_row<Scalar>(p, i, team, scratch);
  __syncthreads();
  auto* last = reinterpret_cast<int*>(memory);
  if (threadIdx.x == 0) *last = arrive_last(p.counter, gridDim.x);
  __syncthreads();
  const bool is_last = *last;
  __syncthreads();
  if (is_last) finish_scalars(p, reinterpret_cast<double*>(memory));
}

// ---------------------------------------------------------------- literal rows

static __global__ void list_literal_kernel(const __grid_constant__ CudaProblem p, int* index,
                                           int* count) {
  SUPCLAP_SHARED(memory);
  list_literal(p, index, count, reinterpret_cast<int*>(memory));
}

// The grid may have any size: blocks take turns.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    literal_statistics_kernel(const __grid_constant__ CudaProblem p, const int* index,
                              const int* count) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const int literal = *count;
  for (int n = blockIdx.x; n < literal; n += gridDim.x)
    literal_row_statistics<Scalar>(p, index[n], scratch);
  if (p.mode != kShared || literal == 0) return;
  for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
    literal_column_statistics<Scalar>(p, j, index, literal, scratch);
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    literal_rows_kernel(const __grid_constant__ CudaProblem p, const int* index, const int* count) {
  SUPCLAP_SHARED(memory);
  const int literal = *count;
  for (int n = blockIdx.x; n < literal; n += gridDim.x)
    literal_row_gradient<Scalar>(p, index[n], reinterpret_cast<float*>(memory));
}

template <class Scalar>
__global__ void __launch_bounds__(kThreads, 1)
    literal_columns_kernel(const __grid_constant__ CudaProblem p, const int* index,
                           const int* count) {
  SUPCLAP_SHARED(memory);
  const int literal = *count;
  if (literal == 0) return;
  for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
    literal_column_gradient<Scalar>(p, j, index, literal, reinterpret_cast<float*>(memory));
}

}  // namespace supclap::cuda
