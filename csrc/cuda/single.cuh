// The whole loss in one cooperative launch, for batches whose similarity tiles fit on the chip.
//
//   0  rows      operands packed where needed, geometry of the rows
//   -- grid barrier
//   1  pairs     a block owns pairs of B x B tiles (I, J), I <= J: S, P, Q, K multiplied out and
//                kept in shared memory; partial log-sum-exps. SigLIP goes on to 2 at once.
//   -- grid barrier (with far rows: their statistics, and another one)
//   2  pairs     log-sum-exps merged, the rows' losses; the kept logits become weights
//   -- grid barrier
//   3  items     another ownership, B rows x B columns of D: dT, dA = sums of weighted rows
//      and the loss (with far rows: another barrier, their gradients)
//
// The weights pass from owner to owner through `matrices`, (2 + grams) N^2 numbers of the
// embeddings' dtype that stay in the L2 cache: a tile's own partial gradients would be D / B times
// as many. Everything is added in a fixed order: results do not depend on the number of blocks.
#pragma once

#include "cuda/far.cuh"
#include "cuda/products.cuh"
#include "cuda/tile.cuh"

namespace supclap::cuda {

// How a warp's lanes share a tile of B x B in shared memory.
template <int B>
using SingleShape = PatchShape<(B == 16 ? 1 : B / 8), (B == 64 ? 2 : 1), (B == 16 ? 16 : kWarp),
                               false, 1>;

// What is done with kept tiles, whatever the embeddings' dtype. Methods that are not inlined are
// compiled once for all kernels.
template <int B>
struct KeptTiles {
  using Shape = SingleShape<B>;
  static_assert(Shape::kBlockRows == B && Shape::kBlockColumns == B);
  static constexpr int kPitch = B + 1;  // rows and columns of a tile without bank conflicts
  static constexpr int kTile = B * kPitch;
  static constexpr int kFactors = 2 * 2 * kDirections * B;  // of rows I and J

  const Problem& p;
  const SinglePlan& plan;
  const SingleScratch& to;
  float* memory;  // all of the block's
  float* stage;   // what is not kept: operands, then room to reduce columns in
  float* factors; // [2 sides, 2 kDirections, B]

  __device__ int64_t padded() const { return int64_t(plan.tiles) * B; }
  __device__ int grams() const { return grams_of(p); }

  __device__ Side side(int tile, const float* factors) const {
    const int64_t first = int64_t(tile) * B;
    return {p.state + kStateRows * p.N + first,
            factors,
            p.N,
            B,
            p.ids ? p.ids + first : nullptr,
            first,
            int(p.N - first < B ? p.N - first : B)};
  }

  // Where tile `own` leaves its partial results over tile `other`.
  __device__ Slot slot(float* partial, int own, int other) const {
    return {partial + int64_t(other) * padded() + int64_t(own) * B,
            int64_t(plan.tiles) * padded()};
  }

