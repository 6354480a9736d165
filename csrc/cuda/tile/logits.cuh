// Scalar formulas on logits in base 2; names as in formulas.h and the Triton kernels.
#pragma once

#include "cuda/device/device.cuh"
#include "formulas.h"

namespace supclap::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHidden = float(supclap::kHidden);  // the same in the kernels' type

// What is kept of a set of logits z. InfoNCE: their maximum m and l = sum of exp2(z - m). SigLIP:
// l = sum of softplus.
struct alignas(8) LogSum {
  float m, l;
};

__device__ __forceinline__ LogSum merge(LogSum a, LogSum b, bool infonce) {
  const float top = fmaxf(a.m, b.m);
  if (!infonce) return {top, a.l + b.l};
  const bool first = a.m >= b.m;
  const float more = first ? a.l : b.l, less = first ? b.l : a.l;
  return {top, more + less * exp_2(-fabsf(a.m - b.m))};
}
__device__ __forceinline__ LogSum shuffle_xor(LogSum x, int apart) {
  return {shuffle_xor(x.m, apart), shuffle_xor(x.l, apart)};
}

// k log2(e), but never 0: sums of slope times logit are divided by it later.
__device__ __forceinline__ float logit_scale_2(const CudaProblem& p) {
  const float k2 = p.scale[0] * kLog2e;
  return k2 == 0 ? 1e-30f : k2;
}
__device__ __forceinline__ float logit_bias_2(const CudaProblem& p) {
  return p.infonce || !p.bias ? 0 : p.bias[0] * kLog2e;
}

// Whether the mode has direction d.
SUPCLAP_HD bool has_direction(int mode, int d) {
  return d < kSupportRows || (mode != kPlain && (d == kSupportRows || mode != kOneSided));
}

// Whether the loss uses direction d: SigLIP counts columns with rows.
SUPCLAP_HD bool direction_used(const CudaProblem& p, int d) {
  return has_direction(p.mode, d) && (p.infonce || d != kAudioRows);
}

// Whether the negatives of direction d are kept: SigLIP's ranks compare with those of the audios.
SUPCLAP_HD bool direction_kept(const CudaProblem& p, int d) {
  return direction_used(p, d) || (d == kAudioRows && p.stats);
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)): exact to rounding where y is tiny.
__device__ __forceinline__ float log1p_unit(float y) {
  const float s = quotient(y, 2 + y), s2 = s * s;
  float sum = s2 * (2.0f / 15) + 2.0f / 13;
  sum = sum * s2 + 2.0f / 11;
  sum = sum * s2 + 2.0f / 9;
  sum = sum * s2 + 2.0f / 7;
  sum = sum * s2 + 2.0f / 5;
  sum = sum * s2 + 2.0f / 3;
  sum = sum * s2 + 2.0f;
  return s * sum;
}

// log(1 + exp) of a logit in base 2, in nats.
__device__ __forceinline__ float softplus_2(float z) {
  return fmaxf(z, 0.0f) * kLn2 + log1p_unit(exp_2(-fabsf(z)));
}
// 1 / (1 + exp(-z)) of a logit in base 2.
__device__ __forceinline__ float sigmoid_2(float z) {
  const float e = exp_2(-fabsf(z));
  return quotient(z >= 0 ? 1 : e, 1 + e);
}

// What a logit of direction d adds to l once its set's maximum is known.
__device__ __forceinline__ float summand(float z, float m, int d, bool infonce) {
  if (infonce) return exp_2(z - m);
  return d == kAudioRows
             ? 0
             : softplus_2(z);  // SigLIP has no such direction; only its m counts, for the ranks
}

// Gradient towards a negative's logit z: softmax or sigmoid, weighted by f.
__device__ __forceinline__ float slope(float z, float m, float f, bool infonce) {
  return (infonce ? exp_2(z - m) : sigmoid_2(z)) * f;
}

}  // namespace supclap::cuda
