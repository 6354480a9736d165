// Work on rows that is O(N D) before the sweeps, and O(N) between them. A warp or a thread has one
// row at a time.
#pragma once

#include "cuda/tile/logits.cuh"

namespace supclap::cuda {

// The constants of constants.h in the kernels' type.
constexpr float kEps = float(supclap::kEps), kMinLength = float(supclap::kMinLength);
constexpr float kLiteralC = float(supclap::kLiteralC), kLiteralGap = float(supclap::kLiteralGap),
                kLiteralLength = float(supclap::kLiteralLength);
constexpr float kLargestWeight = 16384;  // in units of a weight: float16 ends at 2^16

// A quantity of row i (Geometry of params.h).
__device__ __forceinline__ float& row_of(const CudaProblem& p, int quantity, int64_t i) {
  return p.state[(kStateGeometry + quantity) * p.N + i];
}
__device__ __forceinline__ float radius_of(const CudaProblem& p, int64_t i) {
  return p.radius[p.per_row_radius ? i : 0];
}

// 1 / max(|x|, kMinNorm) of a row as given, in double: where gaps are small, the roundings of a
// normalised row are its gap. The whole warp calls it.
template <class Scalar>
__device__ double inverse_length(const Scalar* X, int64_t stride, int64_t D) {
  double square = 0;
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp) {
    const double x = widen(X[d * stride]);
    square += x * x;
  }
  const double length = sqrt(warp_sum(square));
  return 1 / (length < kMinNorm ? kMinNorm : length);
}

// An element of an operand: that of the row as given, or divided by the row's length and rounded to
// its dtype.
template <class Scalar>
__device__ __forceinline__ Scalar operand(Scalar x, double inverse, bool normalize) {
  return normalize ? narrow<Scalar>(float(widen(x) * inverse)) : x;
}

// out [width] = the operand of row X, zeros beyond D.
template <class Scalar>
__device__ void pack_row(const CudaProblem& p, const Scalar* X, int64_t stride, Scalar* out) {
  const double inverse = p.normalize ? inverse_length(X, stride, p.D) : 1;
  SUPCLAP_ROLLED
  for (int64_t d = threadIdx.x % kWarp; d < p.width; d += kWarp)
    out[d] = d < p.D ? operand(X[d * stride], inverse, p.normalize) : narrow<Scalar>(0.0f);
}

// Writes the geometry of row i, from differences of the rows themselves: nothing cancels.
template <class Scalar>
__device__ void prepare_row(const CudaProblem& p, int64_t i) {
  using Piece = Vector<Scalar>;
  const auto* T = static_cast<const Scalar*>(p.T) + i * p.width;
  const auto* A = static_cast<const Scalar*>(p.A) + i * p.width;
  const int lane = threadIdx.x % kWarp;
  if (lane < kStateGeometry + kGeometryRows) p.state[lane * p.N + i] = 0;
  float ta = 0, ee = 0, et = 0, ea = 0, tt = 0, aa = 0;
  SUPCLAP_UNROLL_BY(4)
  for (int64_t d = lane * Piece::size; d < p.width; d += kWarp * Piece::size) {
    const Piece t_piece = load_vector(T + d), a_piece = load_vector(A + d);
    for (int n = 0; n < Piece::size; ++n) {
      const float t = widen(t_piece.at[n]), a = widen(a_piece.at[n]), e = a - t;
      ta += t * a;
      ee += e * e;
      et += e * t;
      ea += e * a;
      tt += t * t;
      aa += a * a;
    }
  }
  ta = warp_sum(ta);
  ee = warp_sum(ee);
  et = warp_sum(et);
  ea = warp_sum(ea);
  tt = warp_sum(tt);
  aa = warp_sum(aa);
  __syncwarp();
  if (lane == 0) {
    row_of(p, kPositive, i) = ta;
    SUPCLAP_ROLLED
    for (int plane = 0; plane < kPlanes; ++plane)
      p.running[plane * p.N + i] = plane < 2 * kSimilarity && plane % 2 == 0 ? kHidden : 0;
  }
  if (!p.radius) return;
  const float r = sqrtf(ee + kEps * kEps), c = radius_of(p, i) / r;
  const float length = sqrtf(fmaxf(tt, aa));
  bool literal = fabsf(c) > kLiteralC || r < length * kLiteralGap;
  float text = 1, audio = 1;
  if (p.renormalize) {
    float tt = 0, aa = 0;
    SUPCLAP_ROLLED
    for (int64_t d = lane * Piece::size; d < p.width; d += kWarp * Piece::size) {
      const Piece t_piece = load_vector(T + d), a_piece = load_vector(A + d);
      for (int n = 0; n < Piece::size; ++n) {
        const float t = widen(t_piece.at[n]), a = widen(a_piece.at[n]), step = c * (a - t);
        tt += (t + step) * (t + step);
        aa += (a - step) * (a - step);
      }
    }
    const float length_t = sqrtf(warp_sum(tt)), length_a = sqrtf(warp_sum(aa));
    literal = literal || fminf(length_t, length_a) < length * kLiteralLength;
    text = 1 / fmaxf(length_t, kMinLength);
    audio = 1 / fmaxf(length_a, kMinLength);
  }
  if (lane != 0) return;
  row_of(p, kGap, i) = r;
  row_of(p, kC, i) = c;
  row_of(p, kStepText, i) = et;
  row_of(p, kStepAudio, i) = ea;
  if (p.mode == kPlain) return;
  row_of(p, kTileC, i) = literal ? 0 : c;
  row_of(p, kOffset, i) = literal ? kHidden : 0;
  row_of(p, kTextInverse, i) = text;
  row_of(p, kAudioInverse, i) = audio;
}

