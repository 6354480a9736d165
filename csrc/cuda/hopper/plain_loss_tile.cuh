// What a warpgroup makes of the products of one place of cross.cuh, on registers: statistics or
// weights. A thread has two rows and 64 columns; columns are reduced as in gram_tile.cuh.
#pragma once

#include "cuda/hopper/siglip.cuh"

namespace supclap::cuda {

constexpr int kCrossRows = 2 * kGramRows, kCrossColumns = 2 * kGramColumns;

struct CrossShape {
  static constexpr int kRows = 2, kColumns = 64, kLanes = GramShape::kLanes;
  __device__ static int row(int u) {
    return threadIdx.x % kWarpgroup / kWarp * 16 + 8 * u + threadIdx.x % kWarp / kLanes;
  }
  __device__ static int column(int n) { return GramShape::column(n); }
  // hopper.cuh's place of it.
  __device__ static constexpr int at(int u, int n) { return n / 2 * 4 + 2 * u + n % 2; }
};

// What the formulas need of a row, or of a column: of the direction whose rows it is one of.
struct alignas(8) CrossNumbers {
  float m, f;
  __device__ CrossNumbers() {}
  __device__ CrossNumbers(const Side& side, int x, int d, bool infonce, bool weights)
      : m(weights && infonce ? side.factor(d, x) : 0),
        f(weights ? side.factor(kDirections + d, x) : 0) {}
};
struct CrossColumns {
  CrossNumbers at[kCrossColumns];
};

// S or P of a tile pair: which directions its rows and its columns are of.
struct CrossProduct {
  bool swapped;  // P
  __device__ int rows() const { return swapped ? kAudioRows : kTextRows; }
  __device__ int columns() const { return swapped ? kTextRows : kAudioRows; }
};

// One thread's products with what it knows of its rows.
struct CrossTile {
  const Side &I, &J;
  const CrossColumns& columns;
  CrossProduct product;
  float k2, b;
  bool diagonal;
  CrossNumbers own[CrossShape::kRows];
  uint32_t hidden[CrossShape::kRows][2];  // bit n % 32 of n / 32: no pair of negatives
  bool plain;                             // for no thread of the warp is one hidden

  __device__ bool is_hidden(int u, int n) const { return hidden[u][n / 32] >> n % 32 & 1; }
  __device__ float logit(const float (&c)[kAccumulators], int u, int n) const {
    return is_hidden(u, n) ? kHidden : k2 * c[CrossShape::at(u, n)] + b;
  }
  __device__ bool is_row(int u) const {
    return threadIdx.x % CrossShape::kLanes == 0 && CrossShape::row(u) < I.count;
  }

