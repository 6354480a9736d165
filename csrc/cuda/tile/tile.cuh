// What every CUDA kernel does with one tile of inner products, on registers.
//
// A tile pairs rows I with rows J: S = T_I A_J^T, P = A_I T_J^T (P_ij is S_ji), Q = A_I A_J^T,
// K = T_I T_J^T. Exchanging S with P and I with J turns what is done for one into what is done for
// the other. A tile on the diagonal of the Gram matrix has P = S^T, and only what belongs to its
// rows is taken.
//
// A thread has a patch of kRows x kColumns elements. kLanes lanes of a warp share its
// rows, so a row is reduced by shuffles; a column is reduced over the thread's rows, then over the
// groups of lanes of the whole block through shared memory.
#pragma once

#include "cuda/tile/logits.cuh"

namespace supclap::cuda {

// How many sums columns have, too: those from kRhoText on.
constexpr int kColumnSums = kTileSums - kRhoText;

// How a block's threads share a tile. kAdjacent: a thread's columns are neighbours; else they are
// kLanes apart.
template <int kRows_, int kColumns_, int kLanes_, bool kAdjacent>
struct PatchShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kLanes = kLanes_;
  static constexpr int kGroups = kWarps * (kWarp / kLanes);
  static constexpr int kBlockRows = kGroups * kRows, kBlockColumns = kLanes * kColumns;
  // Floats of shared memory to reduce the columns' sums in.
  static constexpr int kScratch = kColumnSums * kGroups * kBlockColumns;

  // The group of lanes, the first row and the columns of this thread, within the block's tile.
  __device__ static int group() { return threadIdx.x / kLanes; }
  __device__ static int row() { return group() * kRows; }
  __device__ static int column(int c) {
    const int lane = threadIdx.x % kLanes;
    return kAdjacent ? lane * kColumns + c : lane + c * kLanes;
  }
};

// One element of a tile: inner products, or logits in base 2.
struct Products {
  float S, P, Q, K;
};

__device__ __forceinline__ Products exchanged(const Products& z) { return {z.P, z.S, z.Q, z.K}; }

// Logits from inner products: k2 times each, or kHidden in all four if the pair is hidden.
__device__ __forceinline__ Products to_logits(Products z, float k2, bool hidden, int mode) {
  return {hidden ? kHidden : k2 * z.S, hidden ? kHidden : k2 * z.P,
          hidden || mode == kPlain ? kHidden : k2 * z.Q,
          hidden || mode != kMirror ? kHidden : k2 * z.K};
}

// The rows on one side of a tile: what is known of them, quantity by quantity, `stride` apart.
struct Side {
  const float* rows;     // [kGeometryRows, stride], of the tile's first row
  const float* factors;  // [8, factor_stride]
  int64_t stride, factor_stride;
  const int64_t* ids;  // of the first row, or null
  int64_t first;       // its index in the batch
  int count;

  __device__ float row(int quantity, int x, float outside = 0) const {
    return x < count ? rows[quantity * stride + x] : outside;
  }
  __device__ float factor(int which, int x) const {
    return x < count ? factors[which * factor_stride + x] : 0;
  }
};

// The rows that begin at first + at, of the n that begin at `first`, as the sweeps left them in
// `state`.
__device__ __forceinline__ Side side_of(const CudaProblem& p, int64_t first, int at, int n) {
  const int64_t start = first + at;
  return {p.state + kStateGeometry * p.N + start,
          p.factors + start,
          p.N,
          p.N,
          p.ids ? p.ids + start : nullptr,
          start,
          n - at};
}

// What tells whether two rows are negatives of each other.
struct Identity {
  int64_t index, id;  // -1: no row
  __device__ Identity(const Side& side, int x)
      : index(x < side.count ? side.first + x : -1),
        id(side.ids && x < side.count ? side.ids[x] : index) {}
  __device__ bool negatives(const Identity& other) const {
    return index >= 0 && other.index >= 0 && index != other.index && id != other.id;
  }
};

// What the formulas need of a row's support vectors. Beyond the last row the lengths are 1, so that
// a hidden logit stays hidden when it is multiplied by them.
struct Support {
  float c, text, audio, offset;  // c, 1 / |t_sup|, 1 / |a_sup|, 0 or kHidden
  __device__ Support() : c(0), text(1), audio(1), offset(0) {}
  __device__ Support(const Side& side, int x, int mode) : Support() {
    if (mode == kPlain) return;
    c = side.row(kTileC, x);
    text = side.row(kTextInverse, x, 1);
    audio = side.row(kAudioInverse, x, 1);
    offset = side.row(kOffset, x);
  }
};

