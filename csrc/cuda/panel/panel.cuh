// The panel engine's epilogues: the work between two library products.
//
// A panel holds the inner products of one tile pair, float32, block after block: S, P (off the
// diagonal), Q and K (where the mode has them), padded to whole blocks, so no access needs a mask;
// what the padding holds does not matter, NaN included. Each sweep reads every product once, 16
// bytes at a time; sweep 2 also writes as many weights.
#pragma once

#include "cuda/rows/rows.cuh"
#include "cuda/tile/tile.cuh"

namespace supclap::cuda {

// A block has 32 x 128 of a panel: a warp reads 4 rows of 512 bytes.
using PanelShape = PatchShape<4, 4, kWarp, true>;
constexpr int kPanelScratch = 2 * kDirections * PanelShape::kGroups * PanelShape::kBlockColumns;

__device__ __forceinline__ int slots_i() { return gridDim.y; }
__device__ __forceinline__ int slots_j() { return gridDim.x; }

// This block's corner of the tile pair. Grid: (ni / 32, nj / 128), rounded up.
struct PanelPlace {
  int x, y;  // first row and column
  __device__ PanelPlace()
      : x(blockIdx.x * PanelShape::kBlockRows), y(blockIdx.y * PanelShape::kBlockColumns) {}
};

// A thread's logits of one row.
struct PanelRow {
  Products at[PanelShape::kColumns];
};

// Reads a block's logits, a row at a time.
struct PanelReader {
  const CudaProblem& p;
  const PanelTile& tile;
  const PanelPlace& place;
  const float* panel;
  const Side &I, &J;
  int mode;
  float k2, b;
  bool diagonal;
  Identity other[PanelShape::kColumns];

  __device__ PanelReader(const CudaProblem& p, const PanelTile& tile, const PanelPlace& place,
                         const float* panel, const Side& I, const Side& J, int mode)
      : p(p),
        tile(tile),
        place(place),
        panel(panel),
        I(I),
        J(J),
        mode(mode),
        k2(logit_scale_2(p)),
        b(logit_bias_2(p)),
        diagonal(tile.i0 == tile.j0),
        other{{J, PanelShape::column(0)},
              {J, PanelShape::column(1)},
              {J, PanelShape::column(2)},
              {J, PanelShape::column(3)}} {}

  __device__ __forceinline__ PanelRow operator()(int r) const {
    const int x = PanelShape::row() + r;
    const int64_t row = place.x + x, column = place.y + PanelShape::column(0);
    const float* from = panel + row * tile.ld + column;
    const Vector<float> S = load_vector(from);
    Vector<float> P = S, Q = S, K = S;
    if (!diagonal) P = load_vector(from += tile.size);
    if (mode != kPlain) Q = load_vector(from += tile.size);
    if (mode == kMirror) K = load_vector(from += tile.size);
    const Identity own(I, x);
    PanelRow z;
    SUPCLAP_UNROLL
    for (int c = 0; c < PanelShape::kColumns; ++c) {
      z.at[c] = {S.at[c], P.at[c], Q.at[c], K.at[c]};
      if (diagonal) z.at[c].P = panel[(column + c) * tile.ld + row];
      // The logit of a positive as this product gave it: ranks are compared with it.
      if (p.stats && own.index >= 0 && own.index == other[c].index)
        row_of(p, kPanelPositive, own.index) = k2 * z.at[c].S + b;
      z.at[c] = to_logits(z.at[c], k2, !own.negatives(other[c]), mode);
    }
    return z;
  }
};

// Sweep 1. Leaves partial (m, l) of the negatives of every direction in `slot_i` for rows and, off
// the diagonal, in `slot_j` for columns. Ends in a barrier: `scratch` is free again.
__device__ __forceinline__ void panel_statistics(const CudaProblem& p, const PanelReader& read,
                                                 const Side& I, const Side& J, float b, int mode,
                                                 bool infonce, bool diagonal, Slot slot_i,
                                                 Slot slot_j, float* scratch) {
  using Shape = PanelShape;
  PanelRow z[Shape::kRows];
  SUPCLAP_UNROLL
  for (int r = 0; r < Shape::kRows; ++r) z[r] = read(r);
  Support own[Shape::kRows], other[Shape::kColumns];
  SUPCLAP_UNROLL
  for (int r = 0; r < Shape::kRows; ++r) own[r] = Support(I, Shape::row() + r, mode);
  SUPCLAP_UNROLL
  for (int c = 0; c < Shape::kColumns; ++c) other[c] = Support(J, Shape::column(c), mode);
  const bool writes = threadIdx.x % Shape::kLanes == 0;
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d)) continue;
    SUPCLAP_UNROLL
    for (int r = 0; r < Shape::kRows; ++r) {
      float row[Shape::kColumns];
      SUPCLAP_UNROLL
      for (int c = 0; c < Shape::kColumns; ++c)
        row[c] = direction_logit(d, mode, z[r].at[c], own[r], other[c], b);
      const LogSum sum = row_log_sum<Shape>(row, d, infonce);
      const int x = Shape::row() + r;
      if (writes && x < I.count) slot_i.put(2 * d, x, sum);
    }
    if (diagonal) continue;
    SUPCLAP_UNROLL
    for (int c = 0; c < Shape::kColumns; ++c) {
      float column[Shape::kRows], m = kHidden, l = 0;
      SUPCLAP_UNROLL
      for (int r = 0; r < Shape::kRows; ++r) {
        column[r] = direction_logit(d, mode, exchanged(z[r].at[c]), other[c], own[r], b);
        m = fmaxf(m, column[r]);
      }
      SUPCLAP_UNROLL
      for (int r = 0; r < Shape::kRows; ++r) l += summand(column[r], m, d, infonce);
      float* to = scratch + (2 * d * Shape::kGroups + Shape::group()) * Shape::kBlockColumns;
      to[Shape::column(c)] = m;
      to[Shape::kGroups * Shape::kBlockColumns + Shape::column(c)] = l;
    }
  }
  if (p.stats) {
    SUPCLAP_UNROLL
    for (int r = 0; r < Shape::kRows; ++r) {
      const LogSum sum = row_similarity<Shape>(z[r].at, diagonal);
      const int x = Shape::row() + r;
      if (writes && x < I.count) slot_i.put(2 * kSimilarity, x, sum);
    }
  }
  if (diagonal) return;
  __syncthreads();
  for (int e = threadIdx.x; e < kDirections * Shape::kBlockColumns; e += kThreads) {
    const int d = e / Shape::kBlockColumns, y = e % Shape::kBlockColumns;
    if (!has_direction(mode, d) || y >= J.count) continue;
    const float* from = scratch + 2 * d * Shape::kGroups * Shape::kBlockColumns + y;
    LogSum sum{kHidden, 0};
    for (int g = 0; g < Shape::kGroups; ++g) {
      const float* at = from + g * Shape::kBlockColumns;
      sum = merge(sum, {at[0], at[Shape::kGroups * Shape::kBlockColumns]}, infonce);
    }
    slot_j.put(2 * d, y, sum);
  }
  __syncthreads();
}

