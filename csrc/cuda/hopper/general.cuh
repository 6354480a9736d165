// What a team makes of the products of any tile, full or not: statistics or weights.
#pragma once

#include "cuda/hopper/team.cuh"

namespace supclap::cuda {

// Sweep 1, as panel_statistics, up to what the warps of a team leave of their columns in `scratch`.
__device__ __forceinline__ void general_statistics(const CudaProblem& p, HopperTile& tile,
                                                   const float (&c)[kAccumulators], bool infonce,
                                                   Slot slot_i, ColumnScratch scratch) {
  using Shape = HopperShape;
  const int x = Shape::row(), mode = tile.mode;
  const auto join = [&](LogSum a, LogSum b) { return merge(a, b, infonce); };
  const bool writes = threadIdx.x % Shape::kLanes == 0 && x < tile.I.count;
  if (p.stats) {
    float sum = 0, pairs = 0;
    SUPCLAP_UNROLL
    for (int n = 0; n < Shape::kColumns; ++n)
      add_similarity(tile.logits(c, n), tile.diagonal, sum, pairs);
    sum = warp_sum<Shape::kLanes>(sum);
    pairs = warp_sum<Shape::kLanes>(pairs);
    if (writes) slot_i.put(2 * kSimilarity, x, {sum, pairs});
    tile.hidden = again(tile.hidden);
  }
  LogSum row[kDirections];
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) row[d] = {kHidden, 0};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      if (!has_direction(mode, d)) continue;
      LogSum column[kChunk];
      float z[kChunk];
      SUPCLAP_UNROLL
      for (int n = 0; n < kChunk; ++n) {
        const Support other = tile.columns.support(Shape::column(h * kChunk + n));
        const Products at = tile.logits(c, h * kChunk + n);
        z[n] = direction_logit(d, mode, at, tile.own, other, tile.b);
        const float logit = direction_logit(d, mode, exchanged(at), other, tile.own, tile.b);
        column[n] = {logit, infonce ? 1 : summand(logit, logit, d, false)};
      }
      row[d] = join(row[d], log_sum(z, d, infonce));
      if (tile.diagonal) continue;
      const LogSum all = join_columns(column, join);
      if (!scratch.once) scratch.chunk(2 * d, h) = all.m;
      scratch.chunk(scratch.l(d), h) = all.l;
    }
  }
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d)) continue;
    const LogSum sum = reduce_lanes<Shape::kLanes>(row[d], join);
    if (writes) slot_i.put(2 * d, x, sum);
  }
}

// The rest of sweep 1: the team joins what its warps left of their columns, a thread for each
// column. Needs a barrier of the warpgroup before it.
__device__ __forceinline__ void column_statistics(const HopperTile& tile, bool infonce, Slot slot_j,
                                                  ColumnScratch scratch) {
  const int y = threadIdx.x % kWarpgroup, mode = tile.mode;
  const auto join = [&](LogSum a, LogSum b) { return merge(a, b, infonce); };
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d) || y >= tile.J.count) continue;
    LogSum sum{kHidden, 0};
    for (int warp = 0; warp < kTeamWarps; ++warp)
      sum = join(sum, {scratch(2 * d, warp, y), scratch(2 * d + 1, warp, y)});
    slot_j.put(2 * d, y, sum);
  }
}

// Sweep 2, as tile_weights, up to what the warps of a team leave of their columns in `scratch`.
// Calls store(n, w) with the weights of columns n and n + 1.
template <class Store>
__device__ __forceinline__ void general_weights(const HopperTile& tile,
                                                const float (&c)[kAccumulators], bool infonce,
                                                Slot slot_i, ColumnScratch scratch,
                                                const Store& store) {
  using Shape = HopperShape;
  const int x = Shape::row(), mode = tile.mode;
  const Factors& own_f = tile.own_f;
  float row[kTileSums] = {};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    float column[kColumnSums][kChunk / 2];
    SUPCLAP_UNROLL
    for (int e = 0; e < kChunk; e += 2) {
      float of_column[2][kColumnSums] = {}, w[4][2];
      SUPCLAP_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int n = h * kChunk + e + side, y = Shape::column(n);
        const Support other = tile.columns.support(y);
        const Factors other_f = tile.columns.factors(y);
        const Products z = tile.logits(c, n);
        const Half one(z.S, z.Q, z.K, tile.own, other, own_f, other_f, tile.b, mode, infonce);
        const Half two(z.P, z.Q, z.K, other, tile.own, other_f, own_f, tile.b, mode, infonce);
        add_sums(one, two, tile.diagonal, row, of_column[side]);
        w[0][side] = one.W;
        w[1][side] = two.W;
        w[2][side] = one.V_A + two.V_A;
        w[3][side] = one.V_T + two.V_T;
      }
      store(h * kChunk + e, w);
      SUPCLAP_UNROLL
      for (int sum = 0; sum < kColumnSums; ++sum) {
        if (tile.diagonal || !has_sum(mode, kRhoText + sum)) continue;
        column[sum][e / 2] =
            join_two(of_column[0][sum], of_column[1][sum], HopperShape::kLanes, Add{});
      }
    }
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kColumnSums; ++sum) {
      if (tile.diagonal || !has_sum(mode, kRhoText + sum)) continue;
      scratch.chunk(scratch.sum(sum), h) = join_columns(column[sum], Add{});
    }
  }
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kTileSums; ++sum) {
    const float total = warp_sum<Shape::kLanes>(row[sum]);
    if (threadIdx.x % Shape::kLanes == 0 && x < tile.I.count)
      slot_i.at[sum * slot_i.plane + x] = total;
  }
}

// The rest of sweep 2: the team adds up what its warps left of their columns, a thread for each
// column. Needs a barrier of the warpgroup before it.
__device__ __forceinline__ void column_sums(const HopperTile& tile, Slot slot_j,
                                            ColumnScratch scratch) {
  const int y = threadIdx.x % kWarpgroup, mode = tile.mode;
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kColumnSums; ++sum) {
    if (y >= tile.J.count) continue;
    float total = 0;
    if (has_sum(mode, kRhoText + sum))
      for (int warp = 0; warp < kTeamWarps; ++warp) total += scratch(sum, warp, y);
    slot_j.at[(kRhoText + sum) * slot_j.plane + y] = total;
  }
}

}  // namespace supclap::cuda
