// Products of the single launch: B x B tiles, on the CUDA cores (float32) or the tensor cores.
//
// There are two shapes of product, each with several results at once:
//     similarity   X_I Y_J^T, both operands [row, k]: the tiles of one pair
//     gradient     M^T V, both operands [k, column]: sums of weighted rows
//
// A block is cut into teams that each cover a whole tile and share the depth k; sum_teams adds
// their sums, in order.
#pragma once

#include <type_traits>

#include "cuda/device/mma.cuh"

namespace supclap::cuda {

// A tile on its way from device memory through registers to shared memory: the next one is loaded
// while this one is multiplied.
template <class Scalar, int kTileRows, int kTileColumns, bool kTransposed = false>
struct Mover {
  using Piece = Vector<Scalar>;
  static constexpr int kAcross = kTileColumns / Piece::size;
  static constexpr int kPieces = kTileRows * kAcross;
  static constexpr int kEach = (kPieces + kThreads - 1) / kThreads;
  static_assert(!kTransposed || kAcross % 2 == 0);
  Piece held[kEach];

  // Row and first column of piece e. If transposed, two neighbours of a row are followed by two of
  // the next row: a warp reads whole sectors of memory and writes to different banks.
  __device__ static int row(int e) { return kTransposed ? e / 2 % kTileRows : e / kAcross; }
  __device__ static int column(int e) {
    return (kTransposed ? e / (2 * kTileRows) * 2 + e % 2 : e % kAcross) * Piece::size;
  }

  // Rows and columns beyond the given numbers become zeros; columns come in whole pieces.
  __device__ void load(const Scalar* from, int64_t ld, int64_t rows, int64_t columns) {
    SUPCLAP_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const int e = threadIdx.x + n * kThreads, row = Mover::row(e), column = Mover::column(e);
      if (e < kPieces && row < rows && column < columns)
        held[n] = load_vector(from + row * ld + column);
      else
        SUPCLAP_UNROLL
      for (int m = 0; m < Piece::size; ++m) held[n].at[m] = narrow<Scalar>(0.0f);
    }
  }
  // Writes to [kTileRows, pitch], or, if transposed, to [kTileColumns, pitch]: `columns` columns,
  // and the piece behind them, which completes a fragment.
  __device__ void store(Scalar* to, int pitch, int columns) const {
    SUPCLAP_UNROLL
    for (int n = 0; n < kEach; ++n) {
      const int e = threadIdx.x + n * kThreads, row = Mover::row(e), column = Mover::column(e);
      if (e >= kPieces || column > columns) continue;
      if (!kTransposed)
        store_vector(to + row * pitch + column, held[n]);
      else
        SUPCLAP_UNROLL
      for (int m = 0; m < Piece::size; ++m) to[(column + m) * pitch + row] = held[n].at[m];
    }
  }
};

// Copies a tile straight to shared memory [kTileRows, pitch]; it is there once the thread has
// waited for its copies.
template <int kTileRows, int kTileColumns, class Scalar>
__device__ __forceinline__ void copy_tile(Scalar* to, int pitch, const Scalar* from, int64_t ld,
                                          int64_t rows, int64_t columns) {
  using Source = Mover<Scalar, kTileRows, kTileColumns>;
  SUPCLAP_UNROLL
  for (int n = 0; n < Source::kEach; ++n) {
    const int e = threadIdx.x + n * kThreads, row = Source::row(e), column = Source::column(e);
    const bool there = row < rows && column < columns;
    if (e < Source::kPieces)
      copy_async(to + row * pitch + column, there ? from + row * ld + column : from, there);
  }
}

// The bytes of a row that one step of a similarity takes: few enough for the operands of large
// tiles to fit where their products go.
template <int B>
constexpr int kStepBytes = B == 64 ? 128 : 16384 / B;

// Adds the teams' sums of a result, in order, and calls put(i, j, value) with them, row by row.
// `parts` has room for Multiply::kParts numbers. Ends in a barrier.
template <int B, class Multiply, class Put>
__device__ void sum_teams(const Multiply& product, int result, float* parts, const Put& put) {
  constexpr int kPitch = B + 1, kTile = B * kPitch;
  float* own = parts + Multiply::team() * kTile;
  product.each(result, [&](int i, int j, float value) { own[i * kPitch + j] = value; });
  __syncthreads();
  SUPCLAP_UNROLL_BY(4)
  for (int e = threadIdx.x; e < B * B; e += kThreads) {
    const float* from = parts + e / B * kPitch + e % B;
    float sum = from[0];
    SUPCLAP_UNROLL
    for (int team = 1; team < Multiply::kTeams; ++team) sum += from[team * kTile];
    put(e / B, e % B, sum);
  }
  __syncthreads();
}

