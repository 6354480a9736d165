// What a warp makes of the products of a tile in which every pair counts: SigLIP, the losses and
// the weights at once. As gram_tile.cuh, with one exponential for each logit and, instead of
// logarithms, a product for each row and each column.
#pragma once

#include "cuda/gram_plain.cuh"

namespace supclap::cuda {

// A sum of log(1 + exp) over logits in base 2: the sum of their positive parts, and the product of
// all 1 + exp(-|z|), less 1, so that the smallest of them keep their digits.
struct SoftplusSum {
  float tops, rest;
  __device__ float value() const { return tops * kLn2 + log1pf(rest); }
};
__device__ __forceinline__ SoftplusSum shuffle_xor(SoftplusSum x, int apart) {
  return {shuffle_xor(x.tops, apart), shuffle_xor(x.rest, apart)};
}
struct AddSoftplus {
  __device__ SoftplusSum operator()(SoftplusSum x, SoftplusSum y) const {
    return {x.tops + y.tops, x.rest + (x.rest * y.rest + y.rest)};
  }
};

// log(1 + exp) and 1 / (1 + exp(-z)) of a logit in base 2.
struct Logistic {
  SoftplusSum loss;
  float slope;
  __device__ explicit Logistic(float z) {
    const float e = exp_2(-fabsf(z));
    loss = {fmaxf(z, 0.0f), e};
    slope = quotient(z >= 0 ? 1 : e, 1 + e);
  }
};

// Directions whose rows have a loss: a pair counts for its text, a support vector for its own row.
__device__ __forceinline__ bool has_loss(int mode, int d) {
  return d != kAudioRows && has_direction(mode, d);
}

// Up to what the warps of a team leave of their columns in `scratch`.
template <bool kWeights, class Store>
__device__ __forceinline__ void plain_siglip(const GramTile& tile, const float (&c)[kAccumulators],
                                             const GramSlots& to, ColumnScratch scratch,
                                             const Store& store) {
  using Shape = GramShape;
  const int x = Shape::row(), mode = tile.mode;
  const bool mirror = mode == kMirror;
  const Factors& own_f = tile.own_f;
  const float k2 = tile.k2, b = tile.b, over = 1 / k2;
  const PlainSupport own(tile.own, k2);
  const AddSoftplus add;
  float base[2] = {}, bias[2] = {}, row[kTileSums] = {};  // of S, and of P
  SoftplusSum row_loss[kDirections] = {};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    SoftplusSum column_loss[kDirections][kChunk / 2];
    float column[kColumnSums][kChunk / 2];
    SUPCLAP_UNROLL
    for (int e = 0; e < kChunk; e += 2) {
      SoftplusSum loss[kDirections][2];
      float sums[kColumnSums][2], w[4][2];
      SUPCLAP_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int n = h * kChunk + e + side, y = Shape::column(n);
        const Products z = GramTile::products(c, n);
        const PlainSupport other = tile.columns.plain(y);
        const SupportProduct own_x(z.S, z.Q, own.c), other_x(z.P, z.Q, other.c);
        const Logistic S(k2 * z.S + b), P(k2 * z.P + b);
        const Logistic X(own.text * own_x.product + (own.offset + b));
        const Logistic other_X(other.text * other_x.product + (other.offset + b));
        row_loss[kTextRows] = add(row_loss[kTextRows], S.loss);
        row_loss[kSupportRows] = add(row_loss[kSupportRows], X.loss);
        loss[kTextRows][side] = P.loss, loss[kSupportRows][side] = other_X.loss;
        Factors f;
        if (kWeights) {
          f = tile.columns.factors(y);
          const float one = S.slope * own_f.f[kTextRows], two = P.slope * f.f[kTextRows];
          const float own_h = X.slope * own_f.f[kSupportRows];
          const float other_h = other_X.slope * f.f[kSupportRows];
          base[0] += one * z.S, base[1] += two * z.P;
          bias[0] += one + own_h, bias[1] += two + other_h;
          const SupportSlopes mine(own_x, own_h * own.text, own.c, over);
          const SupportSlopes theirs(other_x, other_h * other.text, other.c, over);
          row[kRhoText] += mine.rho, row[kSupportText] += mine.support;
          sums[kRhoText - kRhoText][side] = theirs.rho;
          sums[kSupportText - kRhoText][side] = theirs.support;
          w[0][side] = one + mine.own, w[1][side] = two + theirs.own;
          w[2][side] = mine.gram + theirs.gram;
        }
        if (!mirror) continue;
        const SupportProduct own_y(z.P, z.K, own.c), other_y(z.S, z.K, other.c);
        const Logistic Y(own.audio * own_y.product + (own.offset + b));
        const Logistic other_Y(other.audio * other_y.product + (other.offset + b));
        row_loss[kOtherRows] = add(row_loss[kOtherRows], Y.loss);
        loss[kOtherRows][side] = other_Y.loss;
        if (kWeights) {
          const float own_u = Y.slope * own_f.f[kOtherRows];
          const float other_u = other_Y.slope * f.f[kOtherRows];
          bias[0] += other_u, bias[1] += own_u;
          const SupportSlopes mine(own_y, own_u * own.audio, own.c, over);
          const SupportSlopes theirs(other_y, other_u * other.audio, other.c, over);
          row[kRhoAudio] += mine.rho, row[kSupportAudio] += mine.support;
          sums[kRhoAudio - kRhoText][side] = theirs.rho;
          sums[kSupportAudio - kRhoText][side] = theirs.support;
          w[1][side] += mine.own, w[0][side] += theirs.own;
          w[3][side] = mine.gram + theirs.gram;
        }
      }
      if (kWeights) store(h * kChunk + e, w);
      SUPCLAP_UNROLL
      for (int d = 0; d < kDirections; ++d)
        if (has_loss(mode, d))
          column_loss[d][e / 2] = join_two(loss[d][0], loss[d][1], Shape::kLanes, add);
      SUPCLAP_UNROLL
      for (int sum = 0; sum < kColumnSums; ++sum)
        if (kWeights && has_sum(mode, kRhoText + sum))
          column[sum][e / 2] = join_two(sums[sum][0], sums[sum][1], Shape::kLanes, Add{});
    }
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d)
      if (has_loss(mode, d))
        scratch.chunk(scratch.l(d), h) = join_columns(column_loss[d], add).value();
    const Support of = tile.columns.support(scratch.column(h));
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kColumnSums; ++sum)
      if (kWeights && has_sum(mode, kRhoText + sum))
        scratch.chunk(scratch.sum(sum), h) =
            without_length(kRhoText + sum, join_columns(column[sum], Add{}), of);
  }
  const bool writes = threadIdx.x % Shape::kLanes == 0;
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!to.statistics || !has_direction(mode, d)) continue;
    const float l = has_loss(mode, d) ? warp_sum<Shape::kLanes>(row_loss[d].value()) : 0;
    if (writes) to.part_i.put(2 * d, x, {kHidden, l});
  }
  if (!kWeights) return;
  row[kBase] = k2 * (base[0] + (tile.diagonal ? 0 : base[1]));
  row[kBias] = bias[0] + (tile.diagonal ? 0 : bias[1]);
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kTileSums; ++sum) {
    const float total = warp_sum<Shape::kLanes>(without_length(sum, row[sum], tile.own));
    if (writes) to.sums_i.at[sum * to.sums_i.plane + x] = total;
  }
}

// ... and what the team makes of what its warps left, plain or not, a thread for each column:
// behind a barrier of the warpgroup.
template <bool kWeights>
__device__ __forceinline__ void siglip_columns(const GramTile& tile, const GramSlots& to,
                                               ColumnScratch scratch) {
  const int y = threadIdx.x % kWarpgroup, mode = tile.mode;
  if (y >= tile.J.count) return;
  const auto total = [&](int plane) {
    float sum = 0;
    for (int warp = 0; warp < kTeamWarps; ++warp) sum += scratch(plane, warp, y);
    return sum;
  };
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d)
    if (to.statistics && has_direction(mode, d))
      to.part_j.put(2 * d, y, {kHidden, has_loss(mode, d) ? total(scratch.l(d)) : 0});
  if (!kWeights) return;
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kColumnSums; ++sum)
    to.sums_j.at[(kRhoText + sum) * to.sums_j.plane + y] =
        has_sum(mode, kRhoText + sum) ? total(scratch.sum(sum)) : 0;
}

}  // namespace supclap::cuda
