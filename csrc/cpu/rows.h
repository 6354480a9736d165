// Work that is O(N D): the geometry of the rows before the tiles, and what belongs to the rows
// alone after them. Included by epilogue.cpp inside its namespace.

// <x, y> in double, for the small differences that c = R / r multiplies.
template <class Real>
double dot(const Real* x, const Real* y, int64_t D) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += double(x[d]) * double(y[d]);
  return sum;
}

// 1 / |s| from |s|^2, or 1 / kMinLength for shorter vectors, so that nothing overflows.
inline double inverse_length(double square) {
  const double length = sqrt(square);
  return 1 / (length > kMinLength ? length : kMinLength);
}

template <class Real>
void prepare_rows(const CpuProblem& p) {
  const int64_t chunks = (p.N + kRowChunk - 1) / kRowChunk;
  run(p, chunks, p.N * p.D, [&](int64_t chunk) {
    Rows<Real> row(p);
    for (int64_t i = chunk * kRowChunk; i < p.N && i < (chunk + 1) * kRowChunk; ++i) {
      const Real* t = row.T + i * p.D;
      const Real* a = row.A + i * p.D;
      row[kPositive][i] = Real(dot(t, a, p.D));
      if (!p.R) {
        for (int n = kGap; n < kGeometryRows; ++n)
          if (n != kPositive) row[n][i] = 0;
        continue;
      }
      double ee = 0, et = 0, ea = 0, tt = 0, aa = 0;
#pragma omp simd reduction(+ : ee, et, ea, tt, aa)
      for (int64_t d = 0; d < p.D; ++d) {
        const double x = t[d], y = a[d], e = y - x;
        ee += e * e;
        et += e * x;
        ea += e * y;
        tt += x * x;
        aa += y * y;
      }
      const double r = sqrt(ee + kEps * kEps), c = row.radius(i) / r;
      const double text = tt + 2 * c * et + c * c * ee, audio = aa - 2 * c * ea + c * c * ee;
      // Squared, as `text` and `audio` are.
      const double length = tt > aa ? tt : aa;
      const bool short_support =
          p.renormalize && (text < kLiteralLength * kLiteralLength * length ||
                            audio < kLiteralLength * kLiteralLength * length);
      const bool literal = c > kLiteralC || c < -kLiteralC ||
                           r * r < kLiteralGap * kLiteralGap * length || short_support;
      row[kGap][i] = Real(r);
      row[kC][i] = Real(c);
      row[kTileC][i] = literal ? Real(0) : Real(c);
      row[kOffset][i] = literal ? Real(kHidden) : Real(0);
      row[kStepText][i] = Real(et);
      row[kStepAudio][i] = Real(ea);
      row[kTextInverse][i] = p.renormalize ? Real(inverse_length(text)) : Real(1);
      row[kAudioInverse][i] = p.renormalize ? Real(inverse_length(audio)) : Real(1);
    }
  });
  for (int64_t n = 0; n < kDirections * p.N; ++n) {
    p.running[n] = kHidden;
    p.running[kDirections * p.N + n] = 0;
  }
}

template <class Real>
int64_t count_literal(const CpuProblem& p) {
  const Rows<Real> row(p);
  int64_t literal = 0;
  for (int64_t i = 0; p.svr && i < p.N; ++i) literal += row[kOffset][i] != Real(0);
  return literal;
}

// Inner products of the positives with the support vectors: <t_sup_i, a_i> and <a_sup_i, t_i>.
template <class Real>
struct Positive {
  double s, x, y;
  Positive(const CpuProblem& p, const Rows<Real>& row, int64_t i)
      : s(row[kPositive][i]), x(0), y(0) {
    if (!p.svr) return;
    const double c = row[kC][i];
    x = (s + c * row[kStepAudio][i]) * row[kTextInverse][i];
    y = (s - c * row[kStepText][i]) * row[kAudioInverse][i];
  }
};

// From here on a Real has no fraction.
template <class Real>
constexpr double kWholeReal = sizeof(Real) == 8 ? 4503599627370496.0 : 8388608.0;

