// What a team makes of the products of one place of plain_loss.cuh: statistics or weights. Columns
// are reduced as in team.cuh.
#pragma once

#include "cuda/hopper/formulas.cuh"
#include "cuda/hopper/team.cuh"

namespace supclap::cuda {

constexpr int kPlainRows = 2 * kPanelRows, kPlainColumns = 2 * kPanelColumns;

struct PlainShape {
  static constexpr int kRows = 2, kColumns = 64, kLanes = HopperShape::kLanes;
  __device__ static int row(int u) {
    return threadIdx.x % kWarpgroup / kWarp * 16 + 8 * u + threadIdx.x % kWarp / kLanes;
  }
  __device__ static int column(int n) { return HopperShape::column(n); }
  // The accumulator (device/hopper.cuh) of row u and column n.
  __device__ static constexpr int at(int u, int n) { return n / 2 * 4 + 2 * u + n % 2; }
};

// What the formulas need of a row, or of a column, in the direction whose rows it is one of.
struct alignas(8) PlainNumbers {
  float m, f;
  __device__ PlainNumbers() {}
  __device__ PlainNumbers(const Side& side, int x, int d, bool infonce, bool weights)
      : m(weights && infonce ? side.factor(d, x) : 0),
        f(weights ? side.factor(kDirections + d, x) : 0) {}
};
struct PlainColumns {
  PlainNumbers at[kPlainColumns];
};

// Which product it is, S or P, and the directions that its rows and its columns belong to.
struct PlainProduct {
  bool swapped;  // P
  __device__ int rows() const { return swapped ? kAudioRows : kTextRows; }
  __device__ int columns() const { return swapped ? kTextRows : kAudioRows; }
};

// One thread's products with what it knows of its rows.
struct PlainTile {
  const Side &I, &J;
  const PlainColumns& columns;
  PlainProduct product;
  float k2, b;
  bool diagonal;
  PlainNumbers own[PlainShape::kRows];
  uint32_t hidden[PlainShape::kRows][2];  // bit n % 32 of n / 32: the pair with column n is hidden
  bool full;                              // no thread of the warp has a hidden pair

  __device__ bool is_hidden(int u, int n) const { return hidden[u][n / 32] >> n % 32 & 1; }
  __device__ float logit(const float (&c)[kAccumulators], int u, int n) const {
    return is_hidden(u, n) ? kHidden : k2 * c[PlainShape::at(u, n)] + b;
  }
  __device__ bool is_row(int u) const {
    return threadIdx.x % PlainShape::kLanes == 0 && PlainShape::row(u) < I.count;
  }

  // Finds `hidden` and `full`; with SVRStats it notes the positives' logits. (In a constructor the
  // compiler spills a hundred registers.)
  __device__ void hide(const CudaProblem& p, const float (&c)[kAccumulators]) {
    SUPCLAP_UNROLL
    for (int u = 0; u < PlainShape::kRows; ++u) {
      hidden[u][0] = 0;
      hidden[u][1] = 0;
    }
    if (p.ids || !apart(I, J, kPlainRows, kPlainColumns)) {
      const Identity own_id[] = {{I, PlainShape::row(0)}, {I, PlainShape::row(1)}};
      SUPCLAP_UNROLL
      for (int n = 0; n < PlainShape::kColumns; ++n) {
        const Identity other(J, PlainShape::column(n));
        SUPCLAP_UNROLL
        for (int u = 0; u < PlainShape::kRows; ++u) {
          if (!own_id[u].negatives(other)) hidden[u][n / 32] |= 1u << n % 32;
          // The logit of a positive as this product gave it: ranks are compared with it.
          if (p.stats && own_id[u].index >= 0 && own_id[u].index == other.index)
            row_of(p, kPanelPositive, other.index) = k2 * c[PlainShape::at(u, n)] + b;
        }
      }
    }
    const bool any = hidden[0][0] | hidden[0][1] | hidden[1][0] | hidden[1][1];
    full = uniform(warp_max(any ? 1.0f : 0.0f) == 0);
  }
};

// What S and P add to a row's sums together.
struct PlainSums {
  float base[PlainShape::kRows], bias[PlainShape::kRows];
  float similarity[PlainShape::kRows], pairs[PlainShape::kRows];
};

using PlainScratch = ColumnsOf<kPlainColumns>;

// Where a place leaves (m, l) of a row or of a column: in the first of its slots. A second one,
// where it exists, gets what changes nothing.
struct PlainSlot {
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
__device__ __forceinline__ void plain_statistics(const PlainTile& tile,
                                                 const float (&c)[kAccumulators], PlainSlot to,
                                                 PlainScratch scratch) {
  using Shape = PlainShape;
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
    scratch.chunk(0, h) = all.m;
    scratch.chunk(1, h) = all.l;
  }
  SUPCLAP_UNROLL
  for (int u = 0; u < Shape::kRows; ++u) {
    const LogSum sum = reduce_lanes<Shape::kLanes>(row[u], join);
    if (tile.is_row(u)) to.put(2 * rows, Shape::row(u), sum);
  }
}

// Sweep 1 of a full tile with InfoNCE, with one exponential for a row and its column. Returns false
// where a sum could have lost digits to the reference: plain_statistics does the tile again.
__device__ __forceinline__ bool plain_full_statistics(const PlainTile& tile,
                                                      const float (&c)[kAccumulators], PlainSlot to,
                                                      PlainScratch scratch) {
  using Shape = PlainShape;
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
        row[u] += e;
        column[n] += e;
      }
    }
    if (tile.diagonal) continue;
    const float l = join_columns(column, Add{});
    range.take(l);
    scratch.chunk(0, h) = m;
    scratch.chunk(1, h) = l;
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

