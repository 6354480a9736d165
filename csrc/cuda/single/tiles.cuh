// The single launch's tile pairs, whose products stay in shared memory between its phases: they
// become logits, statistics are taken of them, and weights take their place. Nothing here knows the
// embeddings' dtype.
#pragma once

#include "cuda/rows/literal.cuh"
#include "cuda/tile/tile.cuh"

namespace supclap::cuda {

// How a warp's lanes share a tile of B x B in shared memory.
template <int B>
using SingleShape =
    PatchShape<(B == 16 ? 1 : B / 8), (B == 64 ? 2 : 1), (B == 16 ? 16 : kWarp), false>;

// A block's kept tiles. Methods that are not inlined are compiled once for all kernels.
template <int B>
struct KeptTiles {
  using Shape = SingleShape<B>;
  static_assert(Shape::kBlockRows == B && Shape::kBlockColumns == B);
  static constexpr int kPitch = B + 1;  // rows and columns of a tile without bank conflicts
  static constexpr int kTile = B * kPitch;
  static constexpr int kFactors = 2 * 2 * kDirections * B;  // of rows I and J

  const CudaProblem& p;
  const SinglePlan& plan;
  const SingleScratch& to;
  float* memory;   // all of the block's
  float* stage;    // behind the kept tiles: see SingleLayout
  float* factors;  // [2 sides, 2 kDirections, B]

  __device__ int64_t padded() const { return int64_t(plan.tiles) * B; }
  __device__ int grams() const { return grams_of(p); }

  __device__ Side side(int tile, const float* factors) const {
    const int64_t first = int64_t(tile) * B;
    return {p.state + kStateGeometry * p.N + first,
            factors,
            p.N,
            B,
            p.ids ? p.ids + first : nullptr,
            first,
            int(p.N - first < B ? p.N - first : B)};
  }

  // Where tile `own` leaves its partial results over tile `other`.
  __device__ Slot slot(float* partial, int own, int other) const {
    return {partial + int64_t(other) * padded() + int64_t(own) * B, int64_t(plan.tiles) * padded()};
  }

  // Turns inner products into logits, in place, and hides pairs. On the diagonal P becomes S^T.
  // Ends in a barrier.
  __device__ __noinline__ void to_logits_in_place(int I, int J, float* tiles) const {
    const bool diagonal = I == J;
    const Side own = side(I, nullptr), other = side(J, nullptr);
    const float k2 = logit_scale_2(p), b = logit_bias_2(p);
    SUPCLAP_ROLLED
    for (int e = threadIdx.x; e < B * B; e += kThreads) {
      const int x = e / B, y = e % B;
      float* at = tiles + x * kPitch + y;
      const Identity i(own, x), j(other, y);
      if (p.stats && i.index >= 0 && i.index == j.index)
        row_of(p, kPanelPositive, i.index) = k2 * at[0] + b;
      const Products z =
          to_logits({at[0], diagonal ? 0 : at[kTile], grams() > 0 ? at[2 * kTile] : 0,
                     grams() > 1 ? at[3 * kTile] : 0},
                    k2, !i.negatives(j), p.mode);
      at[0] = z.S;
      if (diagonal)
        tiles[kTile + y * kPitch + x] = z.S;
      else
        at[kTile] = z.P;
      if (grams() > 0) at[2 * kTile] = z.Q;
      if (grams() > 1) at[3 * kTile] = z.K;
    }
    __syncthreads();
  }

  // Logits at tiles[x, y], or, for the columns as rows, at tiles[y, x] with S and P exchanged.
  __device__ Products read(const float* tiles, int x, int y, bool swapped) const {
    const float* at = tiles + (swapped ? y * kPitch + x : x * kPitch + y);
    const Products z{at[0], at[kTile], grams() > 0 ? at[2 * kTile] : 0,
                     grams() > 1 ? at[3 * kTile] : 0};
    return swapped ? exchanged(z) : z;
  }