// <s, y> / |s| of the support vector s = x + c (y_own - x).
__device__ __forceinline__ float support_logit(float cross, float gram, float c, float inverse) {
  return support_product(cross, gram, c) * inverse;
}

// A logit of direction d, whose rows are the tile's rows I; exchange S with P and `own` (the
// support vectors of I) with `other` for those of its columns.
__device__ __forceinline__ float direction_logit(int d, int mode, const Products& z,
                                                 const Support& own, const Support& other,
                                                 float b) {
  if (d == kTextRows) return z.S + b;
  if (d == kAudioRows) return z.P + b;
  if (d == kSupportRows) return support_logit(z.S, z.Q, own.c, own.text) + own.offset + b;
  if (mode == kMirror) return support_logit(z.P, z.K, own.c, own.audio) + own.offset + b;
  return support_logit(z.P, z.Q, other.c, other.text) + other.offset + b;
}

template <int kCount>
__device__ __forceinline__ float largest(const float (&z)[kCount]) {
  float m = kHidden;
  SUPCLAP_UNROLL
  for (int n = 0; n < kCount; ++n) m = fmaxf(m, z[n]);
  return m;
}
template <int kCount>
__device__ __forceinline__ float summands(const float (&z)[kCount], float m, int d, bool infonce) {
  float l = 0;
  SUPCLAP_UNROLL
  for (int n = 0; n < kCount; ++n) l += summand(z[n], m, d, infonce);
  return l;
}

// (m, l) of direction d over some logits of this thread.
template <int kCount>
__device__ __forceinline__ LogSum log_sum(const float (&z)[kCount], int d, bool infonce) {
  const float m = largest(z);
  return {m, summands(z, m, d, infonce)};
}
// (m, l) of a whole row, reduced over the kLanes lanes that share it.
template <class Shape>
__device__ __forceinline__ LogSum row_log_sum(const float (&z)[Shape::kColumns], int d,
                                              bool infonce) {
  const float m = warp_max<Shape::kLanes>(largest(z));
  return {m, warp_sum<Shape::kLanes>(summands(z, m, d, infonce))};
}

// Adds an element to the sum and the count of a row's negatives (kSimilarity): the logit of S and,
// off the diagonal, that of P.
__device__ __forceinline__ void add_similarity(const Products& z, bool diagonal, float& sum,
                                               float& pairs) {
  if (z.S <= 0.5f * kHidden) return;  // false for NaN, which is added
  sum += z.S + (diagonal ? 0 : z.P);
  pairs += diagonal ? 1 : 2;
}
template <class Shape>
__device__ __forceinline__ LogSum row_similarity(const Products (&z)[Shape::kColumns],
                                                 bool diagonal) {
  float sum = 0, pairs = 0;
  SUPCLAP_UNROLL
  for (int c = 0; c < Shape::kColumns; ++c) add_similarity(z[c], diagonal, sum, pairs);
  return {warp_sum<Shape::kLanes>(sum), warp_sum<Shape::kLanes>(pairs)};
}

// Where one side's partial results go: row x has place at + x in each plane; planes are `plane`
// apart.
struct Slot {
  float* at;
  int64_t plane;
  // Writes m and l of row x into planes `first` and `first` + 1.
  __device__ void put(int first, int x, LogSum value) const {
    at[first * plane + x] = value.m;
    at[(first + 1) * plane + x] = value.l;
  }
};

// m and omega / (l unit) of the four directions of a row.
struct Factors {
  float m[kDirections], f[kDirections];
  __device__ Factors() {}
  __device__ Factors(const Side& side, int x, int mode, bool infonce) {
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      m[d] = infonce && has_direction(mode, d) ? side.factor(d, x) : 0;
      f[d] = has_direction(mode, d) ? side.factor(kDirections + d, x) : 0;
    }
  }
};

// What one element adds to the weights and to the sums of its text and its audio.
struct Half {
  float W, V_A, V_T;  // weights of S, and of Q and K before these are symmetrised
  float base, total;  // g S, and the sum of all slopes
  float rho_t, support_t, rho_a, support_a;

