// Scalar formulas of the loss, for host and device; names as in gradients.py.
#pragma once

#ifdef __CUDACC__
#define SUPCLAP_HD __host__ __device__ __forceinline__
#else
#define SUPCLAP_HD inline __attribute__((always_inline))
#endif

namespace supclap {

// <s, y> of the support vector s = x + c (y_own - x), from cross = <x, y> and gram = <y_own, y>.
template <class Real>
SUPCLAP_HD Real support_product(Real cross, Real gram, Real c) {
  return cross + c * (gram - cross);
}

// 1 / (1 + exp(-z)) from e = exp(-|z|): never overflows.
template <class Real>
SUPCLAP_HD Real sigmoid(Real z, Real e) {
  return (z >= Real(0) ? Real(1) : e) / (Real(1) + e);
}

// log(1 + exp(z)) from log1p(exp(-|z|)).
template <class Real>
SUPCLAP_HD Real softplus(Real z, Real log1p_e) {
  return (z > Real(0) ? z : Real(0)) + log1p_e;
}

}  // namespace supclap