  // Writes partial (m, l) of the rows of tile `own` over those of tile `other`; `swapped`: own is
  // J. Slots exist for whole tiles and all directions; what the batch and the mode do not have is
  // never read.
  template <bool kInfonce>
  __device__ __noinline__ void side_statistics(int own_tile, int other_tile, const float* tiles,
                                               bool swapped) const {
    const Side own = side(own_tile, nullptr), other = side(other_tile, nullptr);
    const Slot to_slot = slot(to.part, own_tile, other_tile);
    const float b = logit_bias_2(p);
    const bool writes = threadIdx.x % Shape::kLanes == 0;
    Support others[Shape::kColumns];
    SUPCLAP_UNROLL
    for (int c = 0; c < Shape::kColumns; ++c) others[c] = Support(other, Shape::column(c), p.mode);
    SUPCLAP_ROLLED
    for (int r = 0; r < Shape::kRows; ++r) {
      const int x = Shape::row() + r;
      const Support support(own, x, p.mode);
      Products z[Shape::kColumns];
      SUPCLAP_UNROLL
      for (int c = 0; c < Shape::kColumns; ++c) z[c] = read(tiles, x, Shape::column(c), swapped);
      // Two directions at a time, since each is a chain of exchanges between lanes.
      SUPCLAP_ROLLED
      for (int first = 0; first < kDirections; first += 2) {
        if (!has_direction(p.mode, first)) continue;
        LogSum sum[2];
        SUPCLAP_UNROLL
        for (int n = 0; n < 2; ++n) {
          float logit[Shape::kColumns];
          SUPCLAP_UNROLL
          for (int c = 0; c < Shape::kColumns; ++c)
            logit[c] = direction_logit(first + n, p.mode, z[c], support, others[c], b);
          sum[n] = row_log_sum<Shape>(logit, first + n, kInfonce);
        }
        SUPCLAP_UNROLL
        for (int n = 0; n < 2; ++n)
          if (writes) to_slot.put(2 * (first + n), x, sum[n]);
      }
      if (!p.stats || swapped) continue;
      const LogSum sum = row_similarity<Shape>(z, own_tile == other_tile);
      if (writes) to_slot.put(2 * kSimilarity, x, sum);
    }
  }

  template <bool kInfonce>
  __device__ void statistics(int I, int J, float* tiles) const {
    to_logits_in_place(I, J, tiles);
    side_statistics<kInfonce>(I, J, tiles, false);
    if (I != J) side_statistics<kInfonce>(J, I, tiles, true);
  }

  // Merges row i's statistics over all tiles, in their order.
  __device__ LogSum merged(int64_t i, int d) const {
    const float* running = p.running + 2 * d * p.N + i;
    LogSum sum{running[0], running[p.N]};  // of literal rows
    const int64_t plane = int64_t(plan.tiles) * padded();
    const float* from = to.part + 2 * d * plane + i;
    SUPCLAP_UNROLL_BY(8)  // so that 8 loads are under way
    for (int tile = 0; tile < plan.tiles; ++tile, from += padded())
      sum = merge(sum, {from[0], from[plane]}, p.infonce);
    return sum;
  }

  // The power of 2 that float16 weights are multiples of; every block finds it for itself. Ends in
  // a barrier.
  __device__ float find_unit() const {
    if (p.dtype != kFloat16) return 1;
    float largest = 0, gain = 0;
    SUPCLAP_ROLLED
    for (int64_t i = threadIdx.x; i < p.N; i += kThreads) {
      largest = fmaxf(largest, fabsf(omega_of(p, i)));
      gain = fmaxf(gain, weight_gain(p, i));
    }
    largest = block_max(largest, factors);
    return unit_of(largest * block_max(gain, factors));
  }

  // Writes m and omega / (l unit) of the rows of I, and of J off the diagonal, into `factors`. Ends
  // in a barrier.
  __device__ __noinline__ void row_factors(int I, int J, float unit) const {
    SUPCLAP_ROLLED
    for (int e = threadIdx.x; e < (I == J ? 1 : 2) * kDirections * B; e += kThreads) {
      const int x = e % B, d = e / B % kDirections, which = e / (B * kDirections);
      const int64_t i = int64_t(which ? J : I) * B + x;
      float m = 0, f = 0;
      if (i < p.N && direction_used(p, d)) {
        LogSum total{0, 1};
        if (p.infonce) total = WithPositive(merged(i, d), Positive(p, i).logit(p, d)).total;
        m = total.m;
        f = factor_of(p, d, total.l, omega_of(p, i), unit);
      }
      float* at = factors + which * 2 * kDirections * B + d * B + x;
      at[0] = m;
      at[kDirections * B] = f;
    }
    __syncthreads();
  }

