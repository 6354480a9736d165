// What a block of the single launch does with the pairs of tiles that it owns: it multiplies them,
// keeps them (tiles.cuh) and publishes their weights; and with the items of dT and dA.
#pragma once

#include "cuda/single/products.cuh"
#include "cuda/single/tiles.cuh"

namespace supclap::cuda {

SUPCLAP_HD constexpr int most(int a, int b) { return a > b ? a : b; }

// Shared memory of a block, in floats:
//
//     kept tiles of the block's pairs | stage | factors
//
// In phase 3 the operands of an item take the place of all three.
template <class Scalar, int B>
struct SingleLayout {
  using Similarity = ProductOf<Scalar, B, 4>;
  using Gradient = ProductOf<Scalar, B, 2>;
  static constexpr int kTile = KeptTiles<B>::kTile, kFactors = KeptTiles<B>::kFactors;
  static constexpr int kOperands = 4 * Similarity::kSimilarityOperand * int(sizeof(Scalar)) / 4;
  // Stages for operands of the gradient: on their way, or being multiplied.
  static constexpr int kItemStages = 3;
  static constexpr int kItemStage = 6 * Gradient::kGradientOperand * int(sizeof(Scalar)) / 4;
  static constexpr int kItem = most(kItemStages * kItemStage, Gradient::kParts);

  // A pair's tiles, rounded up to a multiple of 16 bytes.
  __host__ __device__ static int pair(int grams) { return ((2 + grams) * kTile + 3) / 4 * 4; }
  // The stage behind the kept tiles holds one of these at a time: the part of the operands that
  // does not fit where the pair's own tiles will be (operands begin there), the teams' sums, the
  // columns' sums, what the literal rows need.
  __host__ __device__ static int stage(int grams, int64_t width) {
    return most(most(kOperands - pair(grams), Similarity::kParts),
                most(SingleShape<B>::kScratch, int(literal_scratch(width))));
  }
  __host__ __device__ static int size(int grams, int kept, int64_t width) {
    return most(kept * pair(grams) + stage(grams, width) + kFactors, kItem);
  }
};

// Pair n of a plan. Pairs on the diagonal, which cost half, are the first and the last: of the
// blocks that have one pair more than others, the first ones have two of these.
__device__ __forceinline__ void pair_at(int n, const SinglePlan& plan, int& I, int& J) {
  const int first = plan.tiles / 2, last = plan.pairs - plan.tiles + first;
  if (n < first || n >= last) {
    I = J = n < first ? n : n - last + first;
    return;
  }
  n -= first;
  I = 0;
  while (n >= plan.tiles - 1 - I) n -= plan.tiles - 1 - I++;
  J = I + 1 + n;
}

template <class Scalar, int B>
struct Single : KeptTiles<B> {
  using Tiles = KeptTiles<B>;
  using Tiles::p, Tiles::plan, Tiles::to, Tiles::memory, Tiles::stage, Tiles::grams, Tiles::padded;
  using Layout = SingleLayout<Scalar, B>;

  __device__ Single(const CudaProblem& p, const SinglePlan& plan, const SingleScratch& to,
                    float* memory)
      : Tiles{
            p,
            plan,
            to,
            memory,
            memory + plan.kept * Layout::pair(grams_of(p)),
            memory + plan.kept * Layout::pair(grams_of(p)) + Layout::stage(grams_of(p), p.width)} {}

  __device__ float* kept(int n) const { return memory + n * Layout::pair(grams()); }
  __device__ int* literal_count() const { return to.literal + p.N; }

