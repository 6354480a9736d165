// Scalar formulas on logits in base 2; names as in formulas.h and the Triton kernels.
#pragma once

#include "cuda/device.cuh"
#include "formulas.h"

namespace supclap::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kHidden = -1e30f;  // logit of a pair that does not take part

// A set of logits: InfoNCE: maximum m and l = sum of exp2(z - m). SigLIP: l = sum of softplus.
struct alignas(8) LogSum {
  float m, l;
};

__device__ __forceinline__ LogSum merge(LogSum a, LogSum b, bool infonce) {
  const float top = fmaxf(a.m, b.m);
  if (!infonce) return {top, a.l + b.l};
  return {top, a.l * exp2f(a.m - top) + b.l * exp2f(b.m - top)};
}

// k log2(e); not 0, since sums of slope times logit are divided by it later.
__device__ __forceinline__ float logit_scale_2(const Problem& p) {
  const float k2 = p.scale[0] * kLog2e;
  return k2 == 0 ? 1e-30f : k2;
}
__device__ __forceinline__ float logit_bias_2(const Problem& p) {
  return p.infonce || !p.bias ? 0 : p.bias[0] * kLog2e;
}

// Whether the mode and the objective have direction d.
SUPCLAP_HD bool direction_used(const Problem& p, int d) {
  if (d == kTextRows) return true;
  if (d == kAudioRows) return p.infonce;
  return p.mode != kNone && (d == kSupportRows || p.mode != kOneSided);
}

// log(1 + exp) of a logit in base 2, in nats.
__device__ __forceinline__ float softplus_2(float z) {
  return fmaxf(z, 0.0f) / kLog2e + log1pf(exp2f(-fabsf(z)));
}
// 1 / (1 + exp(-z)) of a logit in base 2.
__device__ __forceinline__ float sigmoid_2(float z) { return sigmoid(z, exp2f(-fabsf(z))); }

// What a logit adds to l once its set's maximum is known.
__device__ __forceinline__ float summand(float z, float m, bool infonce) {
  return infonce ? exp2f(z - m) : softplus_2(z);
}

// Gradient towards a negative's logit z: softmax or sigmoid, weighted by f.
__device__ __forceinline__ float slope(float z, float m, float f, bool infonce) {
  return (infonce ? exp2f(z - m) : sigmoid_2(z)) * f;
}

}  // namespace supclap::cuda