  // S, Q, K: logits of text t with audio a.
  __device__ Half(float S, float Q, float K, const Support& t, const Support& a, const Factors& ft,
                  const Factors& fa, float b, int mode, bool infonce)
      : V_A(0), V_T(0), rho_t(0), support_t(0), rho_a(0), support_a(0) {
    float g = slope(S + b, ft.m[kTextRows], ft.f[kTextRows], infonce);
    if (infonce) g += slope(S, fa.m[kAudioRows], fa.f[kAudioRows], true);
    base = g * S;
    W = total = g;
    if (mode == kPlain) return;
    const float x = support_logit(S, Q, t.c, t.text);
    float h = slope(x + t.offset + b, ft.m[kSupportRows], ft.f[kSupportRows], infonce);
    if (mode == kShared) h += slope(x + t.offset, fa.m[kOtherRows], fa.f[kOtherRows], true);
    rho_t = h * (Q - S);
    support_t = h * x;
    total += h;
    h *= t.text;
    V_A = t.c * h;
    W += h - V_A;
    if (mode != kMirror) return;
    const float y = support_logit(S, K, a.c, a.audio);
    float u = slope(y + a.offset + b, fa.m[kOtherRows], fa.f[kOtherRows], infonce);
    rho_a = u * (K - S);
    support_a = u * y;
    total += u;
    u *= a.audio;
    V_T = a.c * u;
    W += u - V_T;
  }
};

// Adds an element's halves to the sums of its row and of its column.
__device__ __forceinline__ void add_sums(const Half& one, const Half& two, bool diagonal,
                                         float (&row)[kTileSums], float (&column)[kColumnSums]) {
  row[kBase] += one.base + (diagonal ? 0 : two.base);
  row[kBias] += one.total + (diagonal ? 0 : two.total);
  row[kRhoText] += one.rho_t;
  row[kSupportText] += one.support_t;
  row[kRhoAudio] += two.rho_a;
  row[kSupportAudio] += two.support_a;
  column[kRhoText - kRhoText] += two.rho_t;
  column[kSupportText - kRhoText] += two.support_t;
  column[kRhoAudio - kRhoText] += one.rho_a;
  column[kSupportAudio - kRhoText] += one.support_a;
}

// Sweep 2. Calls store(r, w) with the weights of one row after the other: w[0] of A_J in dT_I, w[1]
// of T_J in dA_I, w[2] of A_J in dA_I, w[3] of T_J in dT_I. Leaves partial sums in `slot_i` (those
// of rows) and `slot_j` (those of columns, from kRhoText on). z(r).at[c] are the logits of row r.
// `scratch` [Shape::kScratch] is free again behind the next barrier.
template <class Shape, class Logits, class Store>
__device__ __forceinline__ void tile_weights(const Logits& z, const Side& I, const Side& J, float b,
                                             int mode, bool infonce, bool diagonal, Slot slot_i,
                                             Slot slot_j, float* scratch, const Store& store) {
  float column[Shape::kColumns][kColumnSums] = {};
  SUPCLAP_ROLLED
  for (int r = 0; r < Shape::kRows; ++r) {
    const int x = Shape::row() + r;
    const Support own(I, x, mode);
    const Factors own_f(I, x, mode, infonce);
    const auto logits = z(r);
    float row[kTileSums] = {}, w[4][Shape::kColumns];
    SUPCLAP_UNROLL
    for (int c = 0; c < Shape::kColumns; ++c) {
      const int y = Shape::column(c);
      const Support other(J, y, mode);
      const Factors other_f(J, y, mode, infonce);
      const Products at = logits.at[c];
      const Half one(at.S, at.Q, at.K, own, other, own_f, other_f, b, mode, infonce);
      const Half two(at.P, at.Q, at.K, other, own, other_f, own_f, b, mode, infonce);
      w[0][c] = one.W;
      w[1][c] = two.W;
      w[2][c] = one.V_A + two.V_A;
      w[3][c] = one.V_T + two.V_T;
      add_sums(one, two, diagonal, row, column[c]);
    }
    store(r, w);
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kTileSums; ++sum) {
      if (sum >= kRhoText && mode == kPlain) continue;
      const float total = warp_sum<Shape::kLanes>(row[sum]);
      if (threadIdx.x % Shape::kLanes == 0 && x < I.count)
        slot_i.at[sum * slot_i.plane + x] = total;
    }
  }
  if (diagonal || mode == kPlain) return;
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kColumnSums; ++sum) {
    SUPCLAP_UNROLL
    for (int c = 0; c < Shape::kColumns; ++c)
      scratch[(sum * Shape::kGroups + Shape::group()) * Shape::kBlockColumns + Shape::column(c)] =
          column[c][sum];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < kColumnSums * Shape::kBlockColumns; e += kThreads) {
    const int sum = e / Shape::kBlockColumns, y = e % Shape::kBlockColumns;
    if (y >= J.count) continue;
    const float* from = scratch + sum * Shape::kGroups * Shape::kBlockColumns + y;
    float total = 0;
    for (int g = 0; g < Shape::kGroups; ++g) total += from[g * Shape::kBlockColumns];
    slot_j.at[(kRhoText + sum) * slot_j.plane + y] = total;
  }
}

}  // namespace supclap::cuda