  // Finds `hidden` and `plain`; with SVRStats notes the positives' logits. (Done by a constructor,
  // the compiler spills a hundred registers.)
  __device__ void hide(const Problem& p, const float (&c)[kAccumulators]) {
    SUPCLAP_UNROLL
    for (int u = 0; u < CrossShape::kRows; ++u) hidden[u][0] = hidden[u][1] = 0;
    if (p.ids || !apart(I, J, kCrossRows, kCrossColumns)) {
      const Identity own_id[] = {{I, CrossShape::row(0)}, {I, CrossShape::row(1)}};
      SUPCLAP_UNROLL
      for (int n = 0; n < CrossShape::kColumns; ++n) {
        const Identity other(J, CrossShape::column(n));
        SUPCLAP_UNROLL
        for (int u = 0; u < CrossShape::kRows; ++u) {
          if (!own_id[u].negatives(other)) hidden[u][n / 32] |= 1u << n % 32;
          // The logit of a positive as this product gave it: ranks are compared with it.
          if (p.stats && own_id[u].index >= 0 && own_id[u].index == other.index)
            row_of(p, kPanelPositive, other.index) = k2 * c[CrossShape::at(u, n)] + b;
        }
      }
    }
    const bool any = hidden[0][0] | hidden[0][1] | hidden[1][0] | hidden[1][1];
    plain = uniform(warp_max(any ? 1.0f : 0.0f) == 0);
  }
};

// What S and P add to a row's sums together.
struct CrossSums {
  float base[CrossShape::kRows], bias[CrossShape::kRows];
  float similarity[CrossShape::kRows], pairs[CrossShape::kRows];
};

using CrossScratch = ColumnsOf<kCrossColumns>;

// Where a place leaves (m, l) of a row or of a column: in the first of its slots.
struct CrossSlot {
  Slot slot;
  int64_t next;  // to the second one, or 0
  __device__ void put(int first, int x, LogSum value, LogSum nothing = {kHidden, 0}) const {
    slot.put(first, x, value);
    if (next) slot.put(first, int(x + next), nothing);
  }
  __device__ void put_one(int plane, int x, float value) const {
    slot.at[plane * slot.plane + x] = value;
    if (next) slot.at[plane * slot.plane + x + next] = 0;
  }
};

// Sweep 1, up to what the warps of a team leave of their columns in `scratch`.
__device__ __forceinline__ void cross_statistics(const CrossTile& tile,
                                                 const float (&c)[kAccumulators], CrossSlot to,
                                                 CrossScratch scratch) {
  using Shape = CrossShape;
  const int rows = tile.product.rows();
  const auto join = [&](LogSum a, LogSum b) { return merge(a, b, true); };
  LogSum row[Shape::kRows] = {{kHidden, 0}, {kHidden, 0}};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    LogSum column[kChunk];
    float z[Shape::kRows][kChunk];
    SUPCLAP_UNROLL
    for (int n = 0; n < kChunk; ++n) {
      LogSum one[Shape::kRows];
      SUPCLAP_UNROLL
      for (int u = 0; u < Shape::kRows; ++u) {
        z[u][n] = tile.logit(c, u, h * kChunk + n);
        one[u] = {z[u][n], 1};
      }
      column[n] = join(one[0], one[1]);
    }
    SUPCLAP_UNROLL
    for (int u = 0; u < Shape::kRows; ++u) row[u] = join(row[u], log_sum(z[u], rows, true));
    if (tile.diagonal) continue;
    const LogSum all = join_columns(column, join);
    scratch.chunk(0, h) = all.m, scratch.chunk(1, h) = all.l;
  }
  SUPCLAP_UNROLL
  for (int u = 0; u < Shape::kRows; ++u) {
    const LogSum sum = reduce_lanes<Shape::kLanes>(row[u], join);
    if (tile.is_row(u)) to.put(2 * rows, Shape::row(u), sum);
  }
}

// ... InfoNCE where every pair counts, with one exponential for a row and its column. False: not
// done, since a sum could have lost digits to the reference.
__device__ __forceinline__ bool cross_plain(const CrossTile& tile, const float (&c)[kAccumulators],
                                            CrossSlot to, CrossScratch scratch) {
  using Shape = CrossShape;
  const float m = warp_max(tile.k2 * c[0]);
  float row[Shape::kRows] = {};
  Range range;
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    float column[kChunk];
    SUPCLAP_UNROLL
    for (int n = 0; n < kChunk; ++n) {
      column[n] = 0;
      SUPCLAP_UNROLL
      for (int u = 0; u < Shape::kRows; ++u) {
        const float e = exp_2(tile.k2 * c[Shape::at(u, h * kChunk + n)] - m);
        row[u] += e, column[n] += e;
      }
    }
    if (tile.diagonal) continue;
    const float l = join_columns(column, Add{});
    range.take(l);
    scratch.chunk(0, h) = m, scratch.chunk(1, h) = l;
  }
  SUPCLAP_UNROLL
  for (int u = 0; u < Shape::kRows; ++u) {
    row[u] = warp_sum<Shape::kLanes>(row[u]);
    range.take(row[u]);
  }
  if (!range.good()) return false;
  SUPCLAP_UNROLL
  for (int u = 0; u < Shape::kRows; ++u)
    if (tile.is_row(u)) to.put(2 * tile.product.rows(), Shape::row(u), {m, row[u]});
  return true;
}

// ... and what the team makes of it, a thread for two columns: behind a barrier of the warpgroup.
__device__ __forceinline__ void cross_columns(const CrossTile& tile, bool infonce, CrossSlot to,
                                              CrossScratch scratch) {
  for (int y = threadIdx.x % kWarpgroup; y < kCrossColumns; y += kWarpgroup) {
    if (y >= tile.J.count) continue;
    LogSum sum{kHidden, 0};
    for (int warp = 0; warp < kTeamWarps; ++warp)
      sum = merge(sum, {scratch(0, warp, y), scratch(1, warp, y)}, infonce);
    to.put(2 * tile.product.columns(), y, sum);
  }
}

