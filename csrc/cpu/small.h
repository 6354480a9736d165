// The whole pass of a small batch: one tile, whose products are our own, and everything around it.
// Included by epilogue.cpp inside its namespace.

// 1 / |x|, or 1 / kMinNorm for shorter rows.
template <class Real>
double inverse_norm(const Real* x, int64_t D) {
  const double length = sqrt(dot(x, x, D));
  return 1 / (length > kMinNorm ? length : kMinNorm);
}

// Copies rows X [N, D] to `out`, divided by their length.
template <class Real>
void normalize_rows(const CpuProblem& p, const Real* X, Real* out) {
  for (int64_t i = 0; i < p.N; ++i, X += p.D, out += p.D) {
    const double inverse = inverse_norm(X, p.D);
    for (int64_t d = 0; d < p.D; ++d) out[d] = Real(X[d] * inverse);
  }
}

// From the gradient dX of the normalised rows that of the rows X as given, in place: what is
// tangent to the sphere, which is a small difference.
template <class Real>
void normalize_gradient(const CpuProblem& p, const Real* X, Real* dX) {
  for (int64_t i = 0; i < p.N; ++i, X += p.D, dX += p.D) {
    const double inverse = inverse_norm(X, p.D);
    const double along = dot(dX, X, p.D) * inverse * inverse;
    for (int64_t d = 0; d < p.D; ++d) dX[d] = Real((dX[d] - along * X[d]) * inverse);
  }
}

// Gives pairs with equal ids [N] equal codes [N].
inline void code_ids(const int64_t* ids, int64_t N, int32_t* code) {
  for (int64_t i = 0; i < N; ++i) {
    int64_t first = 0;
    while (ids[first] != ids[i]) ++first;
    code[i] = int32_t(first);
  }
}

// out [2] = sum and number of the logits' products <t, a> over the negatives.
template <class Real>
void sum_negatives(const Real* S, int64_t pairs, double* out) {
  double sum = 0, count = 0;
  for (int64_t n = 0; n < pairs; ++n)
    if (!is_hidden(S[n])) {
      sum += double(S[n]);
      count += 1;
    }
  out[0] = sum;
  out[1] = count;
}

constexpr int64_t kSerialProduct = 1 << 22;  // N N D below which threads cost more than they bring

// The working memory of a small batch, one array after the other.
template <class Real>
struct SmallMemory {
  Real *T = nullptr, *A = nullptr;  // [N, D] normalised rows, if asked for
  Real* panel;                      // S, Q, K [N, N] as in Tile
  Real* factors;                    // CpuProblem::factors, and omega
  double* wide;                     // CpuProblem::running, and sums
  int32_t* code;
  int64_t bytes = 0;

  SmallMemory(const CpuProblem& p, bool normalize, char* memory) {
    const int64_t N = p.N, blocks = 1 + (p.svr ? 1 : 0) + (p.mirror ? 1 : 0);
    if (normalize) {
      take(T, N * p.D, memory);
      take(A, N * p.D, memory);
    }
    take(panel, blocks * N * N, memory);
    take(factors, (2 * kDirections + 1) * N, memory);
    take(wide, (2 * kDirections + kRowSums) * N, memory);
    take(code, N, memory);
  }
  template <class Type>
  void take(Type*& array, int64_t count, char* memory) {
    array = reinterpret_cast<Type*>(memory + bytes);
    bytes += (count * int64_t(sizeof(Type)) + 63) / 64 * 64;
  }
};

template <class Real>
int64_t small_bytes(const SmallBatch& batch) {
  return SmallMemory<Real>(batch.problem, batch.normalize, nullptr).bytes;
}

// C [N, N] = X X^T.
template <class Real>
void multiply_symmetric(const CpuProblem& p, const Real* X, Real* C, int threads) {
  const Matrix<Real> left{X, p.D, 1};
  multiply(left, Matrix<Real>{X, 1, p.D}, p.N, p.N, p.D, C, p.N, false, true, threads);
  for (int64_t i = 1; i < p.N; ++i)
    for (int64_t j = 0; j < i; ++j) C[i * p.N + j] = C[j * p.N + i];
}

