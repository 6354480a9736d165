// Rows with a small gap: their support vectors are taken literally, in float32 on the CUDA cores.
//
// The tiles skip these rows (kOffset). Here s = x + c (y_own - x) is built from the rows and
// multiplied out: for kSupportRows with X, Y = T, A and, in a mirror, for kOtherRows with X, Y = A,
// T. A block has one row (or one compared row) at a time; its warps take turns with the products.
#pragma once

#include "cuda/rows/finish.cuh"

namespace supclap::cuda {

// One direction of support vectors: rows X move towards Y and are compared with Y.
template <class Scalar>
struct LiteralSide {
  const Scalar *X, *Y;
  float *dX, *dY;  // or null
  int direction, inverse, support;

  __device__ LiteralSide(const CudaProblem& p, int direction) : direction(direction) {
    const bool text = direction == kSupportRows;
    X = static_cast<const Scalar*>(text ? p.T : p.A);
    Y = static_cast<const Scalar*>(text ? p.A : p.T);
    dX = text ? p.dT : p.dA;
    dY = text ? p.dA : p.dT;
    inverse = text ? kTextInverse : kAudioInverse;
    support = text ? kSupportText : kSupportAudio;
  }
};

// How many such directions a mode has: kSupportRows, and kOtherRows for a mirror.
__device__ __forceinline__ int literal_sides(const CudaProblem& p) {
  return p.mode == kMirror ? 2 : 1;
}

constexpr int kLiteralChunk = 64;  // of the other rows at a time

// Shared memory of a block, in floats: two rows, and one number for each thread.
inline __host__ __device__ size_t literal_scratch(int64_t width) { return 2 * width + kThreads; }
struct LiteralScratch {
  float *row, *other, *h;
  __device__ LiteralScratch(float* scratch, int64_t width)
      : row(scratch), other(row + width), h(other + width) {}
};

__device__ __forceinline__ bool is_negative(const CudaProblem& p, int64_t i, int64_t j) {
  if (p.split && (i < p.split) == (j < p.split)) return false;
  return i != j && !(p.ids && p.ids[i] == p.ids[j]);
}

// Writes the literal rows to index [N], in order, and their number to *count. Called by one block.
__device__ __noinline__ inline void list_literal(const CudaProblem& p, int* index, int* count,
                                                 int* scratch) {
  constexpr int kEach = 8;  // neighbours of a thread
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int total = 0;
  SUPCLAP_ROLLED
  for (int64_t first = 0; first < p.N; first += kThreads * kEach) {
    const int64_t own = first + threadIdx.x * kEach;
    bool literal[kEach];
    SUPCLAP_UNROLL
    for (int e = 0; e < kEach; ++e) literal[e] = own + e < p.N && is_literal(p, own + e);
    int lower = 0, all = 0;  // literal rows of the lanes below this one, of the warp
    SUPCLAP_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const unsigned votes = __ballot_sync(0xffffffffu, literal[e]);
      lower += __popc(votes & ((1u << lane) - 1));
      all += __popc(votes);
    }
    if (lane == 0) scratch[warp] = all;
    __syncthreads();
    int at = total + lower;
    SUPCLAP_ROLLED
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += scratch[w];
      total += scratch[w];
    }
    SUPCLAP_UNROLL
    for (int e = 0; e < kEach; ++e)
      if (literal[e]) index[at++] = int(own + e);
    __syncthreads();
  }
  if (threadIdx.x == 0) *count = total;
}

// <x, Y_j> for a row x in shared memory; the whole warp calls it.
template <class Scalar>
__device__ float literal_product(const float* x, const Scalar* y, int64_t width) {
  using Piece = Vector<Scalar>;
  float sum = 0;
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x % kWarp * Piece::size; d < width; d += kWarp * Piece::size) {
    const Piece piece = load_vector(y + d);
    for (int n = 0; n < Piece::size; ++n) sum += x[d + n] * widen(piece.at[n]);
  }
  return warp_sum(sum);
}
// <s_i, y>, where s_i is built on the way; the whole warp calls it.
template <class Scalar>
__device__ float literal_product(const LiteralSide<Scalar>& side, float c, int64_t i,
                                 const float* y, int64_t width) {
  using Piece = Vector<Scalar>;
  float sum = 0;
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x % kWarp * Piece::size; d < width; d += kWarp * Piece::size) {
    const Piece a = load_vector(side.X + i * width + d), b = load_vector(side.Y + i * width + d);
    for (int n = 0; n < Piece::size; ++n) {
      const float x = widen(a.at[n]);
      sum += (x + c * (widen(b.at[n]) - x)) * y[d + n];
    }
  }
  return warp_sum(sum);
}