  // Packs the operands, where needed, and writes the geometry of all rows.
  __device__ void rows() const {
    // The last blocks have the first rows, since the first blocks multiply more.
    const int64_t first = int64_t(gridDim.x - 1 - blockIdx.x) * kWarps + threadIdx.x / kWarp;
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

  __device__ bool packs() const { return p.T != p.text || p.A != p.audio; }

  // Product n of a slice.
  __device__ float* slice(int pair, int which, int n) const {
    return to.slices + ((int64_t(pair) * plan.slices + which) * (2 + grams()) + n) * (B * B);
  }

  // Multiplies the tiles S, P, Q, K of a pair, without P on the diagonal; or, where there are
  // slices, one slice of them in memory at `tiles`, and writes it where gather finds it. Ends in a
  // barrier.
  __device__ __noinline__ void similarity(int pair, int which, float* tiles) const {
    using Multiply = typename Layout::Similarity;
    constexpr int kDepth = Multiply::kSimilarityDepth;
    int I, J;
    pair_at(pair, plan, I, J);
    const bool diagonal = I == J;
    const int64_t begin = int64_t(which) * plan.slice;
    const int64_t end = begin + plan.slice < p.width ? begin + plan.slice : p.width;
    auto* operands = reinterpret_cast<Scalar*>(tiles);
    const Scalar* source[4];
    int64_t count[4];
    Scalar* operand[4];
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int tile = n < 2 ? I : J;
      source[n] = static_cast<const Scalar*>(n % 2 ? p.A : p.T) + int64_t(tile) * B * p.width;
      count[n] = p.N - int64_t(tile) * B;
      operand[n] = operands + (diagonal ? n % 2 : n) * Multiply::kSimilarityOperand;
    }
    const auto loads = [&](int n) { return n < 2 || !diagonal; };
    Mover<Scalar, B, kDepth, Multiply::kTransposed> mover[4];
    Multiply product;
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n)
      if (loads(n)) mover[n].load(source[n] + begin, p.width, count[n], end - begin);
    __syncthreads();
    SUPCLAP_ROLLED
    for (int64_t k = begin; k < end; k += kDepth) {
      const int depth = int(end - k < kDepth ? end - k : kDepth);
      SUPCLAP_UNROLL
      for (int n = 0; n < 4; ++n)
        if (loads(n)) mover[n].store(operand[n], Multiply::kSimilarityPitch, depth);
      __syncthreads();
      if (k + kDepth < end) {
        SUPCLAP_UNROLL
        for (int n = 0; n < 4; ++n)
          if (loads(n)) mover[n].load(source[n] + k + kDepth, p.width, count[n], end - k - kDepth);
      }
      product.similarity(operand, grams(), diagonal, depth);
      __syncthreads();
    }
    SUPCLAP_UNROLL
    for (int n = 0; n < 4; ++n) {
      if ((n == 1 && diagonal) || n >= 2 + grams()) continue;
      float* tile = plan.slices > 1 ? slice(pair, which, n) : tiles + n * Tiles::kTile;
      const int pitch = plan.slices > 1 ? B : Tiles::kPitch;
      sum_teams<B>(product, n, tiles + Layout::pair(grams()),
                   [&](int i, int j, float value) { tile[i * pitch + j] = value; });
    }
  }

  // Adds up the tiles of a pair from its slices, in their order. Ends in a barrier.
  __device__ void gather(int pair, bool diagonal, float* tiles) const {
    __syncthreads();
    SUPCLAP_ROLLED
    for (int n = 0; n < 2 + grams(); ++n) {
      if (n == 1 && diagonal) continue;
      SUPCLAP_ROLLED
      for (int e = threadIdx.x; e < B * B; e += kThreads) {
        float sum = 0;
        SUPCLAP_UNROLL_BY(16)
        for (int which = 0; which < plan.slices; ++which) sum += slice(pair, which, n)[e];
        tiles[n * Tiles::kTile + e / B * Tiles::kPitch + e % B] = sum;
      }
    }
    __syncthreads();
  }

  __device__ Scalar* matrix(int n) const {
    return static_cast<Scalar*>(to.matrices) + n * padded() * padded();
  }