// dX [N, D] = W Y + V Z, V symmetric or null; W is read across if `transposed`.
template <class Real>
void multiply_weights(const CpuProblem& p, const Real* W, bool transposed, const Real* Y,
                      const Real* V, const Real* Z, Real* dX, int threads) {
  const int64_t N = p.N, D = p.D;
  const Matrix<Real> left = transposed ? Matrix<Real>{W, 1, N} : Matrix<Real>{W, N, 1};
  multiply(left, Matrix<Real>{Y, D, 1}, N, D, N, dX, D, false, false, threads);
  if (V)
    multiply(Matrix<Real>{V, N, 1}, Matrix<Real>{Z, D, 1}, N, D, N, dX, D, true, false, threads);
}

template <class Real>
void small_pass(const SmallBatch& batch) {
  const Kernels& stages = kernels();
  CpuProblem p = batch.problem;
  const int64_t N = p.N, D = p.D;
  const SmallMemory<Real> memory(p, batch.normalize, static_cast<char*>(batch.memory));
  const auto *text = static_cast<const Real*>(batch.text),
             *audio = static_cast<const Real*>(batch.audio);
  const Real *T = text, *A = audio;
  if (batch.normalize) {
    normalize_rows(p, text, memory.T);
    normalize_rows(p, audio, memory.A);
    T = memory.T;
    A = memory.A;
  }
  if (batch.ids) {
    code_ids(batch.ids, N, memory.code);
    p.code = memory.code;
  }
  p.T = T;
  p.A = A;
  p.k = *static_cast<const Real*>(batch.scale);
  p.b = batch.bias ? double(*static_cast<const Real*>(batch.bias)) : 0;
  p.rows = static_cast<Real*>(p.state) + kStateGeometry * N;
  p.factors = memory.factors;
  p.omega = memory.factors + 2 * kDirections * N;
  p.running = memory.wide;
  p.sums = memory.wide + 2 * kDirections * N;
  const int threads = N * N * D < kSerialProduct ? 1 : p.threads;

  stages.prepare_rows(p);
  const Tile tile{0, N, 0, N};
  const Blocks<Real> block(p, tile, memory.panel);
  const Matrix<Real> left{T, D, 1};
  multiply(left, Matrix<Real>{A, 1, D}, N, N, D, block.S, N, false, false, threads);
  if (block.Q) multiply_symmetric(p, A, block.Q, threads);
  if (block.K) multiply_symmetric(p, T, block.K, threads);
  stages.hide_pairs(p, tile, memory.panel);
  stages.statistics(p, tile, memory.panel);
  const bool literal = stages.count_literal(p) > 0;
  if (literal) stages.literal_statistics(p);
  stages.finish_statistics(p, batch.loss, batch.terms);
  if (batch.similarity) sum_negatives(block.S, N * N, batch.similarity);
  if (!batch.scalars) return;

  auto *dT = static_cast<Real*>(batch.dT), *dA = static_cast<Real*>(batch.dA);
  for (int64_t i = 0; i < N; ++i) static_cast<Real*>(batch.dR)[i] = 0;
  stages.prepare_weights(p);
  stages.weights(p, tile, memory.panel, memory.panel);
  if (dT) multiply_weights(p, block.S, false, A, block.K, T, dT, threads);
  if (dA) multiply_weights(p, block.S, true, T, block.Q, A, dA, threads);
  if (literal) stages.literal_gradients(p, dT, dA);
  stages.finish_gradients(p, dT, dA, batch.dR, batch.scalars);
  if (batch.normalize && dT) normalize_gradient(p, text, dT);
  if (batch.normalize && dA) normalize_gradient(p, audio, dA);
}

// The gradients of audio, text (N, D), radius, scale and bias, one after the other as they were
// kept for an upstream gradient of 1, times `upstream` [1]; null: not wanted.
template <class Real>
void scale_gradients(const CpuProblem& p, const void* kept, const void* upstream,
                     void* const* out) {
  const Real factor = *static_cast<const Real*>(upstream);
  const int64_t sizes[] = {p.N * p.D, p.N * p.D, p.per_row_radius ? p.N : 1, 1, 1};
  const int64_t places[] = {p.N * p.D, p.N * p.D, p.N, 1, 1};
  const Real* from = static_cast<const Real*>(kept);
  for (int n = 0; n < 5; from += places[n++]) {
    Real* to = static_cast<Real*>(out[n]);
    for (int64_t i = 0; to && i < sizes[n]; ++i) to[i] = factor * from[i];
  }
}

template <class Real>
void scale(Real* x, int64_t n, Real factor) {
  if (factor == Real(1)) return;
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