template <class Scalar>
__device__ void load_support(const CudaProblem& p, const LiteralSide<Scalar>& side, int64_t i,
                             float* s) {
  const float c = row_of(p, kC, i);
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
    const float x = widen(side.X[i * p.width + d]);
    s[d] = x + c * (widen(side.Y[i * p.width + d]) - x);
  }
}

// Adds (m, l) of the warps, in order, to running[direction] of row i. `scratch` is free again
// behind the next barrier.
__device__ inline void merge_literal(const CudaProblem& p, int direction, int64_t i, LogSum own,
                                     float* scratch) {
  if (threadIdx.x % kWarp == 0) {
    scratch[threadIdx.x / kWarp] = own.m;
    scratch[kWarps + threadIdx.x / kWarp] = own.l;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float* at = p.running + 2 * direction * p.N + i;
    LogSum sum{at[0], at[p.N]};
    SUPCLAP_ROLLED
    for (int w = 0; w < kWarps; ++w) sum = merge(sum, {scratch[w], scratch[kWarps + w]}, p.infonce);
    at[0] = sum.m;
    at[p.N] = sum.l;
  }
}

__device__ __forceinline__ LogSum one_logit(float z, bool infonce) {
  return {z, infonce ? 1.0f : softplus_2(z)};
}

// Sweep 1 of literal row i: its negatives join `running`, where the tiles left it out.
template <class Scalar>
__device__ __noinline__ void literal_row_statistics(const CudaProblem& p, int64_t i,
                                                    float* memory) {
  const LiteralScratch scratch(memory, p.width);
  const float k2 = logit_scale_2(p), b = logit_bias_2(p);
  SUPCLAP_ROLLED
  for (int n = 0; n < literal_sides(p); ++n) {
    const LiteralSide<Scalar> side(p, kSupportRows + n);
    load_support(p, side, i, scratch.row);
    __syncthreads();
    LogSum sum{kHidden, 0};
    SUPCLAP_ROLLED
    for (int64_t j = threadIdx.x / kWarp; j < p.N; j += kWarps) {
      if (!is_negative(p, i, j)) continue;
      const float product = literal_product(scratch.row, side.Y + j * p.width, p.width);
      sum = merge(sum, one_logit(k2 * (product * row_of(p, side.inverse, i)) + b, p.infonce),
                  p.infonce);
    }
    merge_literal(p, side.direction, i, sum, scratch.h);
  }
}

// Sweep 1 of a shared mode: audio j has the literal support vectors as negatives.
template <class Scalar>
__device__ __noinline__ void literal_column_statistics(const CudaProblem& p, int64_t j,
                                                       const int* index, int count, float* memory) {
  const LiteralScratch scratch(memory, p.width);
  const LiteralSide<Scalar> side(p, kSupportRows);
  const float k2 = logit_scale_2(p);
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads)
    scratch.row[d] = widen(side.Y[j * p.width + d]);
  __syncthreads();
  LogSum sum{kHidden, 0};
  SUPCLAP_ROLLED
  for (int n = threadIdx.x / kWarp; n < count; n += kWarps) {
    const int64_t i = index[n];
    if (!is_negative(p, i, j)) continue;
    const float product = literal_product(side, row_of(p, kC, i), i, scratch.row, p.width);
    sum = merge(sum, {k2 * (product * row_of(p, kTextInverse, i)), 1}, true);
  }
  merge_literal(p, kOtherRows, j, sum, scratch.h);
}

// The slope towards the logit k2 product + b of literal row i with row j; `product` includes
// 1 / |s|.
__device__ __forceinline__ float literal_slope(const CudaProblem& p, int direction, float product,
                                               int64_t i, int64_t j) {
  if (!is_negative(p, i, j)) return 0;
  const auto factor = [&](int which, int64_t n) { return p.factors[which * p.N + n]; };
  const float z = logit_scale_2(p) * product;
  float h = slope(z + logit_bias_2(p), p.infonce ? factor(direction, i) : 0,
                  factor(kDirections + direction, i), p.infonce);
  if (p.mode == kShared)
    h += slope(z, factor(kOtherRows, j), factor(kDirections + kOtherRows, j), true);
  return h;
}