__device__ __forceinline__ bool is_literal(const CudaProblem& p, int64_t i) {
  return p.mode != kPlain && row_of(p, kOffset, i) != 0;
}

// <t_i, a_i>, <t_sup_i, a_i> / |t_sup_i| and <a_sup_i, t_i> / |a_sup_i|; 0 where the mode has none.
struct Positive {
  float s, x, y;
  __device__ Positive(const CudaProblem& p, int64_t i) : s(row_of(p, kPositive, i)), x(0), y(0) {
    if (p.mode == kPlain) return;
    const float c = row_of(p, kC, i);
    x = (s + c * row_of(p, kStepAudio, i)) * row_of(p, kTextInverse, i);
    y = (s - c * row_of(p, kStepText, i)) * row_of(p, kAudioInverse, i);
  }
  // The logit of direction d.
  __device__ float logit(const CudaProblem& p, int d) const {
    const float product = d < kSupportRows ? s : d == kSupportRows || p.mode == kShared ? x : y;
    return logit_scale_2(p) * product + logit_bias_2(p);
  }
};

// The (m, l) of a row with its positive, and l without it.
struct WithPositive {
  LogSum total;
  float others;
  __device__ WithPositive(LogSum negatives, float z) {
    total.m = fmaxf(negatives.m, z);
    others = negatives.l * exp_2(negatives.m - total.m);
    total.l = others + exp_2(z - total.m);
  }
};

// The row's loss in direction d: its positive, of logit z, joins the negatives. Fills `state`.
__device__ __forceinline__ float finish_direction(const CudaProblem& p, int d, LogSum negatives,
                                                  float z, int64_t i) {
  if (!p.infonce) return negatives.l + softplus_2(-z);
  const WithPositive sum(negatives, z);
  const float top = sum.total.m;
  p.state[d * p.N + i] = top;
  p.state[(kStateL + d) * p.N + i] = sum.total.l;
  p.state[(kStateOthers + d) * p.N + i] = sum.others;
  // log(total / exp(z - top)): exactly 0 without negatives. The sum of the others is up to 2^30 for
  // each tile that has its own reference (full_tile.cuh), so exp2 must stay far from its end.
  if (top - z > 60) return (log2f(sum.total.l) + (top - z)) / kLog2e;
  return log1pf(sum.others * exp2f(top - z));
}

// The end of sweep 1: the row's loss, from the negatives of each direction.
__device__ inline void finish_row_statistics(const CudaProblem& p, int64_t i,
                                             const LogSum (&negatives)[kDirections]) {
  const Positive positive(p, i);
  float loss[kDirections] = {}, beaten[2] = {};
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d)
    if (direction_used(p, d))
      loss[d] = finish_direction(p, d, negatives[d], positive.logit(p, d), i);
  if (p.stats) {
    SUPCLAP_UNROLL
    for (int d = 0; d < 2; ++d) beaten[d] = negatives[d].m >= row_of(p, kPanelPositive, i);
  }
  float constraint = 0;
  if (p.radius) {
    const float R = radius_of(p, i), r = row_of(p, kGap, i);
    constraint = R != R ? R : (R > r ? R - r : 0) + (R < 0 ? -R : 0);
  }
  const float support = loss[kSupportRows] + loss[kOtherRows];
  const float weight = (p.weight ? p.weight[i] : 1) * p.row_scale;
  p.row_loss[i] =
      weight * (loss[kTextRows] + loss[kAudioRows] + p.alpha * support + p.beta * constraint);
  if (!p.terms) return;
  const float terms[6] = {loss[kTextRows], loss[kAudioRows], support,
                          constraint,      beaten[0],        beaten[1]};
  SUPCLAP_UNROLL
  for (int n = 0; n < 6; ++n) p.terms[n * p.N + i] = terms[n];
}

// The gradient that arrives at the row's terms.
__device__ __forceinline__ float omega_of(const CudaProblem& p, int64_t i) {
  float w = p.row_scale;
  if (p.upstream) w *= p.upstream[p.per_row_upstream ? i : 0];
  if (p.weight) w *= p.weight[i];
  return w;
}

// The largest weight of a row's products, divided by its omega.
__device__ __forceinline__ float weight_gain(const CudaProblem& p, int64_t i) {
  float gain = 2;
  if (p.mode == kPlain || is_literal(p, i)) return gain;
  const float inverse = fmaxf(row_of(p, kTextInverse, i), row_of(p, kAudioInverse, i));
  return gain + 2 * fabsf(p.alpha) * (1 + 2 * fabsf(row_of(p, kTileC, i))) * inverse;
}

// The power of 2 that weights up to `bound` are multiples of: float16 weights stay in its range.
__device__ __forceinline__ float unit_of(float bound) {
  bound /= kLargestWeight;
  if (!(bound > 1e-30f && bound < 1e30f)) return 1;
  return exp2f(floorf(log2f(bound)));
}

// omega / (l unit), times alpha for support vectors: what turns exp2(z - m) into a weight.
__device__ __forceinline__ float factor_of(const CudaProblem& p, int d, float l, float omega,
                                           float unit) {
  const float f = (d >= kSupportRows ? p.alpha * omega : omega) / unit;
  return p.infonce ? f / l : f;
}

}  // namespace supclap::cuda
