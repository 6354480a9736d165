// Row gaps: the distance between the two embeddings of each pair.
//
//     r_i = sqrt(|a_i - t_i|^2 + eps^2)
//
// Device code only: the launcher is in row_gap.cu, and a host that stands in for the CUDA run time
// can run this file as it is.
//
// Traffic: 2 N D floats read once, N floats written. Cost: 3 N D operations.
#pragma once

#include <cstdint>

namespace supclap {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;  // one warp each

// Sum over the lanes of a warp; every lane gets it.
__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

__device__ inline float squared_difference(float a, float t) {
  const float d = a - t;
  return d * d;
}

// One warp per row, kRowsPerBlock rows per block of kWarp * kRowsPerBlock threads.
//
// kVector: both matrices start on a multiple of 16 bytes and D is a multiple of 4, so that every
// row is read 16 bytes at a time.
template <bool kVector>
__global__ void row_gap(const float* __restrict__ A,  // [N, D] audio embeddings, row-major
                        const float* __restrict__ T,  // [N, D] text embeddings, row-major
                        float* __restrict__ r,        // [N] gaps
                        int64_t N, int64_t D,
                        float eps)  // keeps r and its gradient finite where a_i = t_i
{
  const int lane = threadIdx.x % kWarp;
  const int64_t i = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (i >= N) return;  // the same for all lanes of the warp
  float sum = 0.0f;    // of this lane's elements of |a_i - t_i|^2
  if constexpr (kVector) {
    const auto* a = reinterpret_cast<const float4*>(A + i * D);
    const auto* t = reinterpret_cast<const float4*>(T + i * D);
    for (int64_t d = lane; d < D / 4; d += kWarp) {
      const float4 x = a[d], y = t[d];
      sum += (squared_difference(x.x, y.x) + squared_difference(x.y, y.y)) +
             (squared_difference(x.z, y.z) + squared_difference(x.w, y.w));
    }
  } else {
    for (int64_t d = lane; d < D; d += kWarp) {
      sum += squared_difference(A[i * D + d], T[i * D + d]);
    }
  }
  sum = warp_sum(sum);
  if (lane == 0) r[i] = sqrtf(sum + eps * eps);
}

}  // namespace supclap