// Stores four neighbours, rounded to the embeddings' dtype of kItemsize bytes.
template <int kItemsize>
__device__ __forceinline__ void store_weights(void* weights, int64_t at, const float (&w)[4],
                                              int dtype) {
  if constexpr (kItemsize == 4) {
    store_vector(static_cast<float*>(weights) + at, {w[0], w[1], w[2], w[3]});
  } else {
    struct alignas(8) Four {
      uint16_t bits[4];
    } four;
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n)
      four.bits[n] = dtype == kBfloat16 ? narrow<Bfloat16>(w[n]).bits : narrow<Float16>(w[n]).bits;
    *reinterpret_cast<Four*>(static_cast<uint16_t*>(weights) + at) = four;
  }
}

// One tile pair: sweep 1, sweep 2, or with SigLIP both.
template <int kMode, bool kInfonce, bool kWeights, int kItemsize>
__global__ void __launch_bounds__(kThreads, 1)
    panel_tile_kernel(const __grid_constant__ CudaProblem p, const PanelTile tile,
                      const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto* scratch = reinterpret_cast<float*>(memory);
  const PanelPlace place;
  const Side I = side_of(p, tile.i0, place.x, tile.ni);
  const Side J = side_of(p, tile.j0, place.y, tile.nj);
  const bool diagonal = tile.i0 == tile.j0;
  const float b = logit_bias_2(p);
  const PanelReader read(p, tile, place, to.panel, I, J, kMode);
  const int64_t plane_i = int64_t(slots_i()) * tile.ni, plane_j = int64_t(slots_j()) * tile.nj;
  const int64_t at_i = int64_t(blockIdx.y) * tile.ni + place.x;
  const int64_t at_j = int64_t(blockIdx.x) * tile.nj + place.y;
  if (!kWeights || (!kInfonce && to.part_i))  // without a normaliser one sweep may do both
    panel_statistics(p, read, I, J, b, kMode, kInfonce, diagonal, {to.part_i + at_i, plane_i},
                     {to.part_j + at_j, plane_j}, scratch);
  if (!kWeights) return;
  tile_weights<PanelShape>(
      read, I, J, b, kMode, kInfonce, diagonal, {to.sums_i + at_i, plane_i},
      {to.sums_j + at_j, plane_j}, scratch, [&](int r, float (&w)[4][PanelShape::kColumns]) {
        const int64_t x = place.x + PanelShape::row() + r, y = place.y + PanelShape::column(0);
        int64_t at = x * tile.ld + y;
        const auto put = [&](int n) {
          store_weights<kItemsize>(to.weights, at, w[n], p.dtype);
          at += tile.size;
        };
        put(0);
        if (!diagonal) put(1);
        if (kMode != kPlain) put(2);
        if (kMode == kMirror) put(3);
      });
}

}  // namespace supclap::cuda