template <class Real>
void finish_statistics(const CpuProblem& p, void* loss_out, double* terms) {
  Rows<Real> row(p);
  const Real* weight = static_cast<const Real*>(p.w);
  Real* out = static_cast<Real*>(loss_out);
  double sum = 0;
  Real* state = static_cast<Real*>(p.state);
  for (int64_t i = 0; i < p.N; ++i) {
    const Positive<Real> positive(p, row, i);
    const double logits[kDirections] = {positive.s, positive.s, positive.x,
                                        p.mirror ? positive.y : positive.x};
    const bool used[kDirections] = {true, p.infonce != 0, p.svr != 0, p.mirror || p.shared};
    double loss[kDirections] = {};
    const double panel_logit = Real(p.k) * row[kPanelPositive][i] + Real(p.infonce ? 0 : p.b);
    for (int d = 0; d < kDirections; ++d) {
      const double m = p.running[d * p.N + i], l = p.running[(kDirections + d) * p.N + i];
      double top = m, total = l, others = l;
      if (used[d] && p.infonce) {
        double z = p.k * logits[d];
        // Beside a `top` that was rounded by 1 or more, exp(z - top) would be far from 0 and 1.
        if (fabs(z) >= kWholeReal<Real>) z = Real(z);
        top = Real(m > z ? m : z);  // as stored: l belongs to this m
        others = l * exp(m - top);
        total = others + exp(z - top);
        // log(total / exp(z - top)): exactly 0 without negatives, if exp does not overflow.
        loss[d] = top - z < 600 ? log1p(others * exp(top - z)) : log(total) + (top - z);
        if (z != z) loss[d] = z;
      } else if (used[d]) {
        const double z = -(p.k * logits[d] + p.b);
        loss[d] = l + (z > 0 ? z : 0) + log1p(exp(z > 0 ? -z : z));
      }
      state[d * p.N + i] = Real(top);
      state[(kDirections + d) * p.N + i] = Real(total);
      state[(2 * kDirections + d) * p.N + i] = Real(others);
    }
    const double R = p.R ? row.radius(i) : 0, r = p.R ? double(row[kGap][i]) : 0;
    const double constraint = R != R ? R : (R > r ? R - r : 0) + (R < 0 ? -R : 0);
    const double support = loss[kSupportRows] + loss[kOtherRows];
    const double total =
        (weight ? double(weight[i]) : 1) *
        (loss[kTextRows] + loss[kAudioRows] + p.alpha * support + p.beta * constraint);
    sum += total;
    if (p.per_row) out[i] = Real(total);
    if (!terms) continue;
    terms[i] = loss[kTextRows];
    terms[p.N + i] = loss[kAudioRows];
    terms[2 * p.N + i] = support;
    terms[3 * p.N + i] = constraint;
    terms[4 * p.N + i] = p.running[kTextRows * p.N + i] >= panel_logit;
    terms[5 * p.N + i] = p.running[kAudioRows * p.N + i] >= panel_logit;
  }
  if (!p.per_row) out[0] = Real(p.mean ? sum / double(p.N) : sum);
}

template <class Real>
void prepare_weights(const CpuProblem& p) {
  const Real* state = static_cast<const Real*>(p.state);
  const Real* weight = static_cast<const Real*>(p.w);
  const Real* upstream = static_cast<const Real*>(p.upstream);
  Real* omega = static_cast<Real*>(p.omega);
  Real* factors = static_cast<Real*>(p.factors);
  for (int64_t i = 0; i < p.N; ++i) {
    const double g = upstream ? double(upstream[p.per_row ? i : 0]) : 1;
    omega[i] = Real(g * (weight ? double(weight[i]) : 1) / (p.mean ? double(p.N) : 1));
  }
  for (int64_t n = 0; n < kRowSums * p.N; ++n) p.sums[n] = 0;
  for (int d = 0; d < kDirections; ++d) {
    const Real factor = d < kSupportRows ? Real(1) : Real(p.alpha);
    for (int64_t i = 0; i < p.N; ++i) {
      factors[d * p.N + i] = state[d * p.N + i];
      const Real l = p.infonce ? state[(kDirections + d) * p.N + i] : Real(1);
      factors[(kDirections + d) * p.N + i] = factor * omega[i] / l;
    }
  }
}

// Coefficients of t, a and e = a - t in a row's own part of dT or dA.
struct Mix {
  double t = 0, a = 0, e = 0;
};

template <class Real>
void add_mix(const Mix& mix, const Real* t, const Real* a, Real* out, int64_t D) {
  const Real mt = Real(mix.t), ma = Real(mix.a), me = Real(mix.e);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) out[d] += mt * t[d] + ma * a[d] + me * (a[d] - t[d]);
}

// What the rows add to the gradients of the scalars.
struct Scalars {
  double dk = 0, db = 0, dR = 0;
};