  // The owner of a diagonal pair writes what belongs to its rows: losses, `state`, and for later
  // `omega` and `factors`.
  __device__ __noinline__ void finish_rows(int I, float unit, bool gradient) const {
    const int64_t i = int64_t(I) * B + threadIdx.x;
    if (threadIdx.x >= B || i >= p.N) return;
    LogSum negatives[kDirections];
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d)
      negatives[d] = direction_kept(p, d) ? merged(i, d) : LogSum{kHidden, 0};
    finish_row_statistics(p, i, negatives);
    if (!gradient) return;
    p.omega[i] = omega_of(p, i);
    SUPCLAP_ROLLED
    for (int n = 0; n < 2 * kDirections; ++n) p.factors[n * p.N + i] = factors[n * B + threadIdx.x];
    if (i == 0) p.unit[0] = unit;
  }

  // A row of logits as tile_weights reads it.
  struct Row {
    Products at[Shape::kColumns];
  };

  // Puts the pair's weights in place of its logits: W_ij, W_ji (off the diagonal), V_A, V_T
  // symmetrised; and writes partial sums. Ends in a barrier.
  template <bool kInfonce>
  __device__ __noinline__ void weights(int I, int J, float* tiles) const {
    const bool diagonal = I == J;
    const Side own = side(I, factors);
    const Side other = side(J, diagonal ? factors : factors + 2 * kDirections * B);
    tile_weights<Shape>(
        [&](int r) {
          Row z;
          SUPCLAP_UNROLL
          for (int c = 0; c < Shape::kColumns; ++c)
            z.at[c] = read(tiles, Shape::row() + r, Shape::column(c), false);
          return z;
        },
        own, other, logit_bias_2(p), p.mode, kInfonce, diagonal, slot(to.sums, I, J),
        slot(to.sums, J, I), stage,
        [&](int r, float (&w)[4][Shape::kColumns]) {
          SUPCLAP_UNROLL
          for (int n = 0; n < 4; ++n) {
            SUPCLAP_UNROLL
            for (int c = 0; c < Shape::kColumns; ++c)
              if (n < 2 + grams())
                tiles[n * kTile + (Shape::row() + r) * kPitch + Shape::column(c)] = w[n][c];
          }
        });
    __syncthreads();
  }

  // Adds up `sums`, and what `stats` needs of the negatives, from their parts, in the tiles' order.
  __device__ __noinline__ void merge_rows(bool gradient) const {
    const int64_t plane = int64_t(plan.tiles) * padded();
    const int64_t begin = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    SUPCLAP_ROLLED
    for (int64_t e = begin; e < p.N * (kRowSums + 2); e += int64_t(gridDim.x) * kThreads) {
      const int64_t i = e % p.N;
      const int which = int(e / p.N);
      const auto total = [&](const float* part, int first) {
        float sum = 0;
        SUPCLAP_UNROLL_BY(8)
        for (int tile = first; tile < plan.tiles; ++tile) sum += part[tile * padded() + i];
        return sum;
      };
      // A pair adds to the base and bias sums, and to the similarities, of the rows of I alone.
      const int own = int(i / B);
      if (which >= kRowSums) {
        const int n = which - kRowSums;
        if (p.stats)
          p.similarity[n * p.N + i] = total(to.part + (2 * kSimilarity + n) * plane, own);
      } else if (gradient) {
        const bool kept = which < kRhoText || (which < kTileSums && p.mode != kPlain);
        p.sums[which * p.N + i] =
            kept ? total(to.sums + which * plane, which < kRhoText ? own : 0) : 0;
      }
    }
  }
};

}  // namespace supclap::cuda
