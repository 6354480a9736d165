// Sweep 2: turns the logits of one tile into the weights of the gradient products, and adds up the
// sums of its rows.
// Included by epilogue.cpp inside its namespace.

// What one chunk adds to the sums of the tile's columns: [kRowSums, nj], from kRhoText on.
template <class Real>
struct ColumnSums {
  Real value[kRowSums][kMaxTile];
};

// One row of one half tile. Writes the weights of S to `W`, and adds c H to `V_A` and c U to `V_T`.
template <class Real, bool kInfonce, Mode kMode, bool kSwap>
void half_weights(const CpuProblem& p, const Tile& tile, const Blocks<Real>& row, int64_t i,
                  Real* W, Real* V_A, Real* V_T, ColumnSums<Real>& columns) {
  constexpr bool svr = kMode != kPlain, mirror = kMode == kMirror, shared = kMode == kShared;
  const Rows<Real> rows(p);
  const Real k = Real(p.k), b = Real(kInfonce ? 0 : p.b);
  const Real* S = kSwap ? row.P : row.S;
  const Real *Q = row.Q, *K = row.K;
  const int64_t row_index = tile.i0 + i, column = tile.j0, nj = tile.nj;
  const Real *c = rows[kTileC], *offset = rows[kOffset];
  const Real *nt = rows[kTextInverse], *na = rows[kAudioInverse];
  const Real* m = static_cast<const Real*>(p.factors);
  const Real* f = m + kDirections * p.N;
  const int64_t N = p.N;
  // The gradient of direction d of row n with respect to its logit z.
  const auto slope = [=](Direction d, int64_t n, Real z) __attribute__((always_inline)) {
    if (kInfonce) return exp_nonpositive(z - m[d * N + n]) * f[d * N + n];
    return sigmoid(z, exp_nonpositive(z > Real(0) ? -z : z)) * f[d * N + n];
  };
  Real base = 0, bias = 0, rho_row = 0, support_row = 0;
  Real* rho_column = columns.value[kSwap ? kRhoText : kRhoAudio];
  Real* support_column = columns.value[kSwap ? kSupportText : kSupportAudio];
#pragma omp simd reduction(+ : base, bias, rho_row, support_row)
  for (int64_t j = 0; j < nj; ++j) {
    const int64_t t = kSwap ? column + j : row_index;  // the text of this pair
    const int64_t a = kSwap ? row_index : column + j;  // its audio
    const Real s = S[j], z = logit(s, k, b);
    Real g = slope(kTextRows, t, z);
    if (kInfonce) g += slope(kAudioRows, a, z);
    Real w = g;
    base += g * s;
    bias += g;
    if (svr) {
      const Real diff = Q[j] - s, product = support_product(s, Q[j], c[t]), x = product * nt[t];
      const Real zx = support_logit(product, nt[t], offset[t], k, b);
      Real h = slope(kSupportRows, t, zx);
      if (shared) h += slope(kOtherRows, a, zx);
      const Real rho = h * diff, support = h * x, raw = h * nt[t];
      w += (Real(1) - c[t]) * raw;
      V_A[j] += k * c[t] * raw;
      bias += h;
      if (kSwap) {
        rho_column[j] += rho;
        support_column[j] += support;
      } else {
        rho_row += rho;
        support_row += support;
      }
    }
    if (mirror) {
      const Real diff = K[j] - s, product = support_product(s, K[j], c[a]), y = product * na[a];
      const Real zy = support_logit(product, na[a], offset[a], k, b);
      const Real u = slope(kOtherRows, a, zy), rho = u * diff, support = u * y, raw = u * na[a];
      w += (Real(1) - c[a]) * raw;
      V_T[j] += k * c[a] * raw;
      bias += u;
      if (kSwap) {
        rho_row += rho;
        support_row += support;
      } else {
        rho_column[j] += rho;
        support_column[j] += support;
      }
    }
    W[j] = k * w;
  }
  const auto add = [&](RowSum sum, Real value) { p.sums[sum * N + row_index] += value; };
  add(kBase, base);
  add(kBias, bias);
  // In a half tile the text's sums run along its own axis, the audio's along the other.
  if (svr && !kSwap) {
    add(kRhoText, rho_row);
    add(kSupportText, support_row);
  }
  if (mirror && kSwap) {
    add(kRhoAudio, rho_row);
    add(kSupportAudio, support_row);
  }
}

// Replaces a square block V [n, n], whose diagonal is 0, by V + V^T.
template <class Real>
void symmetrize(const CpuProblem& p, Real* V, int64_t n) {
  run(p, n, n * n, [&](int64_t i) {
    for (int64_t j = 0; j < i; ++j) V[i * n + j] = V[j * n + i] = V[i * n + j] + V[j * n + i];
  });
}

template <class Real, bool kInfonce, Mode kMode>
void weights_mode(const CpuProblem& p, const Tile& tile, const Real* panel, Real* out_panel) {
  const Blocks<Real> block(p, tile, const_cast<Real*>(panel)), out(p, tile, out_panel);
  const int64_t chunks = (tile.ni + kRowChunk - 1) / kRowChunk, nj = tile.nj;
  auto* partial = new ColumnSums<Real>[chunks];
  run(p, chunks, tile.ni * nj, [&](int64_t chunk) {
    ColumnSums<Real>& columns = partial[chunk];
    for (auto& sum : columns.value)
      for (int64_t j = 0; j < nj; ++j) sum[j] = 0;
    for (int64_t i = chunk * kRowChunk; i < tile.ni && i < (chunk + 1) * kRowChunk; ++i) {
      const Blocks<Real> row = block.row(i, nj), out_row = out.row(i, nj);
      // Both halves read Q and K, so these are written when both are done.
      Real V_A[kMaxTile], V_T[kMaxTile];
      for (int64_t j = 0; j < nj; ++j) V_A[j] = V_T[j] = 0;
      half_weights<Real, kInfonce, kMode, false>(p, tile, row, i, out_row.S, V_A, V_T, columns);
      if (row.P)
        half_weights<Real, kInfonce, kMode, true>(p, tile, row, i, out_row.P, V_A, V_T, columns);
      if (out_row.Q)
        for (int64_t j = 0; j < nj; ++j) out_row.Q[j] = V_A[j];
      if (out_row.K)
        for (int64_t j = 0; j < nj; ++j) out_row.K[j] = V_T[j];
    }
  });
  for (int sum = kRhoText; sum <= kSupportAudio; ++sum)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t j = 0; j < nj; ++j)
        p.sums[sum * p.N + tile.j0 + j] += partial[chunk].value[sum][j];
  delete[] partial;
  if (tile.i0 == tile.j0 && out.Q) symmetrize(p, out.Q, tile.ni);
  if (tile.i0 == tile.j0 && out.K) symmetrize(p, out.K, tile.ni);
}

template <class Real>
void weights(const CpuProblem& p, const Tile& tile, const void* panel, void* out) {
  const auto call = [&](auto kernel) {
    kernel(p, tile, static_cast<const Real*>(panel), static_cast<Real*>(out));
  };
  if (p.infonce) {
    if (!p.svr) return call(weights_mode<Real, true, kPlain>);
    if (p.mirror) return call(weights_mode<Real, true, kMirror>);
    if (p.shared) return call(weights_mode<Real, true, kShared>);
    return call(weights_mode<Real, true, kOneSided>);
  }
  if (!p.svr) return call(weights_mode<Real, false, kPlain>);
  if (p.mirror) return call(weights_mode<Real, false, kMirror>);
  return call(weights_mode<Real, false, kOneSided>);
}