template <class Real>
void finish_row(const CpuProblem& p, int64_t i, Real* dT, Real* dA, Real* dR, Scalars& scalars) {
  const Rows<Real> row(p);
  const Real* state = static_cast<const Real*>(p.state);
  const int64_t N = p.N, D = p.D;
  const Positive<Real> positive(p, row, i);
  const auto sum = [&](RowSum which) { return p.sums[which * N + i]; };
  // The gradient of direction d with respect to the logit of its positive.
  const auto slope = [&](Direction d, double product) {
    if (p.infonce)
      return -double(state[(2 * kDirections + d) * N + i]) /
             double(state[(kDirections + d) * N + i]);
    const double z = p.k * product + p.b;
    return z > 0 ? -exp(-z) / (1 + exp(-z)) : -1 / (1 + exp(z));
  };
  const double w = static_cast<const Real*>(p.omega)[i];
  double g = slope(kTextRows, positive.s), h = 0, u = 0;
  if (p.infonce) g += slope(kAudioRows, positive.s);
  if (p.svr) h = slope(kSupportRows, positive.x);
  if (p.shared) h += slope(kOtherRows, positive.x);
  if (p.mirror) u = slope(kOtherRows, positive.y);
  g *= w;
  h *= p.alpha * w;
  u *= p.alpha * w;
  scalars.dk += sum(kBase) + sum(kSupportText) + sum(kSupportAudio) + g * positive.s +
                h * positive.x + u * positive.y;
  scalars.db += sum(kBias) + g + h + u;

  Mix text, audio;
  text.a = audio.t = p.k * g;
  if (p.R) {
    const double r = row[kGap][i], c = row[kC][i], R = row.radius(i);
    const double et = row[kStepText][i], ea = row[kStepAudio][i], ee = ea - et;
    const double nt = row[kTextInverse][i], na = row[kAudioInverse][i];
    // All of H and U of a literal row is in sums[kRhoLiteral], dT and dA already.
    const bool literal = row[kOffset][i] != Real(0), tangent = p.renormalize && !literal;
    const double H = literal ? 0 : p.k * h * nt, U = literal ? 0 : p.k * u * na;
    const double sigma_t = tangent ? p.k * nt * nt * (sum(kSupportText) + h * positive.x) : 0;
    const double sigma_a = tangent ? p.k * na * na * (sum(kSupportAudio) + u * positive.y) : 0;
    double rho = (p.k * nt * sum(kRhoText) + H * ea) / r - sigma_t * (et + c * ee) / r +
                 sum(kRhoLiteral) / r;
    if (p.mirror) rho += (p.k * na * sum(kRhoAudio) - U * et) / r - sigma_a * (c * ee - ea) / r;
    const double hinge = R > r ? p.beta * w : 0;
    const double along = (c * rho + hinge) / r;
    text.a += (1 - c) * H + U - c * sigma_a;
    text.t += c * U - (1 - c) * sigma_t;
    text.e += c * c * sigma_a - c * U - (1 - c) * c * sigma_t + along;
    audio.t += H + (1 - c) * U - c * sigma_t;
    audio.a += c * H - (1 - c) * sigma_a;
    audio.e += c * H - c * c * sigma_t + (1 - c) * c * sigma_a - along;
    const double slope_R = rho + hinge - (R < 0 ? p.beta * w : 0);
    scalars.dR += slope_R;
    if (p.per_row_radius) dR[i] = Real(slope_R);
  }
  const Real *t = row.T + i * D, *a = row.A + i * D;
  if (dT) add_mix(text, t, a, dT + i * D, D);
  if (dA) add_mix(audio, t, a, dA + i * D, D);
}

template <class Real>
void finish_gradients(const CpuProblem& p, void* dT, void* dA, void* dR, void* scalars) {
  const int64_t chunks = (p.N + kRowChunk - 1) / kRowChunk;
  auto* partial = new Scalars[chunks];
  run(p, chunks, p.N * p.D, [&](int64_t chunk) {
    for (int64_t i = chunk * kRowChunk; i < p.N && i < (chunk + 1) * kRowChunk; ++i)
      finish_row(p, i, static_cast<Real*>(dT), static_cast<Real*>(dA), static_cast<Real*>(dR),
                 partial[chunk]);
  });
  Scalars total;  // in the chunks' order
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    total.dk += partial[chunk].dk;
    total.db += partial[chunk].db;
    total.dR += partial[chunk].dR;
  }
  delete[] partial;
  if (p.R && !p.per_row_radius) static_cast<Real*>(dR)[0] = Real(total.dR);
  static_cast<Real*>(scalars)[0] = Real(total.dk);
  static_cast<Real*>(scalars)[1] = Real(total.db);
}