  // From inner products to logits, in place; pairs that do not take part are hidden. On the diagonal
  // P becomes S^T. Ends in a barrier.
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
      const Products z = to_logits({at[0], diagonal ? 0 : at[kTile], grams() > 0 ? at[2 * kTile] : 0,
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
  __device__ Products read(const float* tiles, int x, int y, bool turned) const {
    const float* at = tiles + (turned ? y * kPitch + x : x * kPitch + y);
    const Products z{at[0], at[kTile], grams() > 0 ? at[2 * kTile] : 0,
                     grams() > 1 ? at[3 * kTile] : 0};
    return turned ? exchanged(z) : z;
  }

  // Partial (m, l) of the rows of tile `own` over those of tile `other`; `turned`: own is J.
  template <bool kInfonce>
  __device__ __noinline__ void side_statistics(int own_tile, int other_tile, const float* tiles,
                                               bool turned) const {
    constexpr int kC = Shape::kColumns;
    const Side own = side(own_tile, nullptr), other = side(other_tile, nullptr);
    const Slot to_slot = slot(to.part, own_tile, other_tile);
    const float b = logit_bias_2(p);
    const bool writes = threadIdx.x % Shape::kLanes == 0;
    Support others[kC];
    SUPCLAP_UNROLL
    for (int c = 0; c < kC; ++c) others[c] = Support(other, Shape::column(c), p.mode);
    SUPCLAP_ROLLED
    for (int r = 0; r < Shape::kRows; ++r) {
      const int x = Shape::row() + r;
      const Support support(own, x, p.mode);
      Products z[kC];
      SUPCLAP_UNROLL
      for (int c = 0; c < kC; ++c) z[c] = read(tiles, x, Shape::column(c), turned);
      const auto put = [&](int plane, float first, float second) {
        if (!writes || x >= own.count) return;
        to_slot.at[plane * to_slot.plane + x] = first;
        to_slot.at[(plane + 1) * to_slot.plane + x] = second;
      };
      SUPCLAP_ROLLED
      for (int d = 0; d < kDirections; ++d) {
        if (!uses(p.mode, d)) continue;
        float logit[kC], m = kHidden, l = 0;
        SUPCLAP_UNROLL
        for (int c = 0; c < kC; ++c) {
          logit[c] = direction_logit(d, p.mode, z[c], support, others[c], b);
          m = fmaxf(m, logit[c]);
        }
        m = warp_max<Shape::kLanes>(m);
        SUPCLAP_UNROLL
        for (int c = 0; c < kC; ++c) l += summand(logit[c], m, d, kInfonce);
        put(2 * d, m, warp_sum<Shape::kLanes>(l));
      }
      if (!p.stats || turned) continue;
      float sum = 0, pairs = 0;
      SUPCLAP_UNROLL
      for (int c = 0; c < kC; ++c) {
        if (z[c].S <= 0.5f * kHidden) continue;
        const bool diagonal = own_tile == other_tile;
        sum += z[c].S + (diagonal ? 0 : z[c].P), pairs += diagonal ? 1 : 2;
      }
      put(kSimilarity, warp_sum<Shape::kLanes>(sum), warp_sum<Shape::kLanes>(pairs));
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
    LogSum sum{running[0], running[p.N]};  // of far rows
    const int64_t plane = int64_t(plan.tiles) * padded();
    const float* from = to.part + 2 * d * plane + i;
    SUPCLAP_UNROLL_BY(8)  // that many loads at once
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

  // m and omega / (l unit) of the rows of I and J into `factors`. Ends in a barrier.
  __device__ __noinline__ void row_factors(int I, int J, float unit) const {
    SUPCLAP_ROLLED
    for (int e = threadIdx.x; e < 2 * kDirections * B; e += kThreads) {
      const int x = e % B, d = e / B % kDirections, which = e / (B * kDirections);
      const int64_t i = int64_t(which ? J : I) * B + x;
      float m = 0, f = 0;
      if (i < p.N && direction_used(p, d)) {
        LogSum total{0, 1};
        if (p.infonce) total = WithPositive(merged(i, d), Positive(p, i).logit(p, d)).total;
        m = total.m, f = factor_of(p, d, total.l, omega_of(p, i), unit);
      }
      float* at = factors + which * 2 * kDirections * B + d * B + x;
      at[0] = m, at[kDirections * B] = f;
    }
    __syncthreads();
  }

  // What the owner of a diagonal pair leaves of its rows: losses, `state`, and for later `omega`
  // and `factors`.
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
    for (int n = 0; n < 2 * kDirections; ++n)
      p.factors[n * p.N + i] = factors[n * B + threadIdx.x];
    if (i == 0) p.unit[0] = unit;
  }

  // A row of logits as tile_weights reads it.
  struct Row {
    Products at[Shape::kColumns];
  };

  // The pair's weights in place of its logits: W_ij, W_ji (off the diagonal), V_A, V_T symmetrised;
  // and partial sums. Ends in a barrier.
  template <bool kInfonce>
  __device__ __noinline__ void weights(int I, int J, float* tiles) const {
    const bool diagonal = I == J;
    const Side own = side(I, factors), other = side(J, factors + 2 * kDirections * B);
    tile_weights<Shape>(
        [&](int r) {
          Row z;
          SUPCLAP_UNROLL
          for (int c = 0; c < Shape::kColumns; ++c)
            z.at[c] = read(tiles, Shape::row() + r, Shape::column(c), false);
          return z;
        },
        own, other, logit_bias_2(p), p.mode, kInfonce, diagonal, slot(to.sums, I, J),
        slot(to.sums, J, I), stage, [&](int r, float(&w)[4][Shape::kColumns]) {
          SUPCLAP_UNROLL
          for (int n = 0; n < 4; ++n)
            SUPCLAP_UNROLL
            for (int c = 0; c < Shape::kColumns; ++c)
              if (n < 2 + grams())
                tiles[n * kTile + (Shape::row() + r) * kPitch + Shape::column(c)] = w[n][c];
        });
    __syncthreads();
  }

  // `sums`, and what `stats` needs of the negatives, from their parts; in the tiles' order.
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
      // A pair's base and bias sums, and its similarities, are with the rows of I alone.
      const int own = int(i / B);
      if (which >= kRowSums) {
        const int n = which - kRowSums;
        if (p.stats) p.similarity[n * p.N + i] = total(to.part + (kSimilarity + n) * plane, own);
      } else if (gradient) {
        const bool kept = which < kRhoText || (which < kTileSums && p.mode != kNone);
        p.sums[which * p.N + i] = kept ? total(to.sums + which * plane, which < kRhoText ? own : 0) : 0;
      }
    }
  }
};

SUPCLAP_HD constexpr int most(int a, int b) { return a > b ? a : b; }

// Shared memory of a block, in floats from the start.
template <class Scalar, int B>
struct SingleLayout {
  using Similarity = ProductOf<Scalar, B, 4>;
  using Gradient = ProductOf<Scalar, B, 2>;
  static constexpr int kTile = KeptTiles<B>::kTile, kFactors = KeptTiles<B>::kFactors;
  // What a pair needs besides its tiles: operands, then room to reduce columns in.
  static constexpr int kStage =
      most(4 * Similarity::kSimilarityOperand * int(sizeof(Scalar)) / 4, SingleShape<B>::kScratch);
  static constexpr int kItem =
      6 * Gradient::kGradientOperand * int(sizeof(Scalar)) / 4 + 2 * kTile;

