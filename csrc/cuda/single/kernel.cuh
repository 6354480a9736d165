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

#include "cuda/single/pairs.cuh"

namespace supclap::cuda {

// The phases take what is in the kernel's parameters from there: from `block`, whose address the
// functions that are not inlined need, the compiler would load it again.

// Phase 0 where there are few pairs: slices of their products.
template <class Scalar, int B>
__device__ __forceinline__ void multiply_slices(const Single<Scalar, B>& block,
                                                const SinglePlan& plan, float* memory) {
  SUPCLAP_ROLLED
  for (int n = blockIdx.x; n < plan.pairs * plan.slices; n += gridDim.x)
    block.similarity(n / plan.slices, n % plan.slices, memory);
}

// Phase 1: the tiles of the block's pairs and their partial statistics; with SigLIP, which has no
// normaliser to wait for, the weights, too.
template <class Scalar, int B>
__device__ __forceinline__ void multiply_pairs(const Single<Scalar, B>& block, const CudaProblem& p,
                                               const SinglePlan& plan, bool gradient, float unit) {
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    int I, J;
    pair_at(pair, plan, I, J);
    float* tiles = block.kept(n % plan.kept);
    if (plan.slices > 1)
      block.gather(pair, I == J, tiles);
    else
      block.similarity(pair, 0, tiles);
    if (p.infonce) {
      block.template statistics<true>(I, J, tiles);
      continue;
    }
    block.template statistics<false>(I, J, tiles);
    if (!gradient) continue;
    block.row_factors(I, J, unit);
    block.template weights<false>(I, J, tiles);
    block.publish(I, J, tiles);
  }
}

// The statistics of the literal rows, which the tiles skip.
template <class Scalar, int B>
__device__ __forceinline__ void add_literal_statistics(const Single<Scalar, B>& block,
                                                       const CudaProblem& p,
                                                       const SingleScratch& to, int literal) {
  SUPCLAP_ROLLED
  for (int n = blockIdx.x; n < literal; n += gridDim.x)
    literal_row_statistics<Scalar>(p, to.literal[n], block.stage);
  if (p.mode != kShared) return;
  SUPCLAP_ROLLED
  for (int64_t j = blockIdx.x; j < p.N; j += gridDim.x)
    literal_column_statistics<Scalar>(p, j, to.literal, literal, block.stage);
}

// Phase 2: the rows' losses; and, unless phase 1 had them, weights in place of the kept logits.
template <class Scalar, int B>
__device__ __forceinline__ void finish_pairs(const Single<Scalar, B>& block, const CudaProblem& p,
                                             const SinglePlan& plan, bool gradient, float unit) {
  const bool at_once = !p.infonce;
  SUPCLAP_ROLLED
  for (int n = 0, pair = blockIdx.x; pair < plan.pairs; ++n, pair += gridDim.x) {
    int I, J;
    pair_at(pair, plan, I, J);
    if (at_once && I != J) continue;
    if (gradient) block.row_factors(I, J, unit);
    if (I == J) block.finish_rows(I, unit, gradient);
    if (gradient && !at_once) {
      block.template weights<true>(I, J, block.kept(n));
      block.publish(I, J, block.kept(n));
    }
    __syncthreads();
  }
}

// The sum of the rows' losses, in order; by one block.
__device__ __forceinline__ void sum_losses(const CudaProblem& p, float* memory, float* loss) {
  float sum = 0;
  SUPCLAP_ROLLED
  for (int64_t i = threadIdx.x; i < p.N; i += kThreads) sum += p.row_loss[i];
  sum = block_sum(sum, memory);
  if (threadIdx.x == 0) *loss = sum;
}

// Phase 3: the items of dT and dA.
template <class Scalar, int B>
__device__ __forceinline__ void multiply_items(const Single<Scalar, B>& block, const CudaProblem& p,
                                               const SinglePlan& plan) {
  const int64_t across = (p.width + B - 1) / B;
  const int64_t items = p.dT || p.dA ? plan.tiles * across : 0;
  SUPCLAP_ROLLED
  for (int64_t n = blockIdx.x; n < items; n += gridDim.x)
    block.item(int(n / across), n % across * B);
}

template <class Scalar, int B>
__global__ void __launch_bounds__(kThreads, 1)
    single_kernel(const __grid_constant__ CudaProblem p, const __grid_constant__ SinglePlan plan,
                  const __grid_constant__ SingleScratch to, float* loss, bool gradient) {
  SUPCLAP_SHARED(shared);
  auto* memory = reinterpret_cast<float*>(shared);
  const Single<Scalar, B> block(p, plan, to, memory);
  const bool sliced = plan.slices > 1;
  block.rows();
  if (!sliced || block.packs()) {
    grid_barrier();
  }
  if (sliced) {
    multiply_slices(block, plan, memory);
    grid_barrier();
  }

  if (blockIdx.x == gridDim.x - 1 && p.mode != kPlain)
    list_literal(p, to.literal, block.literal_count(), reinterpret_cast<int*>(memory));
  const float unit = gradient ? block.find_unit() : 1;
  multiply_pairs(block, p, plan, gradient, unit);
  grid_barrier();

  const int literal = p.mode == kPlain ? 0 : *block.literal_count();
  if (literal > 0) {
    add_literal_statistics(block, p, to, literal);
    grid_barrier();
  }
  finish_pairs(block, p, plan, gradient, unit);
  grid_barrier();

  block.merge_rows(gradient);
  if (gradient && blockIdx.x == 0 && threadIdx.x == 0) *p.counter = 0;
  if (loss && blockIdx.x == 0) sum_losses(p, memory, loss);
  if (!gradient) return;
  multiply_items(block, p, plan);
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
