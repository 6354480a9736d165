// Sweep 1: partial log-sum-exps (InfoNCE) or sums of softplus (SigLIP) of the negatives of one
// tile. Included by epilogue.cpp inside its namespace.

// The logits of kRowChunk rows of one half tile: those of S, of X = <t_sup, a> and of Y = <a_sup,
// t>, each [rows, nj].
template <class Real>
struct HalfLogits {
  Real s[kRowChunk * kMaxTile], x[kRowChunk * kMaxTile], y[kRowChunk * kMaxTile];
};

template <class Real, bool kSwap>
void half_logits(const CpuProblem& p, const Tile& tile, const Blocks<Real>& row, int64_t i,
                 HalfLogits<Real>& out, int64_t at) {
  const Rows<Real> rows(p);
  const Real k = Real(p.k), b = Real(p.infonce ? 0 : p.b);
  const Real* S = kSwap ? row.P : row.S;
  const int64_t row_index = tile.i0 + i, column = tile.j0, nj = tile.nj;
#pragma omp simd
  for (int64_t j = 0; j < nj; ++j) out.s[at + j] = logit(S[j], k, b);
  if (!p.svr) return;
  const Real *c = rows[kTileC], *offset = rows[kOffset];
  const Real *nt = rows[kTextInverse], *na = rows[kAudioInverse];
#pragma omp simd
  for (int64_t j = 0; j < nj; ++j) {
    const int64_t t = kSwap ? column + j : row_index;
    out.x[at + j] = support_logit(support_product(S[j], row.Q[j], c[t]), nt[t], offset[t], k, b);
  }
  if (!p.mirror) return;
#pragma omp simd
  for (int64_t j = 0; j < nj; ++j) {
    const int64_t a = kSwap ? row_index : column + j;
    out.y[at + j] = support_logit(support_product(S[j], row.K[j], c[a]), na[a], offset[a], k, b);
  }
}

template <class Real>
SUPCLAP_HD Real softplus_of(Real z) {
  return softplus(z, log1p_unit(exp_nonpositive(z > Real(0) ? -z : z)));
}

// Adds (m, l) to the running pair of one row and direction.
SUPCLAP_HD void merge(double& m, double& l, double m_new, double l_new, bool infonce) {
  if (!infonce) {
    m = m_new > m ? m_new : m;
    l += l_new;
  } else if (m_new > m) {
    l = l * exp(m - m_new) + l_new;
    m = m_new;
  } else {
    l += m_new == m ? l_new : l_new * exp(m_new - m);
  }
}

// Adds one row of logits z [nj] to the running pair of row i of `direction`.
template <class Real>
void reduce_row(const CpuProblem& p, Direction direction, int64_t i, const Real* z, int64_t nj) {
  Real m = Real(kHidden), l = 0;
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < nj; ++j) m = z[j] > m ? z[j] : m;
  if (p.infonce) {
#pragma omp simd reduction(+ : l)
    for (int64_t j = 0; j < nj; ++j) l += exp_nonpositive(z[j] - m);
  } else {
#pragma omp simd reduction(+ : l)
    for (int64_t j = 0; j < nj; ++j) l += softplus_of(z[j]);
  }
  merge(p.running[direction * p.N + i], p.running[(kDirections + direction) * p.N + i], m, l,
        p.infonce);
}

// Reduces the columns of a chunk's logits z [rows, nj] to pairs m, l [nj].
template <class Real>
void reduce_columns(const CpuProblem& p, const Real* z, int64_t rows, int64_t nj, Real* m,
                    Real* l) {
  for (int64_t j = 0; j < nj; ++j) {
    m[j] = Real(kHidden);
    l[j] = 0;
  }
  for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
    for (int64_t j = 0; j < nj; ++j) m[j] = z[i * nj + j] > m[j] ? z[i * nj + j] : m[j];
  if (p.infonce) {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
      for (int64_t j = 0; j < nj; ++j) l[j] += exp_nonpositive(z[i * nj + j] - m[j]);
  } else {
    for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
      for (int64_t j = 0; j < nj; ++j) l[j] += softplus_of(z[i * nj + j]);
  }
}

