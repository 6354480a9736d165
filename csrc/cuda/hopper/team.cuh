// A team's tile on registers: what its threads hold of the products, what they know of the tile's
// rows and columns, and how columns are reduced.
//
// The tile is a block of the panel engine, 32 x 128. A thread has one row and 32 columns, four
// lanes a row, and all four products of each pair. Columns are reduced in chunks by exchanges
// between the eight lanes that share them, then over the four warps through shared memory.
#pragma once

#include "cuda/hopper/pipe.cuh"
#include "cuda/rows/rows.cuh"
#include "cuda/tile/tile.cuh"

namespace supclap::cuda {

// Where a team leaves the partial results of its tile's rows and columns; null for what a sweep
// does without.
struct HopperSlots {
  Slot part_i, part_j, sums_i, sums_j;
  __device__ HopperSlots(const PanelTile& pair, const PanelScratch& to, const HopperPlace& place) {
    const int64_t across = (pair.nj + kPanelColumns - 1) / kPanelColumns * int64_t(pair.ni);
    const int64_t down = (pair.ni + kPanelRows - 1) / kPanelRows * int64_t(pair.nj);
    const int64_t at_i = int64_t(place.y / kPanelColumns) * pair.ni + place.x;
    const int64_t at_j = int64_t(place.x / kPanelRows) * pair.nj + place.y;
    const auto slot = [](float* start, int64_t at, int64_t plane) {
      return Slot{start ? start + at : nullptr, plane};
    };
    part_i = slot(to.part_i, at_i, across);
    sums_i = slot(to.sums_i, at_i, across);
    part_j = slot(to.part_j, at_j, down);
    sums_j = slot(to.sums_j, at_j, down);
  }
};

// Whether so many rows and columns all exist, and no row is also a column.
__device__ __forceinline__ bool apart(const Side& I, const Side& J, int rows, int columns) {
  return I.count >= rows && J.count >= columns &&
         (I.first + rows <= J.first || J.first + columns <= I.first);
}

// What the formulas need of a row, or of a column.
struct HopperNumbers {
  Support support;
  Factors factors;  // of sweep 2
  __device__ HopperNumbers(const Side& side, int x, int mode, bool infonce, bool weights)
      : support(side, x, mode) {
    if (!weights) return;
    factors = Factors(side, x, mode, infonce);
    // What the tiles skip has a weight of 0, whatever its largest logit is.
    if (support.offset == 0) return;
    factors.m[kSupportRows] = 0;
    if (mode == kMirror) factors.m[kOtherRows] = 0;
  }
};

// A support vector's numbers for a full tile: its lengths times k2, or 0 where the tiles skip it.
struct FullSupport {
  float c, text, audio, offset;
  __device__ FullSupport() {}
  __device__ FullSupport(const Support& of, float k2)
      : c(of.c),
        text(of.offset == 0 ? k2 * of.text : 0),
        audio(of.offset == 0 ? k2 * of.audio : 0),
        offset(of.offset) {}
};

// The factors of sweep 2 for a full tile, where no factor is negative and k2 is positive:
// 2^(z - m) f is 2^(z - top). Those of a support vector's own row include its length's number.
struct FullFactors {
  float top[kDirections];
  __device__ FullFactors() {}
  __device__ FullFactors(const Factors& of, const FullSupport& support, int mode) {
    const float times[] = {1, 1, support.text, mode == kMirror ? support.audio : 1};
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      const float f = times[d] * of.f[d];
      top[d] = f == 0 ? -kHidden : of.m[d] - log_2(f);
    }
  }
};

// The same numbers of a tile's columns in shared memory, four to an access.
struct HopperColumns {
  struct alignas(16) Four {
    float at[4];
  };
  Four support_at[kPanelColumns], full_at[kPanelColumns];
  Four m_at[kPanelColumns], f_at[kPanelColumns], top_at[kPanelColumns];

  // Called by the whole warpgroup, a thread for each column.
  __device__ void keep(const HopperNumbers& column, float k2, int mode, bool infonce,
                       bool weights) {
    const int y = threadIdx.x % kWarpgroup;
    const Support& of = column.support;
    const FullSupport full(of, k2);
    support_at[y] = {of.c, of.text, of.audio, of.offset};
    full_at[y] = {full.c, full.text, full.audio, full.offset};
    if (!weights) return;
    const auto& m = column.factors.m;
    const auto& f = column.factors.f;
    m_at[y] = {m[0], m[1], m[2], m[3]};
    f_at[y] = {f[0], f[1], f[2], f[3]};
    if (!infonce) return;
    const auto& top = FullFactors(column.factors, full, mode).top;
    top_at[y] = {top[0], top[1], top[2], top[3]};
  }
  __device__ FullSupport full(int y) const {
    const Four from = full_at[y];
    FullSupport of;
    of.c = from.at[0];
    of.text = from.at[1];
    of.audio = from.at[2];
    of.offset = from.at[3];
    return of;
  }
  __device__ Support support(int y) const {
    const Four from = support_at[y];
    Support of;
    of.c = from.at[0];
    of.text = from.at[1];
    of.audio = from.at[2];
    of.offset = from.at[3];
    return of;
  }
  __device__ FullFactors full_factors(int y) const {
    const Four from = top_at[y];
    FullFactors of;
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) of.top[d] = from.at[d];
    return of;
  }
  __device__ Factors factors(int y) const {
    const Four m = m_at[y], f = f_at[y];
    Factors of;
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      of.m[d] = m.at[d];
      of.f[d] = f.at[d];
    }
    return of;
  }
};