  // Writes a pair's weights from its tiles to `matrices`. The tiles are free again behind the next
  // barrier.
  __device__ void publish(int I, int J, const float* tiles) const {
    const bool diagonal = I == J;
    SUPCLAP_ROLLED
    for (int e = threadIdx.x; e < B * B; e += kThreads) {
      const int x = e / B, y = e % B;
      const int straight = x * Tiles::kPitch + y, swapped = y * Tiles::kPitch + x;
      const int64_t here = (int64_t(I) * B + x) * padded() + int64_t(J) * B + y;
      const int64_t there = (int64_t(J) * B + x) * padded() + int64_t(I) * B + y;
      const auto put = [&](int n, int64_t at, float value) {
        matrix(n)[at] = narrow<Scalar>(value);
      };
      const float* back = tiles + Tiles::kTile;  // W_ji
      put(1, here, tiles[straight]);
      put(0, here, diagonal ? tiles[swapped] : back[straight]);
      if (!diagonal) {
        put(1, there, back[swapped]);
        put(0, there, tiles[swapped]);
      }
      SUPCLAP_ROLLED
      for (int n = 2; n < 2 + grams(); ++n) {
        put(n, here, tiles[n * Tiles::kTile + straight]);
        if (!diagonal) put(n, there, tiles[n * Tiles::kTile + swapped]);
      }
    }
  }

  // Multiplies rows of tile I and columns [d, d + B) of dT and dA. Ends in a barrier.
  __device__ void item(int I, int64_t d) const {
    using Multiply = typename Layout::Gradient;
    constexpr int kDepth = Multiply::kGradientDepth, kPitch = Multiply::kGradientPitch;
    const auto operand = [&](int step, int n) {
      auto* stage =
          reinterpret_cast<Scalar*>(memory + step % Layout::kItemStages * Layout::kItemStage);
      return stage + n * Multiply::kGradientOperand;
    };
    const auto* T = static_cast<const Scalar*>(p.T);
    const auto* A = static_cast<const Scalar*>(p.A);
    // Whether matrix n exists and its gradient is wanted: matrices 0 and 3 are for dT, 1 and 2 for
    // dA.
    const auto used = [&](int n) { return n < 2 + grams() && (n == 0 || n == 3 ? p.dT : p.dA); };
    const auto load = [&](int step) {
      const int64_t j = int64_t(step) * kDepth;
      if (j < p.N) {
        SUPCLAP_UNROLL
        for (int n = 0; n < 4; ++n)
          if (used(n))
            copy_tile<kDepth, B>(operand(step, n), kPitch,
                                 matrix(n) + j * padded() + int64_t(I) * B, padded(), padded() - j,
                                 B);
        const int64_t at = j * p.width + d, columns = p.width - d;
        copy_tile<kDepth, B>(operand(step, 4), kPitch, T + at, p.width, p.N - j, columns);
        copy_tile<kDepth, B>(operand(step, 5), kPitch, A + at, p.width, p.N - j, columns);
      }
      copies_commit();
    };
    Multiply product;
    SUPCLAP_ROLLED
    for (int step = 0; step < Layout::kItemStages - 1; ++step) load(step);
    SUPCLAP_ROLLED
    for (int step = 0; int64_t(step) * kDepth < p.N; ++step) {
      copies_wait<Layout::kItemStages - 2>();
      __syncthreads();
      load(step + Layout::kItemStages - 1);  // in place of the last step's operands
      if (used(0)) product.gradient(0, operand(step, 0), operand(step, 5));
      if (used(1)) product.gradient(1, operand(step, 1), operand(step, 4));
      if (used(2)) product.gradient(1, operand(step, 2), operand(step, 5));
      if (used(3)) product.gradient(0, operand(step, 3), operand(step, 4));
    }
    __syncthreads();
    SUPCLAP_UNROLL
    for (int tower = 0; tower < 2; ++tower) {
      float* out = tower ? p.dA : p.dT;
      if (!out) continue;
      sum_teams<B>(product, tower, memory, [&](int x, int y, float value) {
        const int64_t i = int64_t(I) * B + x, column = d + y;
        if (i < p.N && column < p.width) out[i * p.width + column] = value;
      });
    }
  }
};

}  // namespace supclap::cuda
