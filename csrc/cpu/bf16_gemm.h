// Products of bfloat16 matrices with float32 results, by the dot-product instruction of
// AVX512-BF16.
//
// The left operand is row-major [M, K] with pairs along K adjacent, K even. The right operand is
// packed in groups of 16 output columns: [groups, K / 2, 16, 2]. Sums are float32 from first to
// last.
#pragma once

#include <cstdint>

namespace supclap {
namespace bf16 {

constexpr int64_t kGroup = 16;

// Packs rows of Y [N, D] as columns of Y^T, K = D: out [ceil(N / 16), D / 2, 16, 2]; D even,
// missing rows are 0.
void pack_transposed(const uint16_t* Y, int64_t N, int64_t D, uint16_t* out, int threads);

// Packs Y [N, D] itself, K = N: out [ceil(D / 16), ceil(N / 2), 16, 2]; what is missing is 0.
void pack(const uint16_t* Y, int64_t N, int64_t D, uint16_t* out, int threads);

// Rounds W [rows, columns] float32 to bfloat16, row-major with the width rounded up to even; if
// `transposed`, to [columns, rows].
void convert(const float* W, int64_t rows, int64_t columns, bool transposed, uint16_t* out,
             int threads);

// C [M, N] = X Y, or C += X Y. X [M, K] has row stride `ldx`; group g of Y starts at Y + g *
// group_stride.
void multiply(const uint16_t* X, int64_t ldx, const uint16_t* Y, int64_t group_stride, float* C,
              int64_t ldc, int64_t M, int64_t N, int64_t K, bool accumulate, int threads);

}  // namespace bf16
}  // namespace supclap