  // Up to a multiple of 16 bytes.
  __host__ __device__ static int pair(int grams) { return ((2 + grams) * kTile + 3) / 4 * 4; }
  // The far rows work beside the kept tiles.
  __host__ __device__ static int stage(int64_t width) { return most(kStage, int(far_scratch(width))); }
  __host__ __device__ static int size(int grams, int kept, int64_t width) {
    return most(kept * pair(grams) + stage(width) + kFactors, kItem);
  }
};

__device__ __forceinline__ void unrank(int pair, int tiles, int& I, int& J) {
  I = 0;
  while (pair >= tiles - I) pair -= tiles - I++;
  J = I + pair;
}

template <class Scalar, int B>
struct Single : KeptTiles<B> {
  using Tiles = KeptTiles<B>;
  using Tiles::p, Tiles::plan, Tiles::to, Tiles::memory, Tiles::stage, Tiles::grams, Tiles::padded;
  using Layout = SingleLayout<Scalar, B>;

  __device__ Single(const Problem& p, const SinglePlan& plan, const SingleScratch& to,
                    float* memory)
      : Tiles{p, plan, to, memory, memory + plan.kept * Layout::pair(grams_of(p)),
              memory + plan.kept * Layout::pair(grams_of(p)) + Layout::stage(p.width)} {}

  __device__ float* kept(int n) const { return memory + n * Layout::pair(grams()); }
  __device__ int* far_count() const { return to.far + p.N; }

  // Operands and geometry of all rows.
  __device__ void rows() const {
    const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    SUPCLAP_ROLLED
    for (int64_t i = first; i < p.N; i += int64_t(gridDim.x) * kWarps) {
      if (p.T != p.text)
        pack_row(p, static_cast<const Scalar*>(p.text) + i * p.text_n, p.text_d,
                 static_cast<Scalar*>(p.T) + i * p.width);
      if (p.A != p.audio)
        pack_row(p, static_cast<const Scalar*>(p.audio) + i * p.audio_n, p.audio_d,
                 static_cast<Scalar*>(p.A) + i * p.width);
      __syncwarp();
      prepare_row<Scalar>(p, i);
    }
  }

