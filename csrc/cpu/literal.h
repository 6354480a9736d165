// Literal rows: their support vectors are taken from the rows themselves, in double. Where c = R /
// r or 1 / r is large, Q - S loses digits that c and 1 / r multiply. The tiles skip the support
// vectors of these rows; here they are multiplied out, s_i against every row.
// Included by epilogue.cpp inside its namespace.

constexpr int64_t kLiteralChunk = 64;  // literal rows at a time
constexpr int64_t kLiteralBlock = 64;  // of the rows that they are compared with

// One direction of support vectors: rows X move towards Y and are compared with Y.
template <class Real>
struct LiteralSide {
  Direction direction;
  const Real *X, *Y;
  RowSum support;
  LiteralSide(const CpuProblem& p, Direction direction)
      : direction(direction),
        X(static_cast<const Real*>(direction == kSupportRows ? p.T : p.A)),
        Y(static_cast<const Real*>(direction == kSupportRows ? p.A : p.T)),
        support(direction == kSupportRows ? kSupportText : kSupportAudio) {}
};

// A chunk of literal rows of one side, with its working memory.
template <class Real>
struct LiteralChunk {
  int64_t count = 0;
  int64_t index[kLiteralChunk];                 // of the rows
  double gap[kLiteralChunk], c[kLiteralChunk];  // r, R / r
  double inverse[kLiteralChunk];                // 1 / |s| with renormalize, else 1
  double *s, *ds;                               // [count, D]
  double *product, *z;                          // [count, N]: <s, y> / |s|; logits,
                                                // -inf where a pair is left out
  double* memory;

  explicit LiteralChunk(const CpuProblem& p) : memory(new double[2 * kLiteralChunk * (p.D + p.N)]) {
    s = memory;
    ds = s + kLiteralChunk * p.D;
    product = ds + kLiteralChunk * p.D;
    z = product + kLiteralChunk * p.N;
  }
  ~LiteralChunk() { delete[] memory; }
};

inline bool is_negative(const CpuProblem& p, int64_t i, int64_t j) {
  if (p.split && (i < p.split) == (j < p.split)) return false;
  return i != j && !(p.code && p.code[i] == p.code[j]);
}

// Fills the chunk with the literal rows from `next` on, and what it holds of them; advances `next`.
template <class Real>
void fill_literal(const CpuProblem& p, const LiteralSide<Real>& side, int64_t& next,
                  LiteralChunk<Real>& chunk) {
  const Rows<Real> row(p);
  chunk.count = 0;
  for (; next < p.N && chunk.count < kLiteralChunk; ++next)
    if (row[kOffset][next] != Real(0)) chunk.index[chunk.count++] = next;
  for (int64_t n = 0; n < chunk.count; ++n) {
    const int64_t i = chunk.index[n];
    const Real *x = side.X + i * p.D, *y = side.Y + i * p.D;
    double square = kEps * kEps, length = 0;
    for (int64_t d = 0; d < p.D; ++d) square += (double(y[d]) - x[d]) * (double(y[d]) - x[d]);
    const double r = chunk.gap[n] = sqrt(square), c = chunk.c[n] = row.radius(i) / r;
    double* s = chunk.s + n * p.D;
    for (int64_t d = 0; d < p.D; ++d) {
      s[d] = x[d] + c * (double(y[d]) - x[d]);
      length += s[d] * s[d];
    }
    chunk.inverse[n] = p.renormalize ? inverse_length(length) : 1;
  }
  const double b = p.infonce ? 0 : p.b;
  const int64_t blocks = (p.N + kLiteralBlock - 1) / kLiteralBlock;
  run(p, blocks, chunk.count * p.N * p.D, [&](int64_t block) {
    const int64_t j0 = block * kLiteralBlock;
    const int64_t nj = p.N - j0 < kLiteralBlock ? p.N - j0 : kLiteralBlock;
    multiply(Matrix<double>{chunk.s, p.D, 1}, Matrix<Real>{side.Y + j0 * p.D, 1, p.D}, chunk.count,
             nj, p.D, chunk.product + j0, p.N, false, false, 1);
    for (int64_t n = 0; n < chunk.count; ++n)
      for (int64_t j = j0; j < j0 + nj; ++j) {
        double& product = chunk.product[n * p.N + j];
        product *= chunk.inverse[n];
        chunk.z[n * p.N + j] =
            is_negative(p, chunk.index[n], j) ? p.k * product + b : -double(INFINITY);
      }
  });
}

// Calls body(side, chunk) for every chunk of literal rows of every side.
template <class Real, class Body>
void for_literal(const CpuProblem& p, Body body) {
  LiteralChunk<Real> chunk(p);
  for (int n = 0; n < (p.mirror ? 2 : 1); ++n) {
    const LiteralSide<Real> side(p, n ? kOtherRows : kSupportRows);
    for (int64_t next = 0; next < p.N;) {
      fill_literal(p, side, next, chunk);
      if (chunk.count) body(side, chunk);
    }
  }
}

