// exp and log1p as arithmetic that a compiler can vectorise: no branches, no calls, no tables.
#pragma once

#include <cstdint>

#include "../formulas.h"

namespace supclap {

template <class Real>
struct Format;

template <>
struct Format<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kExpTerms = 7, kLogTerms = 8;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.0f;  // below, exp is set to 0
};

template <>
struct Format<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kExpTerms = 13, kLogTerms = 17;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -708.0;
};

template <class To, class From>
SUPCLAP_HD To bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "same size");
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

static constexpr double inverse_factorial(int n) {
  return n < 2 ? 1.0 : inverse_factorial(n - 1) / n;
}

// exp(x) for x <= 0, exactly 0 below the smallest normal number. x = n ln 2 + r, |r| <= ln(2) / 2;
// exp(r) by its Taylor polynomial (truncation below 0.1 ulp), 2^n by adding n to the exponent.
template <class Real>
SUPCLAP_HD Real exp_nonpositive(Real x) {
  using F = Format<Real>;
  using Bits = typename F::Bits;
  const Real shifted = x * Real(1.44269504088896340736) + F::kRound;
  const Real whole = shifted - F::kRound;
  const Real r = (x - whole * F::kLn2High) - whole * F::kLn2Low;
  Real p = Real(inverse_factorial(F::kExpTerms));
#pragma GCC unroll 16
  for (int n = F::kExpTerms - 1; n >= 0; --n) p = p * r + Real(inverse_factorial(n));
  const Real result = bits<Real>(bits<Bits>(p) + (bits<Bits>(shifted) << F::kMantissa));
  return x < F::kLowest ? Real(0) : result;
}

// log(1 + y) for 0 <= y <= 1, as 2 artanh(y / (2 + y)); the series in s^2 <= 1/9 is cut below half
// an ulp.
template <class Real>
SUPCLAP_HD Real log1p_unit(Real y) {
  const Real s = y / (Real(2) + y), s2 = s * s;
  Real p = 0;
#pragma GCC unroll 32
  for (int n = Format<Real>::kLogTerms - 1; n >= 0; --n) p = p * s2 + Real(2.0 / (2 * n + 1));
  return s * p;
}

}  // namespace supclap
