// What every CUDA kernel does with one tile of inner products, on registers.
//
// A tile pairs rows I with rows J: S = T_I A_J^T, P = A_I T_J^T (P_ij is S_ji), Q = A_I A_J^T,
// K = T_I T_J^T. Exchanging S with P and I with J turns what is done for one into what is done for
// the other. A tile on the diagonal of the Gram matrix has P = S^T, and only what belongs to its
// rows is taken.
//
// Who has what: a thread holds a patch of kRows x kColumns elements. kLanes lanes of a warp share
// its rows, so a row is reduced by shuffles; a column is reduced over the thread's rows, then over
// the groups of lanes of the whole block through shared memory.
#pragma once

#include "cuda/logits.cuh"

namespace supclap::cuda {

template <int kRows_, int kColumns_, int kLanes_, bool kAdjacent_>
struct PatchShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kLanes = kLanes_;
  static constexpr bool kAdjacent = kAdjacent_;  // a thread's columns; else kLanes apart
  static constexpr int kGroups = kWarps * (kWarp / kLanes);
  static constexpr int kBlockRows = kGroups * kRows, kBlockColumns = kLanes * kColumns;
  // Floats of shared memory to reduce columns in.
  static constexpr int kScratch = 2 * kDirections * kGroups * kBlockColumns;

  // The group of lanes, the first row and the columns of this thread, within the block's tile.
  __device__ static int group() { return threadIdx.x / kLanes; }
  __device__ static int row() { return group() * kRows; }
  __device__ static int column(int c) {
    const int lane = threadIdx.x % kLanes;
    return kAdjacent ? lane * kColumns + c : lane + c * kLanes;
  }
};