// ---------------------------------------------------------------- CUDA cores

// A thread has 4 x 4 elements of each result.
template <class Scalar, int B, int kResults>
struct Product {
  static_assert(sizeof(Scalar) == 4);
  // Operands [k, kPitch], whole rows of 16 bytes.
  static constexpr int kSimilarityDepth = kStepBytes<B> / 4, kGradientDepth = B == 64 ? 16 : 32;
  static constexpr int kSimilarityPitch = B + 4, kGradientPitch = B + 4;
  static constexpr bool kTransposed = true;  // of similarity operands in shared memory
  static constexpr int kSimilarityOperand = kSimilarityDepth * kSimilarityPitch;
  static constexpr int kGradientOperand = kGradientDepth * kGradientPitch;
  static constexpr int kTeam = B / 4 * (B / 4), kTeams = kThreads / kTeam;
  static constexpr int kParts = kTeams * B * (B + 1);

  float sum[kResults][4][4] = {};

  __device__ static int team() { return threadIdx.x / kTeam; }
  __device__ static int row() { return threadIdx.x % kTeam / (B / 4) * 4; }
  __device__ static int column() { return threadIdx.x % (B / 4) * 4; }

  struct Piece {
    float at[4];
    __device__ Piece(const float* from) {
      const Vector<float> piece = load_vector(from);
      for (int n = 0; n < 4; ++n) at[n] = piece.at[n];
    }
  };
  __device__ static void add(float (&sum)[4][4], const Piece& x, const Piece& y) {
    SUPCLAP_UNROLL
    for (int i = 0; i < 4; ++i) {
      SUPCLAP_UNROLL
      for (int j = 0; j < 4; ++j) sum[i][j] += x.at[i] * y.at[j];
    }
  }

  // Adds the products of `depth` columns to S, P (off the diagonal), Q and K. Operands: T_I, A_I,
  // T_J, A_J.
  __device__ void similarity(Scalar* const (&operand)[4], int grams, bool diagonal, int depth) {
    for (int k = team(); k < depth; k += kTeams) {
      const int at = k * kSimilarityPitch;
      const Piece t_i(operand[0] + at + row()), a_i(operand[1] + at + row());
      const Piece t_j(operand[2] + at + column()), a_j(operand[3] + at + column());
      add(sum[0], t_i, a_j);
      if (!diagonal) add(sum[1], a_i, t_j);
      if (grams > 0) add(sum[2], a_i, a_j);
      if (grams > 1) add(sum[3], t_i, t_j);
    }
  }
  // result += M^T V of one depth, which is summed on its own: a sum over all rows, one after the
  // other, would lose more digits than that of a library's product.
  __device__ void gradient(int result, const Scalar* M, const Scalar* V) {
    float part[4][4] = {};
    for (int k = team(); k < kGradientDepth; k += kTeams)
      add(part, M + k * kGradientPitch + row(), V + k * kGradientPitch + column());
    SUPCLAP_UNROLL
    for (int i = 0; i < 4; ++i) {
      SUPCLAP_UNROLL
      for (int j = 0; j < 4; ++j) sum[result][i][j] += part[i][j];
    }
  }

  // Calls put(i, j, value) for what this thread has.
  template <class Put>
  __device__ void each(int result, const Put& put) const {
    SUPCLAP_UNROLL
    for (int i = 0; i < 4; ++i) {
      SUPCLAP_UNROLL
      for (int j = 0; j < 4; ++j) put(row() + i, column() + j, sum[result][i][j]);
    }
  }
};

// ---------------------------------------------------------------- tensor cores

// A warp has kDown x kAcross fragments of 16 x 8 of each result.
template <class Scalar, int B, int kResults>
struct TensorProduct {
  static_assert(sizeof(Scalar) == 2);
  // Operands of a similarity [row, k], of a gradient [k, column]; 8 more elements a row keep the
  // eight rows of an ldmatrix in different banks.
  static constexpr int kSimilarityDepth = kStepBytes<B> / 2, kGradientDepth = B == 64 ? 32 : 64;
  static constexpr int kSimilarityPitch = kSimilarityDepth + 8, kGradientPitch = B + 8;
  static constexpr bool kTransposed = false;
  static constexpr int kSimilarityOperand = B * kSimilarityPitch;
  static constexpr int kGradientOperand = kGradientDepth * kGradientPitch;
  static constexpr int kDown = B == 64 ? 2 : 1, kAcross = 2;     // fragments of a warp
  static constexpr int kWarpsAcross = B / (8 * kAcross);         // warps beside each other
  static constexpr int kTeam = B / (16 * kDown) * kWarpsAcross;  // warps
  static constexpr int kTeams = kWarps / kTeam;
  static constexpr int kParts = kTeams * B * (B + 1);

