// Adds the partial results of one tile pair to the running ones, whichever kernel wrote them.
#pragma once

#include "cuda/tile/logits.cuh"

namespace supclap::cuda {

// How a block shares the slots of partial results: a lane has a row, and the warps take turns with
// its slots.
struct MergeShape {
  int x, first;  // the row, and this thread's first slot; its next ones are kWarps apart
  __device__ MergeShape()
      : x(blockIdx.x * kWarp + threadIdx.x % kWarp), first(threadIdx.x / kWarp) {}
};
constexpr int kMergeScratch = kThreads * int(sizeof(LogSum));

// Adds one tile pair's partial statistics to `running`. Grid: (n / kWarp, 5).
static __global__ void merge_statistics_kernel(const __grid_constant__ CudaProblem p,
                                               const float* part, int slots, int n, int64_t first,
                                               int used) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<LogSum*>(memory);
  const int direction = blockIdx.y;
  if (!(used >> direction & 1)) return;
  const MergeShape own;
  const int64_t plane = int64_t(slots) * n;
  const auto join = [&](LogSum a, LogSum b) {
    return direction == kDirections ? LogSum{a.m + b.m, a.l + b.l} : merge(a, b, p.infonce);
  };
  LogSum sum{direction == kDirections ? 0 : kHidden, 0};
  if (own.x < n) {
    const float* from = part + 2 * direction * plane + own.x;
    SUPCLAP_UNROLL_BY(4)
    for (int64_t slot = own.first; slot < slots; slot += kWarps)
      sum = join(sum, {from[slot * n], from[plane + slot * n]});
  }
  scratch[threadIdx.x] = sum;
  __syncthreads();
  if (own.first != 0 || own.x >= n) return;
  float* at = p.running + 2 * direction * p.N + first + own.x;
  sum = {at[0], at[p.N]};
  for (int warp = 0; warp < kWarps; ++warp) sum = join(sum, scratch[warp * kWarp + threadIdx.x]);
  at[0] = sum.m;
  at[p.N] = sum.l;
}

// Adds one tile pair's partial sums. Grid: (n / kWarp, kTileSums).
static __global__ void merge_sums_kernel(const __grid_constant__ CudaProblem p, const float* part,
                                         int slots, int n, int64_t first, int used) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const int sum = blockIdx.y;
  if (!(used >> sum & 1)) return;
  const MergeShape own;
  float total = 0;
  if (own.x < n) {
    const float* from = part + int64_t(sum) * slots * n + own.x;
    SUPCLAP_UNROLL_BY(4)
    for (int64_t slot = own.first; slot < slots; slot += kWarps) total += from[slot * n];
  }
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (own.first != 0 || own.x >= n) return;
  total = p.sums[sum * p.N + first + own.x];
  for (int warp = 0; warp < kWarps; ++warp) total += scratch[warp * kWarp + threadIdx.x];
  p.sums[sum * p.N + first + own.x] = total;
}

}  // namespace supclap::cuda
