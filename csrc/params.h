// What crosses the boundary between Python and the kernels: one plain struct, every field with its
// shape. Symbols as in MATH.md. Real is float or double (`is_double`), the accumulator's type.
#pragma once

#include <cstdint>

namespace supclap {

// Logits of pairs that do not take part (the diagonal, equal ids) are set to this value in the
// inner-product panels. It is finite, so that differences of two hidden values are 0 and not NaN;
// anything below half of it is hidden.
constexpr double kHidden = -1e30;

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

// Rows of Problem::rows, each [N].
enum Row {
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
  kRows
};

// Rows of Problem::sums, each [N] double. g, h, u are the slopes towards the logits, without k and
// 1 / |s|; x and y the products with the support vectors, with 1 / |s|.
enum Sum {
  kSumBase = 0,      // sum_j g_ij S_ij over what row i of a tile saw
  kSumBias,          // sum_j g + h + u over what row i of a tile saw
  kSumRhoText,       // sum_j h_ij (Q_ij - S_ij)
  kSumRhoAudio,      // sum_j u_ij (K_ij - S_ji)
  kSumSupportText,   // sum_j h_ij x_ij
  kSumSupportAudio,  // sum_j u_ij y_ij
  kSumRhoLiteral,    // rho_i of rows treated literally, positive included
  kSums
};

struct Problem {
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
  double k, b, alpha, beta;
  const void* T;         // [N, D] Real, contiguous
  const void* A;         // [N, D] Real, contiguous
  const void* R;         // [N] or [1] Real, or null
  const void* w;         // [N] Real, or null: ones
  const int32_t* code;   // [N] equal where ids are equal, or null
  void* rows;            // [kRows, N] Real
  double* running;       // [2 kDirections, N] m, then l, of the negatives (SigLIP: l is the loss)
  void* state;           // [3 kDirections, N] Real: m, l, l without the positive
  const void* upstream;  // [N] or [1] Real: gradient that arrives at the loss, or null: 1
  void* omega;           // [N] Real: upstream gradient x weight x 1/N
  void* factors;  // [2 kDirections, N] Real: m, then omega / l (times alpha for support vectors)
  double* sums;   // [kSums, N]
};

// One tile: rows I = [i0, i0 + ni) and columns J = [j0, j0 + nj), j0 > i0 or I = J. A panel holds
// these blocks, each [ni, nj], one after the other: S_IJ = T_I A_J^T; S_JI^T = A_I T_J^T (if I !=
// J); Q = A_I A_J^T (if svr); K = T_I T_J^T (if mirror).
struct Tile {
  int64_t i0, ni, j0, nj;
};

}  // namespace supclap