// The rest of sweep 1: the team joins what its warps left of their columns, two columns a thread.
// Needs a barrier of the warpgroup before it.
__device__ __forceinline__ void plain_columns(const PlainTile& tile, bool infonce, PlainSlot to,
                                              PlainScratch scratch) {
  for (int y = threadIdx.x % kWarpgroup; y < kPlainColumns; y += kWarpgroup) {
    if (y >= tile.J.count) continue;
    LogSum sum{kHidden, 0};
    for (int warp = 0; warp < kTeamWarps; ++warp)
      sum = merge(sum, {scratch(0, warp, y), scratch(1, warp, y)}, infonce);
    to.put(2 * tile.product.columns(), y, sum);
  }
}

// Adds up the negatives' logits, for SVRStats.
__device__ __forceinline__ void plain_similarity(const PlainTile& tile,
                                                 const float (&c)[kAccumulators], PlainSums& sums) {
  SUPCLAP_UNROLL
  for (int u = 0; u < PlainShape::kRows; ++u) {
    SUPCLAP_UNROLL
    for (int n = 0; n < PlainShape::kColumns; ++n)
      if (!tile.is_hidden(u, n)) {
        sums.similarity[u] += tile.k2 * c[PlainShape::at(u, n)];
        sums.pairs[u] += 1;
      }
  }
}

// Sweep 2. Calls store(u, n, w) with the weights of row u and columns n and n + 1.
template <class Store>
__device__ __forceinline__ void plain_weights(const PlainTile& tile,
                                              const float (&c)[kAccumulators], PlainSums& sums,
                                              const Store& store) {
  using Shape = PlainShape;
  SUPCLAP_UNROLL
  for (int n = 0; n < Shape::kColumns; n += 2) {
    float w[Shape::kRows][2];
    SUPCLAP_UNROLL
    for (int side = 0; side < 2; ++side) {
      const PlainNumbers other = tile.columns.at[Shape::column(n + side)];
      SUPCLAP_UNROLL
      for (int u = 0; u < Shape::kRows; ++u) {
        const float z = tile.logit(c, u, n + side);
        const PlainNumbers own = tile.own[u];
        w[u][side] = exp_2(z - own.m) * own.f + exp_2(z - other.m) * other.f;
        sums.base[u] += w[u][side] * z;
      }
    }
    SUPCLAP_UNROLL
    for (int u = 0; u < Shape::kRows; ++u) store(u, n, w[u]);
  }
}

// SigLIP: the losses where `to` has room for them, and the `weights`, stored as by plain_weights. A
// pair counts for its text: a row of S, a column of P. `ranks`: SVRStats wants the largest logits.
template <class Store>
__device__ __forceinline__ void plain_siglip(const PlainTile& tile, const float (&c)[kAccumulators],
                                             PlainSlot to, PlainScratch scratch, bool ranks,
                                             bool weights, PlainSums& sums, const Store& store) {
  using Shape = PlainShape;
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
          loss[u] = one.loss;
          row[u] = add(row[u], one.loss);
          top[u] = fmaxf(top[u], z[u]);
          w[u][side] = weights ? one.slope * (swapped ? f : tile.own[u].f) : 0;
          sums.base[u] += w[u][side] * (z[u] - tile.b);
          sums.bias[u] += w[u][side];
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
