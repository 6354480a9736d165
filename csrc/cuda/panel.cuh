// The panel engine's epilogues: the work between two library products.
//
// A panel holds the inner products of one tile pair, float32, block after block: S, P (off the
// diagonal), Q and K (where the mode has them), padded to whole blocks, so no access needs a mask;
// what the padding holds does not matter, NaN included. Traffic: 4 bytes a position and block read
// once; sweep 2 writes as many weights besides. 16 bytes an access.
#pragma once

#include "cuda/rows.cuh"
#include "cuda/tile.cuh"

namespace supclap::cuda {

// 32 x 128 of a panel to a block: a warp reads 4 rows of 512 bytes.
using PanelShape = PatchShape<4, 4, kWarp, true>;

__device__ __forceinline__ int slots_i() { return gridDim.y; }
__device__ __forceinline__ int slots_j() { return gridDim.x; }

// This block's corner of the tile pair. Grid: (ni / 32, nj / 128), rounded up.
struct PanelPlace {
  int x, y;  // first row and column
  __device__ PanelPlace()
      : x(blockIdx.x * PanelShape::kBlockRows), y(blockIdx.y * PanelShape::kBlockColumns) {}
};

__device__ __forceinline__ Side panel_side(const Problem& p, int64_t first, int at, int n) {
  const int64_t start = first + at;
  return {p.state + kStateRows * p.N + start,
          p.factors + start,
          p.N,
          p.N,
          p.ids ? p.ids + start : nullptr,
          start,
          n - at};
}

__device__ __forceinline__ void load_patch(const PanelTile& tile, const PanelPlace& place,
                                           const float* panel, int mode,
                                           Patch<PanelShape>& z) {
  const bool diagonal = tile.i0 == tile.j0;
  SUPCLAP_UNROLL
  for (int r = 0; r < PanelShape::kRows; ++r) {
    const int64_t x = place.x + PanelShape::row() + r, y = place.y + PanelShape::column(0);
    const float* from = panel + x * tile.ld + y;
    const auto take = [&](float(&to)[PanelShape::kColumns]) {
      const Vector<float> piece = load_vector(from);
      SUPCLAP_UNROLL
      for (int c = 0; c < PanelShape::kColumns; ++c) to[c] = piece.at[c];
    };
    take(z.S[r]);
    if (diagonal) {
      SUPCLAP_UNROLL
      for (int c = 0; c < PanelShape::kColumns; ++c) z.P[r][c] = panel[(y + c) * tile.ld + x];
    } else {
      from += tile.size;
      take(z.P[r]);
    }
    if (mode == kNone) continue;
    from += tile.size;
    take(z.Q[r]);
    if (mode != kMirror) continue;
    from += tile.size;
    take(z.K[r]);
  }
}

// One tile pair: statistics where part_i is given, weights where they are.
template <int kMode, bool kInfonce, bool kStatistics, bool kWeights, class Scalar>
__global__ void __launch_bounds__(kThreads)
    panel_tile_kernel(const __grid_constant__ Problem p, const PanelTile tile, const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const PanelPlace place;
  const Side I = panel_side(p, tile.i0, place.x, tile.ni);
  const Side J = panel_side(p, tile.j0, place.y, tile.nj);
  const bool diagonal = tile.i0 == tile.j0;
  const float b = logit_bias_2(p);
  Patch<PanelShape> z;
  load_patch(tile, place, to.panel, kMode, z);
  // On the diagonal of the pair this block may lie beside it: equal indices tell.
  z.finish(I, J, logit_scale_2(p), b, kMode, p.stats ? p.state + (kStateRows + kPanelPositive) * p.N : nullptr);
  const int64_t plane_i = int64_t(slots_i()) * tile.ni, plane_j = int64_t(slots_j()) * tile.nj;
  const int64_t at_i = int64_t(blockIdx.y) * tile.ni + place.x;
  const int64_t at_j = int64_t(blockIdx.x) * tile.nj + place.y;
  if (kStatistics)
    tile_statistics(p, z, I, J, b, kMode, kInfonce, diagonal, {to.part_i + at_i, plane_i},
                    {to.part_j + at_j, plane_j}, scratch);
  if (!kWeights) return;
  auto* weights = static_cast<Scalar*>(to.weights);
  tile_weights(z, I, J, b, kMode, kInfonce, diagonal, {to.sums_i + at_i, plane_i},
               {to.sums_j + at_j, plane_j}, scratch,
               [&](int r, float (&w)[4][PanelShape::kColumns]) {
                 const int64_t x = place.x + PanelShape::row() + r;
                 Scalar* out = weights + x * tile.ld + place.y + PanelShape::column(0);
                 const auto put = [&](int block) {
                   struct alignas(4 * sizeof(Scalar)) {
                     Scalar at[4];
                   } piece;
                   SUPCLAP_UNROLL
                   for (int c = 0; c < 4; ++c) piece.at[c] = narrow<Scalar>(w[block][c]);
                   *reinterpret_cast<decltype(piece)*>(out) = piece;
                   out += tile.size;
                 };
                 put(0);
                 if (!diagonal) put(1);
                 if (kMode != kNone) put(2);
                 if (kMode == kMirror) put(3);
               });
}

// Adds one tile pair's partial statistics to `running`, slot after slot. Grid: (n / kThreads, 5).
static __global__ void merge_statistics_kernel(const __grid_constant__ Problem p, const float* part,
                                        int slots, int n, int64_t first, int used) {
  const int direction = blockIdx.y, x = blockIdx.x * kThreads + threadIdx.x;
  if (x >= n || !(used >> direction & 1)) return;
  const int64_t plane = int64_t(slots) * n;
  float* at = p.running + 2 * direction * p.N + first + x;
  LogSum sum{at[0], at[p.N]};
  const float* from = part + 2 * direction * plane + x;
  for (int slot = 0; slot < slots; ++slot, from += n) {
    if (direction == kDirections)
      sum.m += from[0], sum.l += from[plane];
    else
      sum = merge(sum, {from[0], from[plane]}, p.infonce);
  }
  at[0] = sum.m, at[p.N] = sum.l;
}

// Adds one tile pair's partial sums, slot after slot. Grid: (n / kThreads, kTileSums).
static __global__ void merge_sums_kernel(const __grid_constant__ Problem p, const float* part, int slots,
                                  int n, int64_t first, int used) {
  const int sum = blockIdx.y, x = blockIdx.x * kThreads + threadIdx.x;
  if (x >= n || !(used >> sum & 1)) return;
  float total = p.sums[sum * p.N + first + x];
  const float* from = part + int64_t(sum) * slots * n + x;
  for (int slot = 0; slot < slots; ++slot, from += n) total += *from;
  p.sums[sum * p.N + first + x] = total;
}

}  // namespace supclap::cuda