  // The tiles S, P, Q, K of a pair; no P on the diagonal. Ends in a barrier.
  __device__ void similarity(int I, int J, float* tiles) const {
    using Multiply = typename Layout::Similarity;
    constexpr int kDepth = Multiply::kSimilarityDepth;
    const bool diagonal = I == J;
    auto* operands = reinterpret_cast<Scalar*>(stage);
    const Scalar* source[4];
    int64_t count[4];
    const Scalar* operand[4];
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int tile = n < 2 ? I : J;
      source[n] = static_cast<const Scalar*>(n % 2 ? p.A : p.T) + int64_t(tile) * B * p.width;
      count[n] = p.N - int64_t(tile) * B;
      operand[n] = operands + n * Multiply::kSimilarityOperand;
    }
    Mover<Scalar, B, kDepth> mover[4];
    Multiply product;
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n) mover[n].load(source[n], p.width, count[n], p.width);
    SUPCLAP_ROLLED
    for (int64_t k = 0; k < p.width; k += kDepth) {
      SUPCLAP_UNROLL
      for (int n = 0; n < 4; ++n)
        mover[n].template store<Multiply::kTransposed>(const_cast<Scalar*>(operand[n]),
                                                       Multiply::kSimilarityPitch);
      __syncthreads();
      if (k + kDepth < p.width)
        SUPCLAP_UNROLL
        for (int n = 0; n < 4; ++n)
          mover[n].load(source[n] + k + kDepth, p.width, count[n], p.width - k - kDepth);
      product.similarity(operand, grams(), diagonal);
      __syncthreads();
    }
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n) {
      if ((n == 1 && diagonal) || n >= 2 + grams()) continue;
      float* tile = tiles + n * Tiles::kTile;
      product.write(n, [&](int i, int j, float value, bool first) {
        float& at = tile[i * Tiles::kPitch + j];
        at = first ? value : at + value;
      });
    }
  }

  __device__ Scalar* matrix(int n) const {
    return static_cast<Scalar*>(to.matrices) + n * padded() * padded();
  }

  // A pair's weights from its tiles to `matrices`. Ends in a barrier.
  __device__ void publish(int I, int J, const float* tiles) const {
    const bool diagonal = I == J;
    SUPCLAP_ROLLED
    for (int e = threadIdx.x; e < B * B; e += kThreads) {
      const int x = e / B, y = e % B;
      const int straight = x * Tiles::kPitch + y, turned = y * Tiles::kPitch + x;
      const int64_t here = (int64_t(I) * B + x) * padded() + int64_t(J) * B + y;
      const int64_t there = (int64_t(J) * B + x) * padded() + int64_t(I) * B + y;
      const auto put = [&](int n, int64_t at, float value) {
        matrix(n)[at] = narrow<Scalar>(value);
      };
      const float* back = tiles + Tiles::kTile;  // W_ji
      put(1, here, tiles[straight]), put(0, here, diagonal ? tiles[turned] : back[straight]);
      if (!diagonal) put(1, there, back[turned]), put(0, there, tiles[turned]);
      SUPCLAP_ROLLED
      for (int n = 2; n < 2 + grams(); ++n) {
        put(n, here, tiles[n * Tiles::kTile + straight]);
        if (!diagonal) put(n, there, tiles[n * Tiles::kTile + turned]);
      }
    }
    __syncthreads();
  }

  // Rows of tile I and columns [d, d + B) of dT and dA. Ends in a barrier.
  __device__ void item(int I, int64_t d) const {
    using Multiply = typename Layout::Gradient;
    constexpr int kDepth = Multiply::kGradientDepth, kPitch = Multiply::kGradientPitch;
    auto* operands = reinterpret_cast<Scalar*>(memory);
    const auto operand = [&](int n) { return operands + n * Multiply::kGradientOperand; };
    const auto* T = static_cast<const Scalar*>(p.T);
    const auto* A = static_cast<const Scalar*>(p.A);
    // Matrix n, of which tower's rows, for which gradient (0: dT, 1: dA).
    const auto used = [&](int n) { return n < 2 + grams() && (n == 0 || n == 3 ? p.dT : p.dA); };
    Mover<Scalar, kDepth, B> weights[4], rows[2];
    const auto load = [&](int64_t j) {
      SUPCLAP_UNROLL
      for (int n = 0; n < 4; ++n)
        if (used(n)) weights[n].load(matrix(n) + j * padded() + int64_t(I) * B, padded(), padded() - j, B);
      rows[0].load(T + j * p.width + d, p.width, p.N - j, p.width - d);
      rows[1].load(A + j * p.width + d, p.width, p.N - j, p.width - d);
    };
    Multiply product;
    load(0);
    SUPCLAP_ROLLED
    for (int64_t j = 0; j < p.N; j += kDepth) {
      SUPCLAP_UNROLL
      for (int n = 0; n < 4; ++n)
        if (used(n)) weights[n].template store<false>(operand(n), kPitch);
      SUPCLAP_UNROLL
      for (int n = 0; n < 2; ++n) rows[n].template store<false>(operand(4 + n), kPitch);
      __syncthreads();
      if (j + kDepth < p.N) load(j + kDepth);
      if (used(0)) product.gradient(0, operand(0), operand(5));
      if (used(1)) product.gradient(1, operand(1), operand(4));
      if (used(2)) product.gradient(1, operand(2), operand(5));
      if (used(3)) product.gradient(0, operand(3), operand(4));
      __syncthreads();
    }
    float* sums = memory + Layout::kItem - 2 * Tiles::kTile;
    SUPCLAP_UNROLL
    for (int tower = 0; tower < 2; ++tower) {
      float* out = tower ? p.dA : p.dT;
      float* tile = sums + tower * Tiles::kTile;
      if (!out) continue;
      product.write(tower, [&](int i, int j, float value, bool first) {
        float& at = tile[i * Tiles::kPitch + j];
        at = first ? value : at + value;
      });
      SUPCLAP_ROLLED
      for (int e = threadIdx.x; e < B * B; e += kThreads) {
        const int64_t i = int64_t(I) * B + e / B, column = d + e % B;
        if (i < p.N && column < p.width)
          out[i * p.width + column] = tile[e / B * Tiles::kPitch + e % B];
      }
    }
    __syncthreads();
  }
};

