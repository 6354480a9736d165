// The epilogues of the panel engine: what happens to a tile of inner products between two library
// products.
//
// `statistics` turns one tile's logits into partial log-sum-exps, `weights` turns them into the
// gradient's weights; each reads the tile once. A tile of the Gram matrix serves two half tiles: S
// between texts of I and audios of J, and, stored transposed, S between texts of J and audios of I.
// `half<kSwap>` code covers both: in the first a row of the block is a text and a column an audio,
// in the second (kSwap) the other way round.
//
// Compiled once for each instruction set (SUPCLAP_ISA names it), with nothing from the standard
// library that the linker could merge across them. Results do not depend on the number of threads:
// a chunk of kRowChunk rows is one unit of work, and its sums over columns are merged in the
// chunks' order.
#include <math.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "kernels.h"
#include "parallel.h"
#include "vector_math.h"

namespace supclap {
namespace SUPCLAP_ISA {
namespace {

constexpr int64_t kRowChunk = 16;
constexpr int64_t kSerialWork = 1 << 14;  // elements below which threads cost more than they bring

template <class Body>
void run(const CpuProblem& p, int64_t chunks, int64_t work, Body body) {
  const int threads = work < kSerialWork ? 1 : p.threads;
  parallel(chunks, threads, [](void* data, int64_t n) { (*static_cast<Body*>(data))(n); }, &body);
}

// The caller's rows, and CpuProblem::rows by name.
template <class Real>
struct Rows {
  const Real *T, *A, *R;
  Real* base;
  int64_t N, step;
  explicit Rows(const CpuProblem& p)
      : T(static_cast<const Real*>(p.T)),
        A(static_cast<const Real*>(p.A)),
        R(static_cast<const Real*>(p.R)),
        base(static_cast<Real*>(p.rows)),
        N(p.N),
        step(p.per_row_radius) {}
  Real* operator[](int row) const { return base + row * N; }
  double radius(int64_t i) const { return R[i * step]; }
};

// The blocks of one panel, each [ni, nj]; null where the mode has none.
template <class Real>
struct Blocks {
  Real *S = nullptr, *P = nullptr, *Q = nullptr, *K = nullptr;
  Blocks(const CpuProblem& p, const Tile& tile, Real* panel) {
    const int64_t size = tile.ni * tile.nj;
    S = panel;
    panel += size;
    if (tile.i0 != tile.j0) {
      P = panel;
      panel += size;
    }
    if (p.svr) {
      Q = panel;
      panel += size;
    }
    if (p.svr && p.mirror) K = panel;
  }
  Blocks row(int64_t i, int64_t nj) const {
    Blocks result = *this;
    Real** all[] = {&result.S, &result.P, &result.Q, &result.K};
    for (Real** block : all)
      if (*block) *block += i * nj;
    return result;
  }
};

template <class Real>
SUPCLAP_HD bool is_hidden(Real product) {
  return product < Real(0.5 * kHidden);
}

template <class Real>
SUPCLAP_HD Real logit(Real product, Real k, Real b) {
  return is_hidden(product) ? Real(kHidden) : k * product + b;
}

// The logit of a support vector, from `product` <s, y>, `inverse` 1 / |s|, and `offset`, which is
// kHidden where the tiles skip it. A hidden product is looked for before the division by |s|, which
// could lift kHidden over the threshold.
template <class Real>
SUPCLAP_HD Real support_logit(Real product, Real inverse, Real offset, Real k, Real b) {
  return is_hidden(product + offset) ? Real(kHidden) : k * (product * inverse) + b;
}

// x and y of HalfLogits are written only where the mode has them, and read only there.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
// clang-format off: in the order of their needs
#include "products.h"
#include "rows.h"
#include "statistics.h"
#include "weights.h"
#include "literal.h"
#include "one_way.h"
#include "small.h"
// clang-format on

// Selects the kernel for the accumulator's type.
#define SUPCLAP_REAL(call) (p.is_double ? call<double> : call<float>)

}  // namespace

const Kernels& kernels() {
  static const Kernels table = {
      [](const CpuProblem& p) { SUPCLAP_REAL(prepare_rows)(p); },
      [](const CpuProblem& p) { return SUPCLAP_REAL(count_literal)(p); },
      [](const CpuProblem& p, const Tile& t, void* panel) {
        SUPCLAP_REAL(hide_pairs)(p, t, panel);
      },
      [](const CpuProblem& p, const Tile& t, const void* panel) {
        SUPCLAP_REAL(statistics)(p, t, panel);
      },
      [](const CpuProblem& p, void* loss, double* terms) {
        SUPCLAP_REAL(finish_statistics)(p, loss, terms);
      },
      [](const CpuProblem& p) { SUPCLAP_REAL(prepare_weights)(p); },
      [](const CpuProblem& p, const Tile& t, const void* panel, void* out) {
        SUPCLAP_REAL(weights)(p, t, panel, out);
      },
      [](const CpuProblem& p, void* dT, void* dA, void* dR, void* scalars) {
        SUPCLAP_REAL(finish_gradients)(p, dT, dA, dR, scalars);
      },
      [](const CpuProblem& p) { SUPCLAP_REAL(literal_statistics)(p); },
      [](const CpuProblem& p, void* dT, void* dA) {
        p.is_double ? literal_gradients(p, static_cast<double*>(dT), static_cast<double*>(dA))
                    : literal_gradients(p, static_cast<float*>(dT), static_cast<float*>(dA));
      },
      [](const CpuProblem& p, const OneWay& block, void* panel) {
        SUPCLAP_REAL(one_way_statistics)(p, block, panel);
      },
      [](const CpuProblem& p, const OneWay& block, void* panel, void* out) {
        SUPCLAP_REAL(one_way_weights)(p, block, panel, out);
      },
      [](const Product& p) { SUPCLAP_REAL(multiply)(p); },
      [](const SmallBatch& batch) {
        batch.problem.is_double ? small_pass<double>(batch) : small_pass<float>(batch);
      },
      [](const SmallBatch& batch) {
        return batch.problem.is_double ? small_bytes<double>(batch) : small_bytes<float>(batch);
      },
      [](const CpuProblem& p, const void* kept, const void* upstream, void* const* out) {
        SUPCLAP_REAL(scale_gradients)(p, kept, upstream, out);
      },
      [](bool is_double, void* x, int64_t n, const void* factor) {
        is_double ? scale(static_cast<double*>(x), n, *static_cast<const double*>(factor))
                  : scale(static_cast<float*>(x), n, *static_cast<const float*>(factor));
      }};
  return table;
}

}  // namespace SUPCLAP_ISA
}  // namespace supclap