// The rows on one side of a tile: what is known of them, quantity by quantity, `stride` apart.
struct Side {
  const float* rows;     // [kRows of params.h, stride], of the tile's first row
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

// What the formulas need of a row's support vectors. Outside the length is 1, so that what is
// hidden stays hidden when it is multiplied by it.
struct Support {
  float c, text, audio, offset;  // c, 1 / |t_sup|, 1 / |a_sup|, 0 or kHidden
  __device__ Support() : c(0), text(1), audio(1), offset(0) {}
  __device__ Support(const Side& side, int x, int mode) : Support() {
    if (mode == kNone) return;
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

// One thread's part of a tile.
template <class Shape>
struct Patch {
  float S[Shape::kRows][Shape::kColumns], P[Shape::kRows][Shape::kColumns];
  float Q[Shape::kRows][Shape::kColumns], K[Shape::kRows][Shape::kColumns];

  // From inner products to logits; pairs that do not take part are hidden in all four. `positives`
  // (or null) [N] gets the logit of each positive as this product gave it: ranks are compared with
  // it.
  __device__ void finish(const Side& I, const Side& J, float k2, float b, int mode,
                         float* positives) {
    SUPCLAP_UNROLL
    for (int r = 0; r < Shape::kRows; ++r) {
      const int x = Shape::row() + r;
      SUPCLAP_UNROLL
      for (int c = 0; c < Shape::kColumns; ++c) {
        const int y = Shape::column(c);
        const bool own = I.first + x == J.first + y, inside = x < I.count && y < J.count;
        const bool equal = I.ids && inside && I.ids[x] == J.ids[y];
        if (positives && own && inside) positives[I.first + x] = k2 * S[r][c] + b;
        const bool hidden = own || equal || !inside;
        S[r][c] = hidden ? kHidden : k2 * S[r][c];
        P[r][c] = hidden ? kHidden : k2 * P[r][c];
        if (mode != kNone) Q[r][c] = hidden ? kHidden : k2 * Q[r][c];
        if (mode == kMirror) K[r][c] = hidden ? kHidden : k2 * K[r][c];
      }
    }
  }
};

// Logits of direction d with the tile's rows I as its rows (or, exchanged, its columns J).
struct Logit {
  int mode, d;
  float b;
  // s, p: S and P, exchanged for columns; own, other: support vectors of I and J, exchanged too.
  __device__ float operator()(float s, float p, float q, float k, const Support& own,
                              const Support& other) const {
    if (d == kTextRows) return s + b;
    if (d == kAudioRows) return p + b;
    if (d == kSupportRows) return support_logit(s, q, own.c, own.text) + own.offset + b;
    if (mode == kMirror) return support_logit(p, k, own.c, own.audio) + own.offset + b;
    return support_logit(p, q, other.c, other.text) + other.offset + b;
  }
};

__device__ __forceinline__ bool uses(int mode, int direction) {
  return direction < kSupportRows || (mode != kNone && direction == kSupportRows) ||
         mode == kMirror || mode == kShared;
}

// Where one side's partial results go: `at` + x of planes that are `plane` apart.
struct Slot {
  float* at;
  int64_t plane;
};

// Sweep 1: partial (m, l) of the negatives of every direction, into `slot_i` [kPlanes] for rows
// and, off the diagonal, `slot_j` for columns. Ends in a barrier: `scratch` is free again.
template <class Shape>
__device__ void tile_statistics(const Problem& p, const Patch<Shape>& z, const Side& I,
                                const Side& J, float b, int mode, bool infonce, bool diagonal,
                                Slot slot_i, Slot slot_j, float* scratch) {
  constexpr int kR = Shape::kRows, kC = Shape::kColumns;
  Support own[kR], other[kC];
  SUPCLAP_UNROLL
  for (int r = 0; r < kR; ++r) own[r] = Support(I, Shape::row() + r, mode);
  SUPCLAP_UNROLL
  for (int c = 0; c < kC; ++c) other[c] = Support(J, Shape::column(c), mode);
  const bool writes = threadIdx.x % Shape::kLanes == 0;
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!uses(mode, d)) continue;
    const Logit logit{mode, d, b};
    SUPCLAP_UNROLL
    for (int r = 0; r < kR; ++r) {
      float row[kC], m = kHidden, l = 0;
      SUPCLAP_UNROLL
      for (int c = 0; c < kC; ++c) {
        row[c] = logit(z.S[r][c], z.P[r][c], z.Q[r][c], z.K[r][c], own[r], other[c]);
        m = fmaxf(m, row[c]);
      }
      m = warp_max<Shape::kLanes>(m);
      SUPCLAP_UNROLL
      for (int c = 0; c < kC; ++c) l += summand(row[c], m, infonce);
      l = warp_sum<Shape::kLanes>(l);
      const int x = Shape::row() + r;
      if (writes && x < I.count) {
        slot_i.at[2 * d * slot_i.plane + x] = m;
        slot_i.at[(2 * d + 1) * slot_i.plane + x] = l;
      }
    }
    if (diagonal) continue;
    SUPCLAP_UNROLL
    for (int c = 0; c < kC; ++c) {
      float column[kR], m = kHidden, l = 0;
      SUPCLAP_UNROLL
      for (int r = 0; r < kR; ++r) {
        column[r] = logit(z.P[r][c], z.S[r][c], z.Q[r][c], z.K[r][c], other[c], own[r]);
        m = fmaxf(m, column[r]);
      }
      SUPCLAP_UNROLL
      for (int r = 0; r < kR; ++r) l += summand(column[r], m, infonce);
      float* to = scratch + (2 * d * Shape::kGroups + Shape::group()) * Shape::kBlockColumns;
      to[Shape::column(c)] = m;
      to[Shape::kGroups * Shape::kBlockColumns + Shape::column(c)] = l;
    }
  }
  if (p.stats) {
    SUPCLAP_UNROLL
    for (int r = 0; r < kR; ++r) {
      float sum = 0, pairs = 0;
      SUPCLAP_UNROLL
      for (int c = 0; c < kC; ++c) {
        if (z.S[r][c] <= 0.5f * kHidden) continue;
        sum += z.S[r][c] + (diagonal ? 0 : z.P[r][c]);
        pairs += diagonal ? 1 : 2;
      }
      sum = warp_sum<Shape::kLanes>(sum);
      pairs = warp_sum<Shape::kLanes>(pairs);
      const int x = Shape::row() + r;
      if (writes && x < I.count) {
        slot_i.at[kSimilarity * slot_i.plane + x] = sum;
        slot_i.at[(kSimilarity + 1) * slot_i.plane + x] = pairs;
      }
    }
  }
  if (diagonal) return;
  __syncthreads();
  for (int e = threadIdx.x; e < kDirections * Shape::kBlockColumns; e += kThreads) {
    const int d = e / Shape::kBlockColumns, y = e % Shape::kBlockColumns;
    if (!uses(mode, d) || y >= J.count) continue;
    const float* from = scratch + 2 * d * Shape::kGroups * Shape::kBlockColumns + y;
    LogSum sum{kHidden, 0};
    for (int g = 0; g < Shape::kGroups; ++g) {
      const float* at = from + g * Shape::kBlockColumns;
      sum = merge(sum, {at[0], at[Shape::kGroups * Shape::kBlockColumns]}, infonce);
    }
    slot_j.at[2 * d * slot_j.plane + y] = sum.m;
    slot_j.at[(2 * d + 1) * slot_j.plane + y] = sum.l;
  }
  __syncthreads();
}

// m and omega / (l unit) of the four directions of a row.
struct Factors {
  float m[kDirections], f[kDirections];
  __device__ Factors(const Side& side, int x, int mode, bool infonce) {
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      m[d] = infonce && uses(mode, d) ? side.factor(d, x) : 0;
      f[d] = uses(mode, d) ? side.factor(kDirections + d, x) : 0;
    }
  }
};

// What one element adds to the weights and to the sums of its text and its audio.
struct Half {
  float W, V_A, V_T;                   // weight of S; of Q and K, before they are symmetrised
  float base, total;                   // g S, and all slopes
  float rho_t, support_t, rho_a, support_a;