// Puts the literal rows' (m, l) of the negatives into `running`; shared: adds them to the columns'.
template <class Real>
void literal_statistics(const CpuProblem& p) {
  for_literal<Real>(p, [&](const LiteralSide<Real>& side, const LiteralChunk<Real>& chunk) {
    for (int64_t n = 0; n < chunk.count; ++n) {
      const double* z = chunk.z + n * p.N;
      double m = kHidden, l = 0;
      for (int64_t j = 0; j < p.N; ++j) m = z[j] > m ? z[j] : m;
      for (int64_t j = 0; j < p.N; ++j)
        l += p.infonce ? exp_nonpositive(z[j] - m) : softplus_of(z[j]);
      p.running[side.direction * p.N + chunk.index[n]] = p.infonce ? m : kHidden;
      p.running[(kDirections + side.direction) * p.N + chunk.index[n]] = l;
      for (int64_t j = 0; p.shared && j < p.N; ++j)
        if (z[j] > 0.5 * kHidden)
          merge(p.running[kOtherRows * p.N + j], p.running[(kDirections + kOtherRows) * p.N + j],
                z[j], 1, true);
    }
  });
}

// The slope towards the logit of a literal row's positive.
template <class Real>
double literal_positive(const CpuProblem& p, const LiteralSide<Real>& side,
                        const LiteralChunk<Real>& chunk, int64_t n) {
  const Real* f = static_cast<const Real*>(p.factors) + kDirections * p.N;
  const Real* others = static_cast<const Real*>(p.state) + kStateOthers * p.N;
  const int64_t i = chunk.index[n], own = side.direction * p.N + i;
  if (p.infonce) {
    const int64_t other = kOtherRows * p.N + i;
    return -double(f[own]) * others[own] - (p.shared ? double(f[other]) * others[other] : 0);
  }
  const double z = p.k * chunk.product[n * p.N + i] + p.b;
  return -double(f[own]) * sigmoid(-z, exp(z > 0 ? -z : z));
}

// Adds the literal rows' part of the SVR gradient to dT, dA [N, D] (null: frozen) and to `sums`.
template <class Real>
void literal_gradients(const CpuProblem& p, Real* dT, Real* dA) {
  const Real* m = static_cast<const Real*>(p.factors);
  const Real* f = m + kDirections * p.N;
  const Rows<Real> row(p);
  for_literal<Real>(p, [&](const LiteralSide<Real>& side, LiteralChunk<Real>& chunk) {
    const int64_t N = p.N, D = p.D;
    const bool text = side.direction == kSupportRows;
    Real *dX = text ? dT : dA, *dY = text ? dA : dT;
    double* H = chunk.z;
    for (int64_t n = 0; n < chunk.count; ++n) {
      const int64_t i = chunk.index[n], own = side.direction * N + i;
      const double *z = chunk.z + n * N, *product = chunk.product + n * N;
      const double positive = p.split ? 0 : literal_positive(p, side, chunk, n);
      double support = 0, bias = 0;
      for (int64_t j = 0; j < N; ++j) {
        double h;
        if (p.infonce) {
          h = exp_nonpositive(z[j] - m[own]) * f[own];
          if (p.shared) h += exp_nonpositive(z[j] - m[kOtherRows * N + j]) * f[kOtherRows * N + j];
        } else {
          h = sigmoid(z[j], exp_nonpositive(z[j] > 0 ? -z[j] : z[j])) * f[own];
        }
        support += h * product[j];
        bias += h;
        H[n * N + j] = p.k * chunk.inverse[n] * (j == i ? positive : h);
      }
      p.sums[side.support * N + i] += support;
      p.sums[kBias * N + i] += bias;
    }
    multiply(Matrix<double>{H, N, 1}, Matrix<Real>{side.Y, D, 1}, chunk.count, D, N, chunk.ds, D,
             false, false, p.threads);
    if (dY)
      multiply(Matrix<double>{H, 1, N}, Matrix<double>{chunk.s, D, 1}, N, D, chunk.count, dY, D,
               true, false, p.threads);
    for (int64_t n = 0; n < chunk.count; ++n) {
      const int64_t i = chunk.index[n];
      const Real *x = side.X + i * D, *y = side.Y + i * D;
      double *ds = chunk.ds + n * D, *s = chunk.s + n * D;
      // Of the gradient of s / |s|, the part tangent to the sphere.
      double along = p.renormalize ? dot(ds, s, D) * chunk.inverse[n] * chunk.inverse[n] : 0;
      double rho = 0;
      for (int64_t d = 0; d < D; ++d) {
        ds[d] -= along * s[d];
        rho += ds[d] * (double(y[d]) - x[d]);
      }
      p.sums[kRhoLiteral * N + i] += rho / chunk.gap[n] * row[kGap][i];
      for (int64_t d = 0; d < D; ++d) {
        if (dX) dX[i * D + d] += Real((1 - chunk.c[n]) * ds[d]);
        if (dY) dY[i * D + d] += Real(chunk.c[n] * ds[d]);
      }
    }
  });
}