// Sweep 2 of literal row i. The gradient of s is put together as a vector, positive included, and
// with `renormalize` made tangent to the sphere; then dX_i += (1 - c) ds, dY_i += c ds + H_ii s.
template <class Scalar>
__device__ __noinline__ void literal_row_gradient(const CudaProblem& p, int64_t i, float* memory) {
  const LiteralScratch scratch(memory, p.width);
  float *s = scratch.row, *g = scratch.other;
  const float k2 = logit_scale_2(p), c = row_of(p, kC, i);
  const Positive positive(p, i);
  SUPCLAP_ROLLED
  for (int n = 0; n < literal_sides(p); ++n) {
    const LiteralSide<Scalar> side(p, kSupportRows + n);
    const float inverse = row_of(p, side.inverse, i);
    load_support(p, side, i, s);
    float own = positive_slope(p, side.direction, positive, i);
    if (p.mode == kShared) own += positive_slope(p, kOtherRows, positive, i);
    own *= p.split ? 0 : p.alpha * p.omega[i] / p.unit[0];
    SUPCLAP_ROLLED
    for (int64_t d = threadIdx.x; d < p.width; d += kThreads)
      g[d] = own * widen(side.Y[i * p.width + d]);
    float support = 0, bias = 0;
    __syncthreads();
    SUPCLAP_ROLLED
    for (int64_t first = 0; first < p.N; first += kLiteralChunk) {
      const int64_t end = first + kLiteralChunk < p.N ? first + kLiteralChunk : p.N;
      SUPCLAP_ROLLED
      for (int64_t j = first + threadIdx.x / kWarp; j < end; j += kWarps) {
        const float product = literal_product(s, side.Y + j * p.width, p.width) * inverse;
        const float h = literal_slope(p, side.direction, product, i, j);
        if (threadIdx.x % kWarp == 0) {
          scratch.h[j - first] = h;
          support += h * (k2 * product);
          bias += h;
        }
      }
      __syncthreads();
      SUPCLAP_ROLLED
      for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
        float sum = 0;
        SUPCLAP_ROLLED
        for (int64_t j = first; j < end; ++j)
          sum += scratch.h[j - first] * widen(side.Y[j * p.width + d]);
        g[d] += sum;
      }
      __syncthreads();
    }
    support = block_sum(support, scratch.h);
    bias = block_sum(bias, scratch.h);
    float along = 0, rho = 0;
    if (p.renormalize) {
      SUPCLAP_ROLLED
      for (int64_t d = threadIdx.x; d < p.width; d += kThreads) along += g[d] * (s[d] * inverse);
      along = block_sum(along, scratch.h);
    }
    SUPCLAP_ROLLED
    for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
      const int64_t at = i * p.width + d;
      const float unit = s[d] * inverse, ds = (g[d] - along * unit) * inverse;
      rho += ds * (widen(side.Y[at]) - widen(side.X[at]));
      if (side.dX) side.dX[at] += (1 - c) * ds;
      if (side.dY) side.dY[at] += c * ds + own * unit;
    }
    rho = block_sum(rho, scratch.h);
    if (threadIdx.x == 0) {
      p.sums[side.support * p.N + i] += support;
      p.sums[kBias * p.N + i] += bias;
      p.sums[kRhoLiteral * p.N + i] += rho;
    }
  }
}

// Sweep 2 of a compared row: dY_j += sum_i H_ij s_i over all literal rows i.
template <class Scalar>
__device__ __noinline__ void literal_column_gradient(const CudaProblem& p, int64_t j,
                                                     const int* index, int count, float* memory) {
  const LiteralScratch scratch(memory, p.width);
  SUPCLAP_ROLLED
  for (int n = 0; n < literal_sides(p); ++n) {
    const LiteralSide<Scalar> side(p, kSupportRows + n);
    if (!side.dY) continue;
    SUPCLAP_ROLLED
    for (int64_t d = threadIdx.x; d < p.width; d += kThreads)
      scratch.row[d] = widen(side.Y[j * p.width + d]);
    __syncthreads();
    SUPCLAP_ROLLED
    for (int first = 0; first < count; first += kLiteralChunk) {
      const int end = first + kLiteralChunk < count ? first + kLiteralChunk : count;
      SUPCLAP_ROLLED
      for (int n = first + threadIdx.x / kWarp; n < end; n += kWarps) {
        const int64_t i = index[n];
        const float inverse = row_of(p, side.inverse, i);
        const float product =
            literal_product(side, row_of(p, kC, i), i, scratch.row, p.width) * inverse;
        const float h = literal_slope(p, side.direction, product, i, j) * inverse;
        if (threadIdx.x % kWarp == 0) scratch.h[n - first] = h;
      }
      __syncthreads();
      SUPCLAP_ROLLED
      for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
        float sum = 0;
        SUPCLAP_ROLLED
        for (int n = first; n < end; ++n) {
          const int64_t i = index[n];
          const float c = row_of(p, kC, i), x = widen(side.X[i * p.width + d]);
          sum += scratch.h[n - first] * (x + c * (widen(side.Y[i * p.width + d]) - x));
        }
        side.dY[j * p.width + d] += sum;
      }
      __syncthreads();
    }
  }
}

}  // namespace supclap::cuda