  float sum[kResults][kDown][kAcross][4] = {};

  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int team() { return threadIdx.x / kWarp / kTeam; }
  __device__ static int row() { return threadIdx.x / kWarp % kTeam / kWarpsAcross * 16 * kDown; }
  __device__ static int column() { return threadIdx.x / kWarp % kWarpsAcross * 8 * kAcross; }

  // Left operands, 16 x 16 each: X [row, k], or M [k, row] transposed.
  struct Left {
    uint32_t at[kDown][4];
    __device__ static Left of_rows(const Scalar* X, int k) {
      Left left;
      SUPCLAP_UNROLL
      for (int n = 0; n < kDown; ++n)
        ldmatrix<false>(left.at[n], X + (row() + 16 * n + lane() % 16) * kSimilarityPitch + k +
                                        lane() / 16 * 8);
      return left;
    }
    __device__ static Left of_columns(const Scalar* M, int k) {
      Left left;
      SUPCLAP_UNROLL
      for (int n = 0; n < kDown; ++n)
        ldmatrix<true>(left.at[n], M + (k + lane() / 16 * 8 + lane() % 8) * kGradientPitch + row() +
                                       16 * n + lane() / 8 % 2 * 8);
      return left;
    }
  };
  // Right operands, 16 x 8 each: Y [column, k] transposed, or V [k, column].
  struct Right {
    uint32_t at[kAcross][2];
    __device__ Right(const uint32_t (&both)[4]) : at{{both[0], both[1]}, {both[2], both[3]}} {}
    __device__ static Right of_rows(const Scalar* Y, int k) {
      uint32_t both[4];
      ldmatrix<false>(both, Y + (column() + lane() / 16 * 8 + lane() % 8) * kSimilarityPitch + k +
                                lane() / 8 % 2 * 8);
      return Right(both);
    }
    __device__ static Right of_columns(const Scalar* V, int k) {
      uint32_t both[4];
      ldmatrix<true>(both, V + (k + lane() % 16) * kGradientPitch + column() + lane() / 16 * 8);
      return Right(both);
    }
  };
  __device__ void add(int result, const Left& x, const Right& y) {
    SUPCLAP_UNROLL
    for (int i = 0; i < kDown; ++i) {
      SUPCLAP_UNROLL
      for (int j = 0; j < kAcross; ++j) mma(sum[result][i][j], x.at[i], y.at[j], Scalar{});
    }
  }

  __device__ void similarity(Scalar* const (&operand)[4], int grams, bool diagonal, int depth) {
    for (int k = 16 * team(); k < depth; k += 16 * kTeams) {
      const Left t_i = Left::of_rows(operand[0], k), a_i = Left::of_rows(operand[1], k);
      const Right t_j = Right::of_rows(operand[2], k), a_j = Right::of_rows(operand[3], k);
      add(0, t_i, a_j);
      if (!diagonal) add(1, a_i, t_j);
      if (grams > 0) add(2, a_i, a_j);
      if (grams > 1) add(3, t_i, t_j);
    }
  }
  __device__ void gradient(int result, const Scalar* M, const Scalar* V) {
    for (int k = 16 * team(); k < kGradientDepth; k += 16 * kTeams)
      add(result, Left::of_columns(M, k), Right::of_columns(V, k));
  }

  template <class Put>
  __device__ void each(int result, const Put& put) const {
    SUPCLAP_UNROLL
    for (int i = 0; i < kDown; ++i) {
      SUPCLAP_UNROLL
      for (int j = 0; j < kAcross; ++j) {
        SUPCLAP_UNROLL
        for (int n = 0; n < 4; ++n)
          put(row() + 16 * i + lane() / 4 + n / 2 * 8, column() + 8 * j + lane() % 4 * 2 + n % 2,
              sum[result][i][j][n]);
      }
    }
  }
};

template <class Scalar, int B, int kResults>
using ProductOf = std::conditional_t<sizeof(Scalar) == 4, Product<Scalar, B, kResults>,
                                     TensorProduct<Scalar, B, kResults>>;

}  // namespace supclap::cuda
