// Compiled for AVX512-BF16 only; module.cpp asks the processor before it calls anything here.
#include "bf16_gemm.h"

#include <immintrin.h>

#include "parallel.h"

namespace supclap {
namespace bf16 {
namespace {

constexpr int kRows = 6, kGroups = 4;  // register tile: 6 x 64 sums in 24 of 32 registers
// One unit of work has so many rows, whose X stays in the first-level cache.
constexpr int64_t kRowBlock = 8 * kRows;
constexpr int64_t kColumnBlock = 4 * kGroups * kGroup;

template <class Body>
void run(int64_t count, int threads, Body body) {
  parallel(count, threads, [](void* data, int64_t n) { (*static_cast<Body*>(data))(n); }, &body);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m512bh pairs(__m512i value) {
  __m512bh result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

// C [R, 16 G] (+)= X [R, K] Y [K, 16 G]; the last group stores the columns of `last` only.
template <int R, int G>
void tile(const uint16_t* X, int64_t ldx, const uint16_t* Y, int64_t group_stride, float* C,
          int64_t ldc, int64_t K, __mmask16 last, bool accumulate) {
  __m512 sum[R][G];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) sum[r][g] = _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k += 2) {
    __m512bh y[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) y[g] = pairs(_mm512_loadu_si512(Y + g * group_stride + k * kGroup));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, X + r * ldx + k, sizeof pair);
      const __m512bh x = pairs(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sum[r][g] = _mm512_dpbf16_ps(sum[r][g], x, y[g]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      float* c = C + r * ldc + g * kGroup;
      const __mmask16 mask = g == G - 1 ? last : __mmask16(0xffff);
      if (accumulate) sum[r][g] = _mm512_add_ps(sum[r][g], _mm512_maskz_loadu_ps(mask, c));
      _mm512_mask_storeu_ps(c, mask, sum[r][g]);
    }
}

using Kernel = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, int64_t,
                        int64_t, __mmask16, bool);

#define SUPCLAP_ROW(R) {tile<R, 1>, tile<R, 2>, tile<R, 3>, tile<R, 4>}
constexpr Kernel kKernels[kRows][kGroups] = {SUPCLAP_ROW(1), SUPCLAP_ROW(2), SUPCLAP_ROW(3),
                                             SUPCLAP_ROW(4), SUPCLAP_ROW(5), SUPCLAP_ROW(6)};

inline uint16_t round_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);  // stays a NaN
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

void pack_transposed(const uint16_t* Y, int64_t N, int64_t D, uint16_t* out, int threads) {
  run(ceil_div(N, kGroup), threads, [&](int64_t group) {
    uint16_t* to = out + group * kGroup * D;
    for (int64_t d = 0; d < D; d += 2)
      for (int64_t n = 0; n < kGroup; ++n, to += 2) {
        const int64_t row = group * kGroup + n;
        uint32_t pair = 0;
        if (row < N) __builtin_memcpy(&pair, Y + row * D + d, sizeof pair);
        __builtin_memcpy(to, &pair, sizeof pair);
      }
  });
}

void pack(const uint16_t* Y, int64_t N, int64_t D, uint16_t* out, int threads) {
  const int64_t pairs_of_rows = ceil_div(N, 2);
  run(ceil_div(D, kGroup), threads, [&](int64_t group) {
    uint16_t* to = out + group * kGroup * 2 * pairs_of_rows;
    for (int64_t n = 0; n < 2 * pairs_of_rows; n += 2)
      for (int64_t d = group * kGroup; d < (group + 1) * kGroup; ++d, to += 2) {
        to[0] = d < D ? Y[n * D + d] : 0;
        to[1] = d < D && n + 1 < N ? Y[(n + 1) * D + d] : 0;
      }
  });
}

void convert(const float* W, int64_t rows, int64_t columns, bool transposed, uint16_t* out,
             int threads) {
  const int64_t width = transposed ? rows + rows % 2 : columns + columns % 2;
  if (!transposed) {
    run(rows, threads, [&](int64_t i) {
      for (int64_t j = 0; j < columns; ++j) out[i * width + j] = round_to_bf16(W[i * columns + j]);
      if (columns % 2) out[i * width + columns] = 0;
    });
    return;
  }
  run(ceil_div(columns, kGroup), threads, [&](int64_t block) {
    const int64_t end = smaller(columns, (block + 1) * kGroup);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = block * kGroup; j < end; ++j)
        out[j * width + i] = round_to_bf16(W[i * columns + j]);
    for (int64_t j = block * kGroup; rows % 2 && j < end; ++j) out[j * width + rows] = 0;
  });
}

void multiply(const uint16_t* X, int64_t ldx, const uint16_t* Y, int64_t group_stride, float* C,
              int64_t ldc, int64_t M, int64_t N, int64_t K, bool accumulate, int threads) {
  const int64_t row_blocks = ceil_div(M, kRowBlock), column_blocks = ceil_div(N, kColumnBlock);
  run(row_blocks * column_blocks, threads, [&](int64_t unit) {
    const int64_t m0 = unit / column_blocks * kRowBlock, m1 = smaller(M, m0 + kRowBlock);
    const int64_t n0 = unit % column_blocks * kColumnBlock, n1 = smaller(N, n0 + kColumnBlock);
    for (int64_t n = n0; n < n1; n += kGroups * kGroup) {
      const int64_t width = smaller(n1 - n, kGroups * kGroup), groups = ceil_div(width, kGroup);
      const __mmask16 last = __mmask16((1u << (width - (groups - 1) * kGroup)) - 1);
      for (int64_t m = m0; m < m1; m += kRows)
        kKernels[smaller(m1 - m, kRows) - 1][groups - 1](
            X + m * ldx, ldx, Y + n / kGroup * group_stride, group_stride, C + m * ldc + n, ldc, K,
            last, accumulate);
    }
  });
}

}  // namespace bf16
}  // namespace supclap
