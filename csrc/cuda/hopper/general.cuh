// What a warpgroup makes of the products of one tile (gram.cuh), on registers: statistics or
// weights.
//
// A thread has one row and 32 columns, four lanes a row, and all four products of each pair.
// Columns are reduced in chunks by exchanges between the eight lanes that share them, then over the
// four warps through shared memory.
#pragma once

#include "cuda/device/hopper.cuh"
#include "cuda/rows/rows.cuh"
#include "cuda/tile/tile.cuh"

namespace supclap::cuda {

constexpr int kGramRows = kPanelRows, kGramColumns = kPanelColumns;  // of a tile
constexpr int kTeamWarps = kWarpgroup / kWarp;

// A place in a tile pair: first row and column.
struct GramPlace {
  int x, y;
};
// Where it leaves its partial results, of rows and of columns; null for what a sweep does without.
struct GramSlots {
  Slot part_i, part_j, sums_i, sums_j;
  __device__ GramSlots(const PanelTile& tile, const PanelScratch& to, const GramPlace& place) {
    const int64_t across = (tile.nj + kGramColumns - 1) / kGramColumns * int64_t(tile.ni);
    const int64_t down = (tile.ni + kGramRows - 1) / kGramRows * int64_t(tile.nj);
    const int64_t at_i = int64_t(place.y / kGramColumns) * tile.ni + place.x;
    const int64_t at_j = int64_t(place.x / kGramRows) * tile.nj + place.y;
    const auto slot = [](float* start, int64_t at, int64_t plane) {
      return Slot{start ? start + at : nullptr, plane};
    };
    part_i = slot(to.part_i, at_i, across), sums_i = slot(to.sums_i, at_i, across);
    part_j = slot(to.part_j, at_j, down), sums_j = slot(to.sums_j, at_j, down);
  }
};

// Whether so many rows and columns are all there, and none is both.
__device__ __forceinline__ bool apart(const Side& I, const Side& J, int rows, int columns) {
  return I.count >= rows && J.count >= columns &&
         (I.first + rows <= J.first || J.first + columns <= I.first);
}

// What the formulas need of a row, or of a column.
struct GramNumbers {
  Support support;
  Factors factors;  // of sweep 2
  __device__ GramNumbers(const Side& side, int x, int mode, bool infonce, bool weights)
      : support(side, x, mode) {
    if (!weights) return;
    factors = Factors(side, x, mode, infonce);
    // What the tiles skip has a weight of 0, whatever its largest logit is.
    if (support.offset == 0) return;
    factors.m[kSupportRows] = 0;
    if (mode == kMirror) factors.m[kOtherRows] = 0;
  }
};

// A support vector's numbers where no pair is hidden: its lengths times k2, or, where the tiles
// skip it, 0.
struct PlainSupport {
  float c, text, audio, offset;
  __device__ PlainSupport() {}
  __device__ PlainSupport(const Support& of, float k2)
      : c(of.c),
        text(of.offset == 0 ? k2 * of.text : 0),
        audio(of.offset == 0 ? k2 * of.audio : 0),
        offset(of.offset) {}
};

// Factors of sweep 2 where none is negative, nor k2: 2^(z - m) f is 2^(z - top). Those of a support
// vector's own row are times its length's number.
struct PlainFactors {
  float top[kDirections];
  __device__ PlainFactors() {}
  __device__ PlainFactors(const Factors& of, const PlainSupport& support, int mode) {
    const float times[] = {1, 1, support.text, mode == kMirror ? support.audio : 1};
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      const float f = times[d] * of.f[d];
      top[d] = f == 0 ? -kHidden : of.m[d] - log_2(f);
    }
  }
};

// ... of a tile's columns, four numbers to an access.
struct GramColumns {
  struct alignas(16) Four {
    float at[4];
  };
  Four support_at[kGramColumns], plain_at[kGramColumns];
  Four m_at[kGramColumns], f_at[kGramColumns], top_at[kGramColumns];

  // The whole warpgroup, a thread for each column.
  __device__ void keep(const GramNumbers& own, float k2, int mode, bool infonce, bool weights) {
    const int y = threadIdx.x % kWarpgroup;
    const Support& of = own.support;
    const PlainSupport plain(of, k2);
    support_at[y] = {of.c, of.text, of.audio, of.offset};
    plain_at[y] = {plain.c, plain.text, plain.audio, plain.offset};
    if (!weights) return;
    const auto& m = own.factors.m;
    const auto& f = own.factors.f;
    m_at[y] = {m[0], m[1], m[2], m[3]}, f_at[y] = {f[0], f[1], f[2], f[3]};
    if (!infonce) return;
    const auto& top = PlainFactors(own.factors, plain, mode).top;
    top_at[y] = {top[0], top[1], top[2], top[3]};
  }
  __device__ PlainSupport plain(int y) const {
    const Four from = plain_at[y];
    PlainSupport of;
    of.c = from.at[0], of.text = from.at[1], of.audio = from.at[2], of.offset = from.at[3];
    return of;
  }
  __device__ Support support(int y) const {
    const Four from = support_at[y];
    Support of;
    of.c = from.at[0], of.text = from.at[1], of.audio = from.at[2], of.offset = from.at[3];
    return of;
  }
  __device__ PlainFactors plain_factors(int y) const {
    const Four from = top_at[y];
    PlainFactors of;
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) of.top[d] = from.at[d];
    return of;
  }
  __device__ Factors factors(int y) const {
    const Four m = m_at[y], f = f_at[y];
    Factors of;
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) of.m[d] = m.at[d], of.f[d] = f.at[d];
    return of;
  }
};

