// What crosses the boundary between Python and the CPU kernels: one struct, every field with its
// shape; and the layouts that all kernels share. Symbols as in MATH.md. Real is float or double
// (`is_double`), the accumulator's type.
#pragma once

#include <cstdint>

#include "constants.h"

namespace supclap {

// Largest side of a tile of the Gram matrix.
constexpr int64_t kMaxTile = 512;

// Directions of the softmax. A direction has its log-sum-exp as a pair (m, l).
enum Direction {
  kTextRows = 0,     // text i against all audios, over S
  kAudioRows = 1,    // audio j against all texts, over S
  kSupportRows = 2,  // text support vector i against all audios, over X
  kOtherRows = 3,    // mirror: audio support vector j against all texts, over Y;  shared: audio j
                     // against all t_sup, over X
  kDirections = 4
};

// Rows of `state`, each [N]: m of each direction, l, l without the positive, and Geometry.
constexpr int kStateL = kDirections, kStateOthers = 2 * kDirections,
              kStateGeometry = 3 * kDirections;

// The geometry of the rows, each [N].
enum Geometry {
  kGap = 0,        // r
  kC,              // c = R / r
  kTileC,          // c, 0 for literal rows, which the tiles skip
  kOffset,         // 0, or kHidden for literal rows
  kTextInverse,    // 1 / |t_sup| with renormalize, else 1
  kAudioInverse,   // 1 / |a_sup| with renormalize, else 1
  kPositive,       // <t_i, a_i>
  kStepText,       // <e_i, t_i>, e = a - t
  kStepAudio,      // <e_i, a_i>
  kPanelPositive,  // <t_i, a_i> as the panel's product gave it: what the ranks are compared with
  kGeometryRows
};
constexpr int kStateRows = kStateGeometry + kGeometryRows;

// Rows of `sums`, each [N]. g, h, u are the slopes towards the logits, without k and 1 / |s|; x and
// y the products with the support vectors, with 1 / |s|. The GPU's kernels keep all of them without
// k, as multiples of `unit`, with logits in base 2 for products (cuda/problem.h).
enum RowSum {
  kBase = 0,      // sum_j g_ij S_ij over what row i of a tile saw
  kBias,          // sum_j g + h + u over what row i of a tile saw
  kRhoText,       // sum_j h_ij (Q_ij - S_ij)
  kRhoAudio,      // sum_j u_ij (K_ij - S_ji)
  kSupportText,   // sum_j h_ij x_ij
  kSupportAudio,  // sum_j u_ij y_ij
  kRhoLiteral,    // r_i rho_i of a literal row, with k, positive included
  kRowSums
};
constexpr int kTileSums = kRhoLiteral;  // those that tiles add to

// Planes of the GPU's partial statistics come in pairs: m and l of each direction, then the sum and
// the count of the negatives' logits.
constexpr int kSimilarity = kDirections;
constexpr int kPlanes = 2 * kDirections + 2;

// Modes of the support vectors.
enum Mode {
  kPlain = 0,     // there are none: the plain loss
  kOneSided = 1,  // of the texts
  kShared = 2,    // of the texts, in both directions of the softmax
  kMirror = 3     // of the texts, and of the audios
};

struct CpuProblem {
  int64_t N, D;
  int is_double;  // Real is double
  int infonce;    // else SigLIP
  int svr;        // support vectors exist
  int mirror;     // bilateral="mirror"
  int shared;     // bilateral="shared" (InfoNCE)
  int renormalize;
  int mean;            // reduction="mean": the loss is divided by N
  int per_row;         // reduction="none": the loss and its upstream gradient are [N], else [1]
  int per_row_radius;  // R is [N], else [1]
  int threads;
  int64_t split;  // > 0: only pairs of a row before it with one from it on, and no positives
  double k, b, alpha, beta;
  const void* T;         // [N, D] Real, contiguous
  const void* A;         // [N, D] Real, contiguous
  const void* R;         // [N] or [1] Real, or null
  const void* w;         // [N] Real, or null: ones
  const int32_t* code;   // [N] equal where ids are equal, or null
  void* rows;            // [kGeometryRows, N] Real
  double* running;       // [2 kDirections, N] m, then l, of the negatives (SigLIP: l is the loss)
  void* state;           // [3 kDirections, N] Real: m, l, l without the positive
  const void* upstream;  // [N] or [1] Real: gradient that arrives at the loss, or null: 1
  void* omega;           // [N] Real: upstream gradient x weight x 1/N
  void* factors;  // [2 kDirections, N] Real: m, then omega / l (times alpha for support vectors)
  double* sums;   // [kRowSums, N]
};

// A small batch, whose whole pass is one call (cpu/small.h). `problem` has the options; of its
// pointers R, w, state and upstream.
struct SmallBatch {
  CpuProblem problem;
  int normalize;
  const void *text, *audio;  // [N, D] Real as given, contiguous
  const void *scale, *bias;  // [1] Real: k, b; a null bias is 0
  const int64_t* ids;        // [N] or null
  void* memory;              // small_bytes of working memory
  void* loss;                // [N] or [1] Real
  double* terms;             // [6, N] as of finish_statistics, or null
  double* similarity;        // [2] sum and number of <t, a> over the negatives, or null
  void *dT, *dA;             // [N, D] Real; null: frozen
  void *dR, *scalars;        // [N] Real, of which a 0-d radius uses one; [2] Real: dk, db; null: no
                             // gradient at all
};

// A product by the kernels' own micro-kernel (cpu/products.h).
struct Product {
  int is_double;
  const void *X, *Y;
  int64_t x_row, x_column, y_row, y_column;
  int64_t M, N, K;
  void* C;
  int64_t ldc;
  int add;
  int threads;
};

// One tile: rows I = [i0, i0 + ni) and columns J = [j0, j0 + nj), j0 > i0 or I = J. A panel holds
// these blocks, each [ni, nj], one after the other: S = T_I A_J^T; its mirrored product P = A_I
// T_J^T = S_JI^T (if I != J); Q = A_I A_J^T (if svr); K = T_I T_J^T (if mirror).
struct Tile {
  int64_t i0, ni, j0, nj;
};

// Rows [i0, i0 + ni) of one direction against nj further columns, whose products [ni, nj] are in a
// panel.
struct OneWay {
  int direction;
  int64_t i0, ni, nj;
  const int32_t* code;  // [nj] of the columns, or null
};

}  // namespace supclap
