// The CPU kernels, one table for each instruction set they are compiled for.
#pragma once

#include "../params.h"

namespace supclap {

struct Kernels {
  // Writes rows[kGap .. kStepAudio] and an empty `running`.
  void (*prepare_rows)(const CpuProblem&);
  // Counts the literal rows.
  int64_t (*count_literal)(const CpuProblem&);
  // Hides the pairs of one tile that do not take part, in its panel: the diagonal, and equal ids.
  void (*hide_pairs)(const CpuProblem&, const Tile&, void* panel);
  // Adds the negatives of a panel, whose pairs have been hidden, to `running`.
  void (*statistics)(const CpuProblem&, const Tile&, const void* panel);
  // Merges the positives: state [3 kDirections, N] and the loss, [N] or [1] Real. terms [6, N]
  // double or null: l_t2a, l_a2t, l_svr, l_cons (before the row's weight), and 1 where another
  // scores at least as high as the positive (text rows, audio rows).
  void (*finish_statistics)(const CpuProblem&, void* loss, double* terms);
  // Writes omega, and factors from it and state; clears sums.
  void (*prepare_weights)(const CpuProblem&);
  // Turns the logits of a panel, whose pairs have been hidden, into the weights of Z_J in dZ_I,
  // block by block, in place or into another panel. On the diagonal Q's and K's blocks become V +
  // V^T.
  void (*weights)(const CpuProblem&, const Tile&, const void* panel, void* out);
  // Adds what belongs to the rows alone to dT, dA [N, D] Real (null: frozen); dR [N] or [1] Real
  // (null without a radius); scalars [2] Real = dk, db.
  void (*finish_gradients)(const CpuProblem&, void* dT, void* dA, void* dR, void* scalars);
  // Puts the literal rows' (m, l) of the negatives into `running`.
  void (*literal_statistics)(const CpuProblem&);
  // Adds the literal rows' part of the SVR gradient to dT, dA [N, D] Real (null: frozen), `sums`.
  void (*literal_gradients)(const CpuProblem&, void* dT, void* dA);
  // Adds a block of rows against further columns to `running`; hides its pairs of equal code.
  void (*one_way_statistics)(const CpuProblem&, const OneWay&, void* panel);
  // Hides the pairs of equal code (a block without codes is only read), and turns the block into the
  // weights of the columns in the rows' gradient, in place or into another panel; adds to `sums`.
  void (*one_way_weights)(const CpuProblem&, const OneWay&, void* panel, void* out);
  // C [M, N] Real = X Y, or C += X Y; an element of X [M, K] and of Y [K, N] is found by two steps,
  // of which one is 1.
  void (*multiply)(const Product&);
  // The whole pass of a small batch, and the bytes of working memory it needs.
  void (*small_pass)(const SmallBatch&);
  int64_t (*small_bytes)(const SmallBatch&);
  // Multiplies the gradients that small_pass left by the upstream gradient [1].
  void (*scale_gradients)(const CpuProblem&, const void* kept, const void* upstream,
                          void* const* out);
  // Multiplies x [n] Real by `factor` [1].
  void (*scale)(bool is_double, void* x, int64_t n, const void* factor);
};

namespace baseline {
const Kernels& kernels();
}
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}

}  // namespace supclap