template <class Scalar, int B>
__global__ void __launch_bounds__(kThreads, 1)
    single_kernel(const __grid_constant__ Problem p, const __grid_constant__ SinglePlan plan,
                  const __grid_constant__ SingleScratch to, float* loss, bool gradient) {
  SUPCLAP_SHARED(shared);
  auto* memory = reinterpret_cast<float*>(shared);
  const Single<Scalar, B> work(p, plan, to, memory);
  const bool at_once = !p.infonce;  // no normaliser: nothing to wait for
  work.rows();
  grid_barrier();

  if (blockIdx.x == gridDim.x - 1 && p.mode != kNone)
    list_far(p, to.far, work.far_count(), reinterpret_cast<int*>(memory));
  const float unit = gradient ? work.find_unit() : 1;
  int I, J;
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    unrank(pair, plan.tiles, I, J);
    float* tiles = work.kept(n % plan.kept);
    work.similarity(I, J, tiles);
    if (!at_once) {
      work.template statistics<true>(I, J, tiles);
      continue;
    }
    work.template statistics<false>(I, J, tiles);
    if (!gradient) continue;
    work.row_factors(I, J, unit);
    work.template weights<false>(I, J, tiles);
    work.publish(I, J, tiles);
  }
  grid_barrier();

  const int far = p.mode == kNone ? 0 : *work.far_count();
  if (far > 0) {
    SUPCLAP_ROLLED
    for (int n = blockIdx.x; n < far; n += gridDim.x)
      far_row_statistics<Scalar>(p, to.far[n], work.stage);
    if (p.mode == kShared)
      SUPCLAP_ROLLED
      for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
        far_column_statistics<Scalar>(p, j, to.far, far, work.stage);
    grid_barrier();
  }
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    unrank(pair, plan.tiles, I, J);
    if (at_once && I != J) continue;
    if (gradient) work.row_factors(I, J, unit);
    if (I == J) work.finish_rows(I, unit, gradient);
    if (gradient && !at_once) {
      work.template weights<true>(I, J, work.kept(n));
      work.publish(I, J, work.kept(n));
    }
    __syncthreads();
  }
  grid_barrier();

  work.merge_rows(gradient);
  if (gradient && blockIdx.x == 0 && threadIdx.x == 0) *p.counter = 0;
  if (loss && blockIdx.x == 0) {
    float sum = 0;
    SUPCLAP_ROLLED
    for (int64_t i = threadIdx.x; i < p.N; i += kThreads) sum += p.row_loss[i];
    sum = block_sum(sum, memory);
    if (threadIdx.x == 0) *loss = sum;
  }
  if (!gradient) return;
  const int64_t slices = (p.width + B - 1) / B, items = p.dT || p.dA ? plan.tiles * slices : 0;
  SUPCLAP_ROLLED
  for (int64_t n = blockIdx.x; n < items; n += gridDim.x)
    work.item(int(n / slices), n % slices * B);
  if (far == 0) return;
  grid_barrier();
  SUPCLAP_ROLLED
  for (int n = blockIdx.x; n < far; n += gridDim.x) far_row_gradient<Scalar>(p, to.far[n], memory);
  grid_barrier();
  SUPCLAP_ROLLED
  for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
    far_column_gradient<Scalar>(p, j, to.far, far, memory);
}

}  // namespace supclap::cuda