// What a thread has of a tile: one row, and pairs of neighbouring columns.
struct HopperShape {
  static constexpr int kColumns = 32, kLanes = 4;
  __device__ static int row() { return threadIdx.x % kWarpgroup / kLanes; }
  __device__ static int column(int c) { return threadIdx.x % kLanes * 2 + beyond(c); }
  // How far column c of a thread is behind its first one.
  __device__ static constexpr int beyond(int c) { return c / 2 * 8 + c % 2; }
};
constexpr int kChunk = 8;  // columns that are reduced together: one for each lane that shares them

// One thread's products with what it knows of its row.
struct HopperTile {
  const Side &I, &J;
  const HopperColumns& columns;
  int mode;
  float k2, b;
  bool diagonal;
  const Support& own;
  const Factors& own_f;
  uint32_t hidden;  // bit c: the pair with column c is hidden
  bool full;        // no thread of the warp has a hidden pair

  __device__ HopperTile(const CudaProblem& p, const float (&c)[kAccumulators], const Side& I,
                        const Side& J, const HopperNumbers& row, const HopperColumns& columns,
                        int mode, bool diagonal)
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
        full(apart(I, J, kPanelRows, kPanelColumns)) {
    const Identity own_id(I, HopperShape::row());
    if (full && p.ids) {
      SUPCLAP_UNROLL
      for (int n = 0; n < HopperShape::kColumns; ++n)
        if (own_id.id == J.ids[HopperShape::column(n)]) hidden |= 1u << n;
      full = uniform(warp_max(hidden ? 1.0f : 0.0f) == 0);
    }
    if (apart(I, J, kPanelRows, kPanelColumns)) return;
    SUPCLAP_UNROLL
    for (int n = 0; n < HopperShape::kColumns; ++n) {
      const Identity other(J, HopperShape::column(n));
      if (!own_id.negatives(other)) hidden |= 1u << n;
      // The logit of a positive as this product gave it: ranks are compared with it.
      if (p.stats && own_id.index >= 0 && own_id.index == other.index)
        row_of(p, kPanelPositive, own_id.index) = k2 * products(c, n).S + b;
    }
  }

  // The accumulators' places (device/hopper.cuh): texts are rows 0-7 of a warp's 16 and audios rows
  // 8-15; columns are likewise.
  __device__ static Products products(const float (&c)[kAccumulators], int n) {
    const int at = n / 2 * 4 + n % 2, texts = kAccumulators / 2;
    return {c[at], c[texts + at + 2], c[at + 2], c[texts + at]};
  }
  __device__ Products logits(const float (&c)[kAccumulators], int n) const {
    return to_logits(products(c, n), k2, hidden >> n & 1, mode);
  }
};

// A row's weights on their way to memory. Of each 8 columns a lane has two: with its neighbour's of
// two times 8 it writes four next to each other, so that the lanes of a row fill 32 bytes.
template <class Scalar>
struct RowStore {
  Scalar* to;       // of column()
  uint32_t before;  // the last two weights
  __device__ static int column() {
    const int lane = threadIdx.x % HopperShape::kLanes;
    return lane / 2 * 4 + lane % 2 * 8;
  }
  // Takes columns n and n + 1 of this lane; called by all lanes, in the columns' order.
  __device__ __forceinline__ void put(int n, const float (&w)[2]) {
    const uint32_t low = narrow<Scalar>(w[0]).bits, high = narrow<Scalar>(w[1]).bits;
    const uint32_t two = low | high << 16;
    if (n % 4 == 0) {
      before = two;
      return;
    }
    const bool odd = threadIdx.x % 2;
    const uint32_t other = shuffle_xor(odd ? before : two, 1);
    struct alignas(8) Four {
      uint32_t at[2];
    };
    *reinterpret_cast<Four*>(to + HopperShape::beyond(n - 2)) =
        odd ? Four{other, two} : Four{before, other};
  }
};

// ---------------------------------------------------------------- reduction of columns

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
          join_two(column[n], column[n + step], HopperShape::kLanes * step * kChunk / kCount, join);
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
  // The column of chunk h that join_columns gave to this lane, and its place in a plane.
  __device__ static int column(int h) {
    return HopperShape::column(h * kChunk + threadIdx.x % kWarp / HopperShape::kLanes);
  }
  __device__ float& chunk(int plane, int h) const {
    return (*this)(plane, threadIdx.x % kWarpgroup / kWarp, column(h));
  }
};
// Its planes are m and l of each direction, and later, when these have been read, the sums; or,
// `once` (SigLIP, whose m only SVRStats wants), the l and the sums together.
struct ColumnScratch : ColumnsOf<kPanelColumns> {
  bool once;
  __device__ int l(int d) const { return once ? d : 2 * d + 1; }
  __device__ int sum(int n) const { return once ? kDirections + n : n; }
};

// Whether the mode adds to a sum that columns have: only a mirror has support vectors of audio.
__device__ __forceinline__ bool has_sum(int mode, int sum) {
  return mode == kMirror || sum == kRhoText || sum == kSupportText;
}

}  // namespace supclap::cuda