// Merges the chunks' pairs [chunks, 2, nj] of one direction into the running pairs of rows j0 .. j0
// + nj.
template <class Real>
void merge_columns(const CpuProblem& p, Direction direction, int64_t j0, int64_t nj,
                   const Real* partial, int64_t chunks) {
  Real top[kMaxTile], l[kMaxTile];
  for (int64_t j = 0; j < nj; ++j) {
    top[j] = Real(kHidden);
    l[j] = 0;
  }
  for (int64_t n = 0; n < chunks; ++n) {
    const Real* m = partial + 2 * n * nj;
#pragma omp simd
    for (int64_t j = 0; j < nj; ++j) top[j] = m[j] > top[j] ? m[j] : top[j];
  }
  for (int64_t n = 0; n < chunks; ++n) {
    const Real *m = partial + 2 * n * nj, *part = m + nj;
#pragma omp simd
    for (int64_t j = 0; j < nj; ++j)
      l[j] += p.infonce ? part[j] * exp_nonpositive(m[j] - top[j]) : part[j];
  }
  for (int64_t j = 0; j < nj; ++j)
    merge(p.running[direction * p.N + j0 + j], p.running[(kDirections + direction) * p.N + j0 + j],
          top[j], l[j], p.infonce);
}

// Hides the pairs of a panel that do not take part; keeps what the product gave for the positives.
template <class Real>
void hide_pairs(const CpuProblem& p, const Tile& tile, void* panel) {
  const Rows<Real> rows(p);
  const Blocks<Real> block(p, tile, static_cast<Real*>(panel));
  const bool diagonal = tile.i0 == tile.j0;
  run(p, tile.ni, p.code ? tile.ni * tile.nj : tile.ni, [&](int64_t i) {
    const Blocks<Real> row = block.row(i, tile.nj);
    const auto hide = [&](int64_t j) {
      row.S[j] = Real(kHidden);
      if (row.P) row.P[j] = Real(kHidden);
      if (row.Q) row.Q[j] = Real(kHidden);
      if (row.K) row.K[j] = Real(kHidden);
    };
    if (diagonal) rows[kPanelPositive][tile.i0 + i] = row.S[i];
    if (diagonal) hide(i);
    for (int64_t j = 0; p.code && j < tile.nj; ++j)
      if (p.code[tile.j0 + j] == p.code[tile.i0 + i]) hide(j);
  });
}

template <class Real>
void statistics(const CpuProblem& p, const Tile& tile, const void* panel) {
  const Blocks<Real> block(p, tile, static_cast<Real*>(const_cast<void*>(panel)));
  const int64_t chunks = (tile.ni + kRowChunk - 1) / kRowChunk, nj = tile.nj;
  const bool both = block.P != nullptr, other = p.mirror || p.shared;
  Real* partial = new Real[kDirections * chunks * 2 * nj];
  const auto columns = [&](Direction d, int64_t chunk) {
    return partial + (d * chunks + chunk) * 2 * nj;
  };
  run(p, chunks, tile.ni * nj, [&](int64_t chunk) {
    HalfLogits<Real> z;
    const int64_t start = chunk * kRowChunk;
    const int64_t count = tile.ni - start < kRowChunk ? tile.ni - start : kRowChunk;
    const auto row_pass = [&](Direction d, const Real* logits) {
      for (int64_t n = 0; n < count; ++n)
        reduce_row(p, d, tile.i0 + start + n, logits + n * nj, nj);
    };
    const auto column_pass = [&](Direction d, const Real* logits) {
      Real* out = columns(d, chunk);
      reduce_columns(p, logits, count, nj, out, out + nj);
    };
    for (int64_t n = 0; n < count; ++n)
      half_logits<Real, false>(p, tile, block.row(start + n, nj), start + n, z, n * nj);
    row_pass(kTextRows, z.s);
    column_pass(kAudioRows, z.s);
    if (p.svr) row_pass(kSupportRows, z.x);
    if (p.svr && p.mirror) column_pass(kOtherRows, z.y);
    if (p.svr && p.shared) column_pass(kOtherRows, z.x);
    if (!both) return;
    for (int64_t n = 0; n < count; ++n)
      half_logits<Real, true>(p, tile, block.row(start + n, nj), start + n, z, n * nj);
    row_pass(kAudioRows, z.s);
    column_pass(kTextRows, z.s);
    if (p.svr) column_pass(kSupportRows, z.x);
    if (p.svr && p.mirror) row_pass(kOtherRows, z.y);
    if (p.svr && p.shared) row_pass(kOtherRows, z.x);
  });
  const bool used[kDirections] = {both, true, both && p.svr, p.svr && other};
  run(p, kDirections, chunks * nj, [&](int64_t d) {
    const Direction direction = static_cast<Direction>(d);
    if (used[d]) merge_columns(p, direction, tile.j0, nj, columns(direction, 0), chunks);
  });
  delete[] partial;
}
