// What a warpgroup makes of the products of one tile (gram.cuh), on registers: statistics or
// weights.
//
// A thread has one row and 32 columns, four lanes a row, and all four products of each pair.
// Columns are reduced in chunks by exchanges between the eight lanes that share them, then over the
// four warps through shared memory.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/rows.cuh"
#include "cuda/tile.cuh"

namespace supclap::cuda {

constexpr int kGramRows = kPanelRows, kGramColumns = kPanelColumns;  // of a tile
constexpr int kTeamWarps = kWarpgroup / kWarp;

// What the formulas need of a tile's columns.
struct GramColumns {
  float c[kGramColumns], text[kGramColumns], audio[kGramColumns], offset[kGramColumns];
  float m[kDirections][kGramColumns], f[kDirections][kGramColumns];

  // The whole warpgroup, a thread for each column.
  __device__ void load(const Side& J, int mode, bool infonce, bool weights) {
    const int y = threadIdx.x % kWarpgroup;
    const Support of(J, y, mode);
    c[y] = of.c, text[y] = of.text, audio[y] = of.audio, offset[y] = of.offset;
    if (!weights) return;
    const Factors factors(J, y, mode, infonce);
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) m[d][y] = factors.m[d], f[d][y] = factors.f[d];
  }
  __device__ Support support(int y) const {
    Support of;
    of.c = c[y], of.text = text[y], of.audio = audio[y], of.offset = offset[y];
    return of;
  }
  __device__ Factors factors(int y) const {
    Factors of;
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) of.m[d] = m[d][y], of.f[d] = f[d][y];
    return of;
  }
};

// What a thread has of a tile: one row, pairs of neighbours in its columns.
struct GramShape {
  static constexpr int kColumns = 32, kLanes = 4;
  __device__ static int row() { return threadIdx.x % kWarpgroup / kLanes; }
  __device__ static int column(int c) { return c / 2 * 8 + threadIdx.x % kLanes * 2 + c % 2; }
};
constexpr int kChunk = 8;  // columns that are reduced together: one for each lane that shares them

// One thread's products with what it knows of its row.
struct GramTile {
  const Side &I, &J;
  const GramColumns& columns;
  int mode;
  float k2, b;
  bool diagonal;
  Support own;
  uint32_t hidden;  // bit c: no pair of negatives

  __device__ GramTile(const Problem& p, const float (&c)[kAccumulators], const Side& I,
                      const Side& J, const GramColumns& columns, int mode, bool diagonal)
      : I(I),
        J(J),
        columns(columns),
        mode(mode),
        k2(logit_scale_2(p)),
        b(logit_bias_2(p)),
        diagonal(diagonal),
        own(I, GramShape::row(), mode),
        hidden(0) {
    const Identity row(I, GramShape::row());
    SUPCLAP_UNROLL
    for (int n = 0; n < GramShape::kColumns; ++n) {
      const Identity other(J, GramShape::column(n));
      if (!row.negatives(other)) hidden |= 1u << n;
      // The logit of a positive as this product gave it: ranks are compared with it.
      if (p.stats && row.index >= 0 && row.index == other.index)
        row_of(p, kPanelPositive, row.index) = k2 * products(c, n).S + b;
    }
  }

  // hopper.cuh's places: texts in rows 0-7 of a warp's 16, audios in 8-15; columns likewise.
  __device__ static Products products(const float (&c)[kAccumulators], int n) {
    const int at = n / 2 * 4 + n % 2, texts = kAccumulators / 2;
    return {c[at], c[texts + at + 2], c[at + 2], c[texts + at]};
  }
  __device__ Products logits(const float (&c)[kAccumulators], int n) const {
    return to_logits(products(c, n), k2, hidden >> n & 1, mode);
  }
};

// Two columns over two lanes that are `apart`: the lower lane gets the join of one, the upper that
// of the other.
template <class Value, class Join>
__device__ __forceinline__ Value join_two(Value lower, Value upper, int apart, const Join& join) {
  const bool up = threadIdx.x & apart;
  return join(up ? upper : lower, shuffle_xor(up ? lower : upper, apart));
}
// Columns of a chunk over the 8 lanes that share them: lane 4 g + t gets column g. The first
// steps, over kChunk / kCount columns, are done already.
template <int kCount, class Value, class Join>
__device__ __forceinline__ Value join_columns(Value (&column)[kCount], const Join& join) {
  SUPCLAP_UNROLL
  for (int step = 1; step < kCount; step *= 2) {
    SUPCLAP_UNROLL
    for (int n = 0; n < kCount; n += 2 * step)
      column[n] =
          join_two(column[n], column[n + step], GramShape::kLanes * step * kChunk / kCount, join);
  }
  return column[0];
}

