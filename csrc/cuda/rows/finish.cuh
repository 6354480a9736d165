// Finishes the gradients after the last product, row by row: positives, the motion of the support
// vectors, the constraint, normalisation, and the one cast (MATH.md, row terms).
#pragma once

#include "cuda/rows/rows.cuh"

namespace supclap::cuda {

// The gradient of direction d with respect to the logit of its positive, p - 1.
__device__ __forceinline__ float positive_slope(const CudaProblem& p, int d,
                                                const Positive& positive, int64_t i) {
  if (p.infonce) return -p.state[(kStateOthers + d) * p.N + i] / p.state[(kStateL + d) * p.N + i];
  return -sigmoid_2(-positive.logit(p, d));
}

// Coefficients of t, a and e = a - t in dT and in dA, and the row's dk, db, dR.
struct RowTerms {
  float t_t = 0, t_a = 0, t_e = 0, a_t = 0, a_a = 0, a_e = 0;
  float dk, db, dR = 0;

  __device__ RowTerms(const CudaProblem& p, int64_t i) {
    const Positive positive(p, i);
    const float k = p.scale[0], unit = p.unit[0], per_product = unit / logit_scale_2(p);
    const float w = p.omega[i];
    const auto sum = [&](int which) { return p.sums[which * p.N + i]; };
    float g = positive_slope(p, kTextRows, positive, i);
    if (p.infonce) g += positive_slope(p, kAudioRows, positive, i);
    g *= w;
    dk = sum(kBase) * per_product + g * positive.s;
    db = sum(kBias) * unit + g;
    t_a = a_t = k * g;
    if (!p.radius) return;
    const float R = radius_of(p, i), r = row_of(p, kGap, i);
    const float hinge = R > r ? p.beta * w : 0;
    float rho = 0, c = 0;
    if (p.mode != kPlain) {
      c = row_of(p, kC, i);
      const float et = row_of(p, kStepText, i), ea = row_of(p, kStepAudio, i), ee = ea - et;
      const float n_t = row_of(p, kTextInverse, i), n_a = row_of(p, kAudioInverse, i), d = 1 - c;
      // H and U of a literal row are in kRhoLiteral and dT, dA already (literal.cuh).
      const bool near = !is_literal(p, i), tangent = p.renormalize && near;
      float h = positive_slope(p, kSupportRows, positive, i);
      if (p.mode == kShared) h += positive_slope(p, kOtherRows, positive, i);
      h *= p.alpha * w;
      const float support = sum(kSupportText) * per_product + h * positive.x;
      const float H = near ? k * n_t * h : 0;
      const float sigma_t = tangent ? k * n_t * n_t * support : 0;
      rho = k * n_t * sum(kRhoText) * per_product + H * ea - sigma_t * (et + c * ee);
      dk += support;
      db += h;
      t_a += d * H;
      a_t += H;
      a_a += c * H;
      a_e += c * H;
      t_t -= d * sigma_t;
      t_e -= d * c * sigma_t;
      a_t -= c * sigma_t;
      a_e -= c * c * sigma_t;
      if (p.mode == kMirror) {
        const float u = positive_slope(p, kOtherRows, positive, i) * (p.alpha * w);
        const float support_a = sum(kSupportAudio) * per_product + u * positive.y;
        const float U = near ? k * n_a * u : 0;
        const float sigma_a = tangent ? k * n_a * n_a * support_a : 0;
        rho += k * n_a * sum(kRhoAudio) * per_product - U * et - sigma_a * (c * ee - ea);
        dk += support_a;
        db += u;
        t_t += c * U;
        t_a += U;
        t_e -= c * U;
        a_t += d * U;
        t_a -= c * sigma_a;
        t_e += c * c * sigma_a;
        a_a -= d * sigma_a;
        a_e += d * c * sigma_a;
      }
      rho = (rho + k * unit * sum(kRhoLiteral)) / r;
    }
    dR = rho + hinge - (R < 0 ? p.beta * w : 0);
    const float along = (c * rho + hinge) / r;
    t_e += along;
    a_e -= along;
  }
};

// Everything a warp or a whole block needs to finish a row.
template <class Scalar>
struct FinishRow {
  const CudaProblem& p;
  int team;                            // threads
  const Scalar *text, *audio;          // the pair as given
  double text_inverse, audio_inverse;  // 1 / length
  float factor, scale;
  float* scratch;  // [kWarps], of a block