  // S, Q, K: logits of text t with audio a.
  __device__ Half(float S, float Q, float K, const Support& t, const Support& a, const Factors& ft,
                  const Factors& fa, float b, int mode, bool infonce)
      : V_A(0), V_T(0), rho_t(0), support_t(0), rho_a(0), support_a(0) {
    float g = slope(S + b, ft.m[kTextRows], ft.f[kTextRows], infonce);
    if (infonce) g += slope(S, fa.m[kAudioRows], fa.f[kAudioRows], true);
    base = g * S;
    W = total = g;
    if (mode == kNone) return;
    const float x = support_logit(S, Q, t.c, t.text);
    float h = slope(x + t.offset + b, ft.m[kSupportRows], ft.f[kSupportRows], infonce);
    if (mode == kShared) h += slope(x + t.offset, fa.m[kOtherRows], fa.f[kOtherRows], true);
    rho_t = h * (Q - S), support_t = h * x;
    total += h;
    h *= t.text;
    V_A = t.c * h;
    W += h - V_A;
    if (mode != kMirror) return;
    const float y = support_logit(S, K, a.c, a.audio);
    float u = slope(y + a.offset + b, fa.m[kOtherRows], fa.f[kOtherRows], infonce);
    rho_a = u * (K - S), support_a = u * y;
    total += u;
    u *= a.audio;
    V_T = a.c * u;
    W += u - V_T;
  }
};

// Sweep 2: the weights, a row at a time through store(r, w): w[0] of A_J in dT_I, w[1] of T_J in
// dA_I, w[2] of A_J in dA_I, w[3] of T_J in dT_I; and partial sums [kTileSums] of rows and (kRhoText and on) of columns.
// Ends in a barrier off the diagonal: `scratch` is free again.
template <class Shape, class Store>
__device__ void tile_weights(const Patch<Shape>& z, const Side& I, const Side& J, float b, int mode,
                             bool infonce, bool diagonal, Slot slot_i, Slot slot_j, float* scratch,
                             const Store& store) {
  constexpr int kR = Shape::kRows, kC = Shape::kColumns, kSums = kTileSums;
  float column[kC][kSums - kRhoText] = {};
  SUPCLAP_UNROLL
  for (int r = 0; r < kR; ++r) {
    const int x = Shape::row() + r;
    const Support own(I, x, mode);
    const Factors own_f(I, x, mode, infonce);
    float row[kSums] = {}, w[4][kC];
    SUPCLAP_UNROLL
    for (int c = 0; c < kC; ++c) {
      const int y = Shape::column(c);
      const Support other(J, y, mode);
      const Factors other_f(J, y, mode, infonce);
      const float Q = z.Q[r][c], K = z.K[r][c];
      const Half one(z.S[r][c], Q, K, own, other, own_f, other_f, b, mode, infonce);
      const Half two(z.P[r][c], Q, K, other, own, other_f, own_f, b, mode, infonce);
      w[0][c] = one.W, w[1][c] = two.W, w[2][c] = one.V_A + two.V_A, w[3][c] = one.V_T + two.V_T;
      row[kBase] += one.base + (diagonal ? 0 : two.base);
      row[kBias] += one.total + (diagonal ? 0 : two.total);
      row[kRhoText] += one.rho_t, row[kSupportText] += one.support_t;
      row[kRhoAudio] += two.rho_a, row[kSupportAudio] += two.support_a;
      column[c][kRhoText - kRhoText] += two.rho_t;
      column[c][kSupportText - kRhoText] += two.support_t;
      column[c][kRhoAudio - kRhoText] += one.rho_a;
      column[c][kSupportAudio - kRhoText] += one.support_a;
    }
    store(r, w);
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kSums; ++sum) {
      if (sum >= kRhoText && mode == kNone) continue;
      row[sum] = warp_sum<Shape::kLanes>(row[sum]);
      if (threadIdx.x % Shape::kLanes == 0 && x < I.count) slot_i.at[sum * slot_i.plane + x] = row[sum];
    }
  }
  if (diagonal || mode == kNone) return;
  SUPCLAP_UNROLL
  for (int sum = kRhoText; sum < kSums; ++sum)
    SUPCLAP_UNROLL
    for (int c = 0; c < kC; ++c) {
      float* to = scratch + ((sum - kRhoText) * Shape::kGroups + Shape::group()) * Shape::kBlockColumns;
      to[Shape::column(c)] = column[c][sum - kRhoText];
    }
  __syncthreads();
  for (int e = threadIdx.x; e < (kSums - kRhoText) * Shape::kBlockColumns; e += kThreads) {
    const int sum = e / Shape::kBlockColumns, y = e % Shape::kBlockColumns;
    if (y >= J.count) continue;
    const float* from = scratch + sum * Shape::kGroups * Shape::kBlockColumns + y;
    float total = 0;
    for (int g = 0; g < Shape::kGroups; ++g) total += from[g * Shape::kBlockColumns];
    slot_j.at[(kRhoText + sum) * slot_j.plane + y] = total;
  }
  __syncthreads();
}

}  // namespace supclap::cuda
