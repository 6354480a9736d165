// Numbers that the C++ kernels, the CUDA kernels and Python must agree on; a test compares Python's
// (reference.py, gradients.py, backends/state.py) with these.
#pragma once

namespace supclap {

// The logit and the inner product of a hidden pair: one that does not take part (the diagonal,
// equal ids). It is finite, so that differences of two hidden values are 0 and not NaN; anything
// below half of it is hidden.
constexpr double kHidden = -1e30;

// Smoothing of the gap r.
constexpr double kEps = 1e-4;

// A row is literal (its support vector is taken from the rows themselves) if |c| > kLiteralC, if r
// is below kLiteralGap of the longer row, or, with renormalize, if a support vector is shorter than
// kLiteralLength of the longer row.
constexpr double kLiteralC = 2, kLiteralGap = 1.0 / 8, kLiteralLength = 0.1;

// Shorter support vectors are divided by this length when they are put back on the sphere.
constexpr double kMinLength = 1e-7;

// Shorter rows are divided by this length when they are normalised.
constexpr double kMinNorm = 1e-12;

}  // namespace supclap
