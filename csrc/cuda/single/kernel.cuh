// The whole loss in one cooperative launch, for batches whose similarity tiles fit on the chip.
//
//   0  rows      operands packed where needed, geometry of the rows
//      slices    where there are few pairs, each is multiplied by several blocks (behind a barrier
//                if operands were packed)
//   -- grid barrier
//   1  pairs     a block owns pairs of B x B tiles (I, J), I <= J: S, P, Q, K multiplied out and
//                kept in shared memory; partial log-sum-exps. SigLIP goes on to 2 at once.
//   -- grid barrier (with literal rows: their statistics, and another one)
//   2  pairs     log-sum-exps merged, the rows' losses; the kept logits become weights
//   -- grid barrier
//   3  items     another ownership, B rows x B columns of D: dT, dA = sums of weighted rows
//      and the loss (with literal rows: another barrier, their gradients)
//
// The weights pass from owner to owner through `matrices`, (2 + grams) N^2 numbers of the
// embeddings' dtype that stay in the L2 cache: a tile's own partial gradients would be D / B times
// as many. Everything is added in a fixed order: results do not depend on the number of blocks.
#pragma once

#include "cuda/single/tiles.cuh"
#include "cuda/single/products.cuh"

namespace supclap::cuda {

SUPCLAP_HD constexpr int most(int a, int b) { return a > b ? a : b; }

// Shared memory of a block, in floats from the start.
template <class Scalar, int B>
struct SingleLayout {
  using Similarity = ProductOf<Scalar, B, 4>;
  using Gradient = ProductOf<Scalar, B, 2>;
  static constexpr int kTile = KeptTiles<B>::kTile, kFactors = KeptTiles<B>::kFactors;
  static constexpr int kOperands = 4 * Similarity::kSimilarityOperand * int(sizeof(Scalar)) / 4;
  // Operands of the gradient on their way, or being multiplied.
  static constexpr int kItemStages = 3;
  static constexpr int kItemStage = 6 * Gradient::kGradientOperand * int(sizeof(Scalar)) / 4;
  static constexpr int kItem = most(kItemStages * kItemStage, Gradient::kParts);

  // Up to a multiple of 16 bytes.
  __host__ __device__ static int pair(int grams) { return ((2 + grams) * kTile + 3) / 4 * 4; }
  // Behind the kept tiles: operands, which begin where a pair's tiles will be, so that what follows
  // has no tiles yet; the teams' sums, room to reduce columns in, what the literal rows need.
  __host__ __device__ static int stage(int grams, int64_t width) {
    return most(most(kOperands - pair(grams), Similarity::kParts),
                most(SingleShape<B>::kScratch, int(literal_scratch(width))));
  }
  __host__ __device__ static int size(int grams, int kept, int64_t width) {
    return most(kept * pair(grams) + stage(grams, width) + kFactors, kItem);
  }
};

// Pair n of a plan. Those on the diagonal, which cost half, are the first and the last: of the
// blocks that have one more than others, the first ones have two of these.
__device__ __forceinline__ void pair_at(int n, const SinglePlan& plan, int& I, int& J) {
  const int first = plan.tiles / 2, last = plan.pairs - plan.tiles + first;
  if (n < first || n >= last) {
    I = J = n < first ? n : n - last + first;
    return;
  }
  n -= first, I = 0;
  while (n >= plan.tiles - 1 - I) n -= plan.tiles - 1 - I++;
  J = I + 1 + n;
}

template <class Scalar, int B>
struct Single : KeptTiles<B> {
  using Tiles = KeptTiles<B>;
  using Tiles::p, Tiles::plan, Tiles::to, Tiles::memory, Tiles::stage, Tiles::grams, Tiles::padded;
  using Layout = SingleLayout<Scalar, B>;