// What a thread has of a tile: one row, pairs of neighbours in its columns.
struct GramShape {
  static constexpr int kColumns = 32, kLanes = 4;
  __device__ static int row() { return threadIdx.x % kWarpgroup / kLanes; }
  __device__ static int column(int c) { return threadIdx.x % kLanes * 2 + beyond(c); }
  __device__ static constexpr int beyond(int c) { return c / 2 * 8 + c % 2; }  // the first one
};
constexpr int kChunk = 8;  // columns that are reduced together: one for each lane that shares them

// One thread's products with what it knows of its row.
struct GramTile {
  const Side &I, &J;
  const GramColumns& columns;
  int mode;
  float k2, b;
  bool diagonal;
  const Support& own;
  const Factors& own_f;
  uint32_t hidden;  // bit c: no pair of negatives
  bool plain;       // for no thread of the warp is one hidden

  __device__ GramTile(const Problem& p, const float (&c)[kAccumulators], const Side& I,
                      const Side& J, const GramNumbers& row, const GramColumns& columns, int mode,
                      bool diagonal)
      : I(I),
        J(J),
        columns(columns),
        mode(mode),
        k2(logit_scale_2(p)),
        b(logit_bias_2(p)),
        diagonal(diagonal),
        own(row.support),
        own_f(row.factors),
        hidden(0),
        plain(apart(I, J, kGramRows, kGramColumns)) {
    const Identity own_id(I, GramShape::row());
    if (plain && p.ids) {
      SUPCLAP_UNROLL
      for (int n = 0; n < GramShape::kColumns; ++n)
        if (own_id.id == J.ids[GramShape::column(n)]) hidden |= 1u << n;
      plain = uniform(warp_max(hidden ? 1.0f : 0.0f) == 0);
    }
    if (apart(I, J, kGramRows, kGramColumns)) return;
    SUPCLAP_UNROLL
    for (int n = 0; n < GramShape::kColumns; ++n) {
      const Identity other(J, GramShape::column(n));
      if (!own_id.negatives(other)) hidden |= 1u << n;
      // The logit of a positive as this product gave it: ranks are compared with it.
      if (p.stats && own_id.index >= 0 && own_id.index == other.index)
        row_of(p, kPanelPositive, own_id.index) = k2 * products(c, n).S + b;
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

// Where each warp leaves what it knows of a column, plane by plane.
template <int kCount>
struct ColumnsOf {
  float* at;
  __device__ float& operator()(int plane, int warp, int y) const {
    return at[(plane * kTeamWarps + warp) * kCount + y];
  }
  // Of column g of a chunk, by the lanes that join_columns gave it to.
  __device__ static int column(int h) {
    return GramShape::column(h * kChunk + threadIdx.x % kWarp / GramShape::kLanes);
  }
  __device__ float& chunk(int plane, int h) const {
    return (*this)(plane, threadIdx.x % kWarpgroup / kWarp, column(h));
  }
};
// m and l of each direction, and when these are read the sums; or, `once` (SigLIP, whose m only
// SVRStats wants), the l and the sums together.
struct ColumnScratch : ColumnsOf<kGramColumns> {
  bool once;
  __device__ int l(int d) const { return once ? d : 2 * d + 1; }
  __device__ int sum(int n) const { return once ? kDirections + n : n; }
};

// Sweep 1, as panel_statistics, up to what the warps of a team leave of their columns in `scratch`.
__device__ __forceinline__ void gram_statistics(const Problem& p, GramTile& tile,
                                                const float (&c)[kAccumulators], bool infonce,
                                                Slot slot_i, ColumnScratch scratch) {
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

// ... and what the team makes of it, a thread for each column: behind a barrier of the warpgroup.
__device__ __forceinline__ void column_statistics(const GramTile& tile, bool infonce, Slot slot_j,
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

// Whether the mode adds to a sum that columns have: only a mirror has support vectors of audio.
__device__ __forceinline__ bool has_sum(int mode, int sum) {
  return mode == kMirror || sum == kRhoText || sum == kSupportText;
}

// Sweep 2, as tile_weights, likewise; store(n, w): the weights of columns n and n + 1.
template <class Store>
__device__ __forceinline__ void gram_weights(const GramTile& tile, const float (&c)[kAccumulators],
                                             bool infonce, Slot slot_i, ColumnScratch scratch,
                                             const Store& store) {
  using Shape = GramShape;
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
        w[0][side] = one.W, w[1][side] = two.W;
        w[2][side] = one.V_A + two.V_A, w[3][side] = one.V_T + two.V_T;
      }
      store(h * kChunk + e, w);
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
__device__ __forceinline__ void column_sums(const GramTile& tile, Slot slot_j,
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