// Where a warp leaves what it knows of a column.
struct ColumnScratch {
  float* at;
  __device__ float& operator()(int plane, int warp, int y) const {
    return at[(plane * kTeamWarps + warp) * kGramColumns + y];
  }
  // Of column g of a chunk, by the lanes that join_columns gave it to.
  __device__ float& chunk(int plane, int h) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kWarpgroup / kWarp;
    return (*this)(plane, warp, GramShape::column(h * kChunk + lane / GramShape::kLanes));
  }
};

// Sweep 1, as panel_statistics; `scratch` is free again behind a barrier of the warpgroup.
__device__ __forceinline__ void gram_statistics(const Problem& p, GramTile& tile,
                                                const float (&c)[kAccumulators], bool infonce,
                                                Slot slot_i, Slot slot_j, ColumnScratch scratch) {
  using Shape = GramShape;
  const int x = Shape::row(), mode = tile.mode;
  const auto join = [&](LogSum a, LogSum b) { return merge(a, b, infonce); };
  const bool writes = threadIdx.x % Shape::kLanes == 0 && x < tile.I.count;
  if (p.stats) {
    float sum = 0, pairs = 0;
    SUPCLAP_UNROLL
    for (int n = 0; n < Shape::kColumns; ++n)
      add_similarity(tile.logits(c, n), tile.diagonal, sum, pairs);
    sum = warp_sum<Shape::kLanes>(sum), pairs = warp_sum<Shape::kLanes>(pairs);
    if (writes) slot_i.put(kSimilarity, x, {sum, pairs});
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
      scratch.chunk(2 * d, h) = all.m, scratch.chunk(2 * d + 1, h) = all.l;
    }
  }
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d)) continue;
    const LogSum sum = reduce_lanes<Shape::kLanes>(row[d], join);
    if (writes) slot_i.put(2 * d, x, sum);
  }
  if (tile.diagonal) return;
  warpgroup_barrier();
  const int y = threadIdx.x % kWarpgroup;  // as many columns as threads
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d) || y >= tile.J.count) continue;
    LogSum sum{kHidden, 0};
    for (int warp = 0; warp < kTeamWarps; ++warp)
      sum = join(sum, {scratch(2 * d, warp, y), scratch(2 * d + 1, warp, y)});
    slot_j.put(2 * d, y, sum);
  }
}

// Whether the mode adds to a sum that columns have: only a mirror has support vectors of audio.
__device__ __forceinline__ bool has_sum(int mode, int sum) {
  return mode == kMirror || sum == kRhoText || sum == kSupportText;
}

// Sweep 2, as tile_weights; store(y, w): the weights of columns y and y + 1.
template <class Store>
__device__ __forceinline__ void gram_weights(const GramTile& tile, const float (&c)[kAccumulators],
                                             bool infonce, Slot slot_i, Slot slot_j,
                                             ColumnScratch scratch, const Store& store) {
  using Shape = GramShape;
  const int x = Shape::row(), mode = tile.mode;
  const Factors own_f(tile.I, x, mode, infonce);
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
        w[0][side] = one.W, w[1][side] = two.W;
        w[2][side] = one.V_A + two.V_A, w[3][side] = one.V_T + two.V_T;
      }
      store(Shape::column(h * kChunk + e), w);
      SUPCLAP_UNROLL
      for (int sum = 0; sum < kColumnSums; ++sum) {
        if (tile.diagonal || !has_sum(mode, kRhoText + sum)) continue;
        column[sum][e / 2] =
            join_two(of_column[0][sum], of_column[1][sum], GramShape::kLanes, Add{});
      }
    }
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kColumnSums; ++sum) {
      if (tile.diagonal || !has_sum(mode, kRhoText + sum)) continue;
      scratch.chunk(sum, h) = join_columns(column[sum], Add{});
    }
  }
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kTileSums; ++sum) {
    const float total = warp_sum<Shape::kLanes>(row[sum]);
    if (threadIdx.x % Shape::kLanes == 0 && x < tile.I.count)
      slot_i.at[sum * slot_i.plane + x] = total;
  }
  if (tile.diagonal) return;
  warpgroup_barrier();
  const int y = threadIdx.x % kWarpgroup;
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