// For SVRStats: the negatives' logits.
__device__ __forceinline__ void cross_similarity(const CrossTile& tile,
                                                 const float (&c)[kAccumulators], CrossSums& sums) {
  SUPCLAP_UNROLL
  for (int u = 0; u < CrossShape::kRows; ++u) {
    SUPCLAP_UNROLL
    for (int n = 0; n < CrossShape::kColumns; ++n)
      if (!tile.is_hidden(u, n))
        sums.similarity[u] += tile.k2 * c[CrossShape::at(u, n)], sums.pairs[u] += 1;
  }
}

// Sweep 2; store(u, n, w): the weights of row u and columns n and n + 1.
template <class Store>
__device__ __forceinline__ void cross_weights(const CrossTile& tile,
                                              const float (&c)[kAccumulators], CrossSums& sums,
                                              const Store& store) {
  using Shape = CrossShape;
  SUPCLAP_UNROLL
  for (int n = 0; n < Shape::kColumns; n += 2) {
    float w[Shape::kRows][2];
    SUPCLAP_UNROLL
    for (int side = 0; side < 2; ++side) {
      const CrossNumbers other = tile.columns.at[Shape::column(n + side)];
      SUPCLAP_UNROLL
      for (int u = 0; u < Shape::kRows; ++u) {
        const float z = tile.logit(c, u, n + side);
        const CrossNumbers own = tile.own[u];
        w[u][side] = exp_2(z - own.m) * own.f + exp_2(z - other.m) * other.f;
        sums.base[u] += w[u][side] * z;
      }
    }
    SUPCLAP_UNROLL
    for (int u = 0; u < Shape::kRows; ++u) store(u, n, w[u]);
  }
}

// SigLIP: losses where `to` has room for them, and with `weights` these; store as in cross_weights.
// A pair counts for its text: a row of S, a column of P. `ranks`: the largest logits, for SVRStats.
template <class Store>
__device__ __forceinline__ void cross_siglip(const CrossTile& tile, const float (&c)[kAccumulators],
                                             CrossSlot to, CrossScratch scratch, bool ranks,
                                             bool weights, CrossSums& sums, const Store& store) {
  using Shape = CrossShape;
  const bool statistics = to.slot.at;
  const AddSoftplus add;
  const bool swapped = tile.product.swapped;
  SoftplusSum row[Shape::kRows] = {};
  float top[Shape::kRows] = {kHidden, kHidden};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    SoftplusSum column[kChunk];
    float column_top[kChunk];
    SUPCLAP_UNROLL
    for (int e = 0; e < kChunk; e += 2) {
      float w[Shape::kRows][2];
      SUPCLAP_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int n = h * kChunk + e + side;
        const float f = swapped ? tile.columns.at[Shape::column(n)].f : 0;
        SoftplusSum loss[Shape::kRows];
        float z[Shape::kRows];
        SUPCLAP_UNROLL
        for (int u = 0; u < Shape::kRows; ++u) {
          z[u] = tile.logit(c, u, n);
          const Logistic one(z[u]);
          loss[u] = one.loss, row[u] = add(row[u], one.loss);
          top[u] = fmaxf(top[u], z[u]);
          w[u][side] = weights ? one.slope * (swapped ? f : tile.own[u].f) : 0;
          sums.base[u] += w[u][side] * (z[u] - tile.b), sums.bias[u] += w[u][side];
        }
        column[e + side] = add(loss[0], loss[1]);
        column_top[e + side] = fmaxf(z[0], z[1]);
      }
      SUPCLAP_UNROLL
      for (int u = 0; u < Shape::kRows; ++u)
        if (weights) store(u, h * kChunk + e, w[u]);
    }
    if (!statistics || tile.diagonal) continue;
    scratch.chunk(0, h) = ranks ? join_columns(column_top, Max{}) : kHidden;
    scratch.chunk(1, h) = swapped ? join_columns(column, add).value() : 0;
  }
  if (!statistics) return;
  SUPCLAP_UNROLL
  for (int u = 0; u < Shape::kRows; ++u) {
    const LogSum sum{warp_max<Shape::kLanes>(top[u]), warp_sum<Shape::kLanes>(row[u].value())};
    if (tile.is_row(u))
      to.put(2 * tile.product.rows(), Shape::row(u), {sum.m, swapped ? 0 : sum.l});
  }
}

}  // namespace supclap::cuda
