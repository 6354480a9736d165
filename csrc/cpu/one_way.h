// Rows against further columns, which have no row of their own: one direction of the softmax over
// one block of products [ni, nj]. Included by epilogue.cpp inside its namespace.

// Calls body(i, at) for each row of the block, which starts at `at` in its panel.
template <class Body>
void each_row(const CpuProblem& p, const OneWay& block, Body body) {
  const int64_t chunks = (block.ni + kRowChunk - 1) / kRowChunk;
  run(p, chunks, block.ni * block.nj, [&](int64_t chunk) {
    for (int64_t i = chunk * kRowChunk; i < block.ni && i < (chunk + 1) * kRowChunk; ++i)
      body(block.i0 + i, i * block.nj);
  });
}

// Hides the pairs of row i that have one code.
template <class Real>
void hide_row(const CpuProblem& p, const OneWay& block, int64_t i, Real* S) {
  for (int64_t j = 0; block.code && j < block.nj; ++j)
    if (block.code[j] == p.code[i]) S[j] = Real(kHidden);
}

template <class Real>
void one_way_statistics(const CpuProblem& p, const OneWay& block, void* panel) {
  const Real k = Real(p.k), b = Real(p.infonce ? 0 : p.b);
  each_row(p, block, [&](int64_t i, int64_t at) {
    Real* S = static_cast<Real*>(panel) + at;
    hide_row(p, block, i, S);
    Real z[kMaxTile];
#pragma omp simd
    for (int64_t j = 0; j < block.nj; ++j) z[j] = logit(S[j], k, b);
    reduce_row(p, static_cast<Direction>(block.direction), i, z, block.nj);
  });
}

// Sums over a row: g S and g.
template <class Real>
struct SlopeSums {
  Real base = 0, bias = 0;
};

// W [nj] from a row of products S [nj], which may be the same.
template <class Real, bool kInfonce>
SlopeSums<Real> weigh_row(const Real* S, Real* W, int64_t nj, Real k, Real b, Real top,
                          Real factor) {
  Real base = 0, bias = 0;
#pragma omp simd reduction(+ : base, bias)
  for (int64_t j = 0; j < nj; ++j) {
    const Real s = S[j], z = logit(s, k, b);
    const Real g = factor * (kInfonce ? exp_nonpositive(z - top)
                                      : sigmoid(z, exp_nonpositive(z > Real(0) ? -z : z)));
    base += g * s;
    bias += g;
    W[j] = k * g;
  }
  return {base, bias};
}

template <class Real, bool kInfonce>
void one_way_weights_of(const CpuProblem& p, const OneWay& block, Real* panel, Real* out) {
  const Real k = Real(p.k), b = Real(kInfonce ? 0 : p.b);
  const Real* m = static_cast<const Real*>(p.factors) + block.direction * p.N;
  const Real* f = m + kDirections * p.N;
  each_row(p, block, [&](int64_t i, int64_t at) {
    hide_row(p, block, i, panel + at);
    const SlopeSums<Real> sums =
        weigh_row<Real, kInfonce>(panel + at, out + at, block.nj, k, b, m[i], f[i]);
    p.sums[kBase * p.N + i] += sums.base;
    p.sums[kBias * p.N + i] += sums.bias;
  });
}

template <class Real>
void one_way_weights(const CpuProblem& p, const OneWay& block, void* panel, void* out) {
  Real* S = static_cast<Real*>(panel);
  Real* W = static_cast<Real*>(out);
  p.infonce ? one_way_weights_of<Real, true>(p, block, S, W)
            : one_way_weights_of<Real, false>(p, block, S, W);
}
