// What a CUDA kernel gets: one struct of device addresses and numbers, every field with its
// shape. Symbols as in MATH.md; directions and row quantities as in params.h.
//
// Products and logits are in the units of the Triton kernels: logits in base 2, z = k log2(e)
// <x, y>, and the sums and products of the gradient without k, as multiples of `unit`.
#pragma once

#include <cstdint>

#include "formulas.h"
#include "params.h"

namespace supclap::cuda {

constexpr int kThreads = 256;  // of every block, but those of hopper/

enum Dtype { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

struct CudaProblem {
  int64_t N, D;
  int64_t width;  // columns of the operands: D and zeros, a multiple of 16 bytes
  int dtype, mode;
  int infonce;  // else SigLIP
  int renormalize, normalize;
  int stats;             // write what SVRStats needs, too
  int per_row_radius;    // R is [N], else [1]
  int per_row_upstream;  // the upstream gradient is [N], else [1]
  int out_single;
  int64_t split;  // > 0: only pairs of a row before `split` with a row from there on; no positives
  float alpha, beta;
  float row_scale;  // 1 / N for reduction "mean", else 1
  // The embeddings as given, any strides (in elements), and as the products read them.
  const void *text, *audio;                  // [N, D] dtype
  int64_t text_n, text_d, audio_n, audio_d;  // strides
  void *T, *A;                               // [N, width] dtype, contiguous
  const float* radius;                       // [N] or [1], or null: no radius
  const float* scale;                        // [1] k
  const float* bias;                         // [1] b, SigLIP only
  const float* weight;                       // [N], or null: ones
  const int64_t* ids;                        // [N], or null
  const float* upstream;                     // [N] or [1], or null: 1
  // Passed from sweep to sweep, float32.
  float* state;       // [22, N]
  float* running;     // [10, N] planes of the statistics, of the negatives
  float* similarity;  // [2, N] single launch: the last two of them, with `stats`
  float* omega;       // [N] upstream gradient x weight x row_scale
  float* bounds;      // [3, blocks of row_weights] maxima over rows: omega, -omega, gain
  float* factors;     // [8, N] m of each direction, then omega / (l unit), times alpha for s
  float* unit;        // [2] a power of 2, with the omegas' sign if all have the same; of the sweeps
                      // over tiles: 1 where factors may be negative, else 0
  float* sums;        // [7, N]
  float *dT, *dA;     // [N, width] sums of products, or null: frozen
  // Results.
  float* row_loss;             // [N] weight x row_scale x the row's loss
  float* terms;                // [6, N] or null: l_t2a, l_a2t, l_svr, l_cons, beaten twice
  void *out_text, *out_audio;  // [N, D] dtype, or float32 with out_single; or null
  const float* after;  // [1] or null: multiplies the final gradients, whose sums were taken for
                       // an upstream gradient of 1 (single launch)
  float* row_scalars;  // [2, N] dk, db of each row
  float* row_radius;   // [N] dR of each row
  float *out_scale, *out_bias;  // [1]
  float* out_radius;            // [1] sum of row_radius, or null
  unsigned* counter;            // [1] 0 between launches
};

// How many of Q and K the mode has.
SUPCLAP_HD int grams_of(const CudaProblem& p) {
  return p.mode == kPlain ? 0 : p.mode == kMirror ? 2 : 1;
}

// The part of a tile pair that leaves one partial result for each row and each column.
constexpr int kPanelRows = 32, kPanelColumns = 128;

// A tile pair of the panel engine: rows [i0, i0 + ni) against rows [j0, j0 + nj). Blocks S, P (off
// the diagonal), Q, K of `size` float32 each, in rows of ld; both sides padded to whole blocks.
struct PanelTile {
  int64_t i0, j0;
  int ni, nj;
  int64_t ld, size;
};

// Working memory of one tile pair; null for what a sweep does without.
struct PanelScratch {
  const float* panel;
  void* weights;           // laid out like the panel, in the embeddings' dtype
  float *part_i, *part_j;  // [kPlanes, slots, n] partial statistics of rows and of columns
  float *sums_i, *sums_j;  // [kTileSums, slots, n] partial sums
};

// How the single launch cuts a problem.
struct SinglePlan {
  int side;    // B
  int tiles;   // of N
  int pairs;   // tile pairs
  int kept;    // pairs whose tiles a block keeps from phase to phase; 1 may be kept for one phase
  int slices;  // blocks that share a pair's columns of D, where there are few pairs
  int slice;   // columns of D in a slice
  int blocks;
  int64_t shared;   // bytes
  int64_t scratch;  // bytes
};

// The single launch's working memory on the device.
struct SingleScratch {
  void* matrices;  // [2 + grams, padded, padded] dtype: W^T, W, V_A + V_A^T, V_T + V_T^T
  float* part;     // [kPlanes, tiles, padded] statistics of row i over the columns of a tile
  float* sums;     // [kTileSums, tiles, padded]
  int* literal;    // [N] list of literal rows, then how many
  float* slices;   // [pairs, plan.slices, 2 + grams, B, B] products
};

}  // namespace supclap::cuda
