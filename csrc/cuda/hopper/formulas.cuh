// Formulas of full tiles and of SigLIP, in fewer instructions than those of tile.cuh and
// logits.cuh.
#pragma once

#include "cuda/device/hopper.cuh"
#include "cuda/tile/tile.cuh"

namespace supclap::cuda {

// <s, y> of the support vector s = x + c (y_own - x), and `step`, which c multiplies in it.
struct SupportProduct {
  float step, product;
  __device__ SupportProduct(float cross, float gram, float c)
      : step(gram - cross), product(cross + c * step) {}
};

// What a support vector adds to the sums of its row, and to the weights of its own cross product (S
// or P) and of its gram (Q or K). `slope` is that towards its logit, times k2 over its length.
struct SupportSlopes {
  float rho, support, own, gram;
  __device__ SupportSlopes(const SupportProduct& p, float slope, float c, float over)
      : rho(slope * p.step), support(slope * p.product) {
    const float v = c * slope;
    own = over * (slope - v);
    gram = over * v;
  }
};
// A sum as general.cuh leaves it: there, the slopes in rho do not include the length.
__device__ __forceinline__ float without_length(int sum, float total, const Support& of) {
  if (sum == kRhoText) return quotient(total, of.text);
  if (sum == kRhoAudio) return quotient(total, of.audio);
  return total;
}

// Watches sums of exponentials: whether all that matter are in float32's range.
struct Range {
  float least = 1, most = 1;
  __device__ void take(float sum) {
    least = fminf(least, sum);
    most = fmaxf(most, sum);
  }
  // Whether this holds for all lanes of the warp.
  __device__ bool good() const {
    const bool bad = least < 0x1p-30f || most > 0x1p30f;
    return uniform(warp_max(bad ? 1.0f : 0.0f) == 0);
  }
};

// A sum of log(1 + exp) over logits in base 2: the sum of their positive parts, and the product of
// all 1 + exp(-|z|), less 1, so that the smallest of them keep their digits.
struct SoftplusSum {
  float tops, rest;
  __device__ float value() const { return tops * kLn2 + log1pf(rest); }
};
__device__ __forceinline__ SoftplusSum shuffle_xor(SoftplusSum x, int apart) {
  return {shuffle_xor(x.tops, apart), shuffle_xor(x.rest, apart)};
}
struct AddSoftplus {
  __device__ SoftplusSum operator()(SoftplusSum x, SoftplusSum y) const {
    return {x.tops + y.tops, x.rest + (x.rest * y.rest + y.rest)};
  }
};

// log(1 + exp) and 1 / (1 + exp(-z)) of a logit in base 2.
struct Logistic {
  SoftplusSum loss;
  float slope;
  __device__ explicit Logistic(float z) {
    const float e = exp_2(-fabsf(z));
    loss = {fmaxf(z, 0.0f), e};
    slope = quotient(z >= 0 ? 1 : e, 1 + e);
  }
};

}  // namespace supclap::cuda