  __device__ Single(const Problem& p, const SinglePlan& plan, const SingleScratch& to,
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

  // Operands and geometry of all rows.
  __device__ void rows() const {
    // The last blocks begin: the first ones multiply.
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

  // Products n of a slice.
  __device__ float* slice(int pair, int which, int n) const {
    return to.slices + ((int64_t(pair) * plan.slices + which) * (2 + grams()) + n) * (B * B);
  }

  // The tiles S, P, Q, K of a pair; no P on the diagonal. Or one slice of them, in memory at
  // `tiles`, to where gather finds it. Ends in a barrier.
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

  // The tiles of a pair from its slices, in their order. Ends in a barrier.
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

  // A pair's weights from its tiles to `matrices`. They are free again behind the next barrier.
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
      put(1, here, tiles[straight]), put(0, here, diagonal ? tiles[swapped] : back[straight]);
      if (!diagonal) put(1, there, back[swapped]), put(0, there, tiles[swapped]);
      SUPCLAP_ROLLED
      for (int n = 2; n < 2 + grams(); ++n) {
        put(n, here, tiles[n * Tiles::kTile + straight]);
        if (!diagonal) put(n, there, tiles[n * Tiles::kTile + swapped]);
      }
    }
  }

  // Rows of tile I and columns [d, d + B) of dT and dA. Ends in a barrier.
  __device__ void item(int I, int64_t d) const {
    using Multiply = typename Layout::Gradient;
    constexpr int kDepth = Multiply::kGradientDepth, kPitch = Multiply::kGradientPitch;
    constexpr int kStages = Layout::kItemStages;
    const auto operand = [&](int step, int n) {
      auto* stage = reinterpret_cast<Scalar*>(memory + step % kStages * Layout::kItemStage);
      return stage + n * Multiply::kGradientOperand;
    };
    const auto* T = static_cast<const Scalar*>(p.T);
    const auto* A = static_cast<const Scalar*>(p.A);
    // Matrix n, of which tower's rows, for which gradient (0: dT, 1: dA).
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
    for (int step = 0; step < kStages - 1; ++step) load(step);
    SUPCLAP_ROLLED
    for (int step = 0; int64_t(step) * kDepth < p.N; ++step) {
      copies_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);  // to where the last step's are
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

template <class Scalar, int B>
__global__ void __launch_bounds__(kThreads, 1)
    single_kernel(const __grid_constant__ Problem p, const __grid_constant__ SinglePlan plan,
                  const __grid_constant__ SingleScratch to, float* loss, bool gradient) {
  SUPCLAP_SHARED(shared);
  auto* memory = reinterpret_cast<float*>(shared);
  const Single<Scalar, B> work(p, plan, to, memory);
  const bool at_once = !p.infonce;  // no normaliser: nothing to wait for
  const bool sliced = plan.slices > 1;
  work.rows();
  if (!sliced || work.packs()) {
    grid_barrier();
  }
  if (sliced) {
    SUPCLAP_ROLLED
    for (int n = blockIdx.x; n < plan.pairs * plan.slices; n += gridDim.x)
      work.similarity(n / plan.slices, n % plan.slices, memory);
    grid_barrier();
  }

  if (blockIdx.x == gridDim.x - 1 && p.mode != kPlain)
    list_literal(p, to.literal, work.literal_count(), reinterpret_cast<int*>(memory));
  const float unit = gradient ? work.find_unit() : 1;
  int I, J;
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    pair_at(pair, plan, I, J);
    float* tiles = work.kept(n % plan.kept);
    if (sliced)
      work.gather(pair, I == J, tiles);
    else
      work.similarity(pair, 0, tiles);
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

  const int literal = p.mode == kPlain ? 0 : *work.literal_count();
  if (literal > 0) {
    SUPCLAP_ROLLED
    for (int n = blockIdx.x; n < literal; n += gridDim.x)
      literal_row_statistics<Scalar>(p, to.literal[n], work.stage);
    if (p.mode == kShared) {
      SUPCLAP_ROLLED
      for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
        literal_column_statistics<Scalar>(p, j, to.literal, literal, work.stage);
    }
    grid_barrier();
  }
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    pair_at(pair, plan, I, J);
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
  if (literal == 0) return;
  grid_barrier();
  SUPCLAP_ROLLED
  for (int n = blockIdx.x; n < literal; n += gridDim.x)
    literal_row_gradient<Scalar>(p, to.literal[n], memory);
  grid_barrier();
  SUPCLAP_ROLLED
  for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
    literal_column_gradient<Scalar>(p, j, to.literal, literal, memory);
}

}  // namespace supclap::cuda