  __device__ float sum(float x) const {
    return team == kWarp ? warp_sum(x) : block_sum(x, scratch);
  }

  __device__ float mixed(const float* total, float of_t, float of_a, float of_e, int64_t d) const {
    const float t = widen(operand(text[d * p.text_d], text_inverse, p.normalize));
    const float a = widen(operand(audio[d * p.audio_d], audio_inverse, p.normalize));
    return factor * total[d] + of_t * t + of_a * a + of_e * (a - t);
  }

  // Row i of out = scale (factor total + of_t t + of_a a + of_e e), made tangent to the sphere if
  // the rows were normalised, cast once. X: the tower's own row as given.
  __device__ void side(const float* total, float of_t, float of_a, float of_e, const Scalar* X,
                       int64_t stride, double inverse, void* out, int64_t i) const {
    const float over = float(inverse);
    float inward = 0;
    const int first = threadIdx.x % team;
    if (p.normalize) {
      SUPCLAP_UNROLL_BY(4)
      for (int64_t d = first; d < p.D; d += team)
        inward += mixed(total, of_t, of_a, of_e, d) * widen(X[d * stride]);
      inward = sum(inward) * over * over;
    }
    SUPCLAP_UNROLL_BY(4)
    for (int64_t d = first; d < p.D; d += team) {
      float g = mixed(total, of_t, of_a, of_e, d);
      if (p.normalize) g = (g - inward * widen(X[d * stride])) * over;
      if (p.out_single)
        static_cast<float*>(out)[i * p.D + d] = scale * g;
      else
        static_cast<Scalar*>(out)[i * p.D + d] = narrow<Scalar>(scale * g);
    }
  }
};

// Writes the gradients of row i. Called by `team` threads: a warp or a block.
template <class Scalar>
__device__ void finish_row(const CudaProblem& p, int64_t i, int team, float* scratch) {
  const RowTerms terms(p, i);
  const float scale = p.after ? *p.after : 1;
  if (threadIdx.x % team == 0) {
    p.row_scalars[i] = scale * terms.dk;
    p.row_scalars[p.N + i] = scale * terms.db;
    if (p.row_radius) p.row_radius[i] = scale * terms.dR;
  }
  const auto* text = static_cast<const Scalar*>(p.text) + i * p.text_n;
  const auto* audio = static_cast<const Scalar*>(p.audio) + i * p.audio_n;
  // Each warp finds them for itself, without a barrier.
  const double text_inverse = p.normalize ? inverse_length(text, p.text_d, p.D) : 1;
  const double audio_inverse = p.normalize ? inverse_length(audio, p.audio_d, p.D) : 1;
  const FinishRow<Scalar> row{
      p, team, text, audio, text_inverse, audio_inverse, p.scale[0] * p.unit[0], scale, scratch};
  if (p.out_text)
    row.side(p.dT + i * p.width, terms.t_t, terms.t_a, terms.t_e, text, p.text_d, text_inverse,
             p.out_text, i);
  if (p.out_audio)
    row.side(p.dA + i * p.width, terms.a_t, terms.a_a, terms.a_e, audio, p.audio_d, audio_inverse,
             p.out_audio, i);
}

// Adds up dk, db and dR of the rows, in order. Called by one block.
__device__ inline void finish_scalars(const CudaProblem& p, double* scratch) {
  const auto add = [&](const float* rows, float* out) {
    if (!out) return;
    double sum = 0;
    SUPCLAP_UNROLL_BY(8)
    for (int64_t i = threadIdx.x; i < p.N; i += kThreads) sum += rows[i];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) *out = float(sum);
  };
  add(p.row_scalars, p.out_scale);
  add(p.row_scalars + p.N, p.out_bias);
  add(p.row_radius, p.out_radius);
}

}  // namespace supclap::cuda
