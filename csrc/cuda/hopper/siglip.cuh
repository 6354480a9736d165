// What a warp makes of the products of a tile in which every pair counts: SigLIP, the losses and
// the weights at once. As gram_tile.cuh, with one exponential for each logit and, instead of
// logarithms, a product for each row and each column.
#pragma once

#include "cuda/hopper/full_tile.cuh"

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
        Factors f;
        if (kWeights) f = tile.columns.factors(y);
        const Logistic S(k2 * z.S + b), P(k2 * z.P + b);
        row_loss[kTextRows] = add(row_loss[kTextRows], S.loss), loss[kTextRows][side] = P.loss;
        if (kWeights) {
          const float one = S.slope * own_f.f[kTextRows], two = P.slope * f.f[kTextRows];
          base[0] += one * z.S, base[1] += two * z.P;
          bias[0] += one, bias[1] += two;
          w[0][side] = one, w[1][side] = two;
        }
        // The support vectors of one tower, of the row and of the column: what they add to the
        // losses, the sums, and the weights of S (or P, their own cross product first) and the
        // gram.
        const auto support = [&](int d, const SupportProduct& own_p, float own_length,
                                 const SupportProduct& other_p, float other_length, int rho,
                                 int product, int cross, float& gram) {
          const Logistic own_z(own_length * own_p.product + (own.offset + b));
          const Logistic other_z(other_length * other_p.product + (other.offset + b));
          row_loss[d] = add(row_loss[d], own_z.loss), loss[d][side] = other_z.loss;
          if (!kWeights) return;
          const float own_h = own_z.slope * own_f.f[d], other_h = other_z.slope * f.f[d];
          bias[cross] += own_h, bias[1 - cross] += other_h;
          const SupportSlopes mine(own_p, own_h * own_length, own.c, over);
          const SupportSlopes theirs(other_p, other_h * other_length, other.c, over);
          row[rho] += mine.rho, row[product] += mine.support;
          sums[rho - kRhoText][side] = theirs.rho, sums[product - kRhoText][side] = theirs.support;
          w[cross][side] += mine.own, w[1 - cross][side] += theirs.own;
          gram = mine.gram + theirs.gram;
        };
        support(kSupportRows, {z.S, z.Q, own.c}, own.text, {z.P, z.Q, other.c}, other.text,
                kRhoText, kSupportText, 0, w[2][side]);
        if (mirror)
          support(kOtherRows, {z.P, z.K, own.c}, own.audio, {z.S, z.K, other.c}, other.audio,
                  kRhoAudio, kSupportAudio, 1, w[3][side]);
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
    if (!to.part_i.at || !has_direction(mode, d)) continue;
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
    if (to.part_j.at && has_direction(mode, d))
      to.part_j.put(2 * d, y, {kHidden, has_loss(mode, d) ? total(scratch.l(d)) : 0});
  if (!kWeights) return;
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kColumnSums; ++sum)
    to.sums_j.at[(kRhoText + sum) * to.sums_j.plane + y] =
        has_sum(mode, kRhoText + sum) ? total(scratch.sum(sum)) : 0;
}

}  // namespace supclap::cuda
