// What a team makes of the products of a full tile with SigLIP: the losses and the weights at once.
// It takes one exponential for each logit and, instead of logarithms, one product for each row and
// each column.
#pragma once

#include "cuda/hopper/formulas.cuh"
#include "cuda/hopper/team.cuh"

namespace supclap::cuda {

// Directions whose rows have a loss: a pair counts for its text, a support vector for its own row.
__device__ __forceinline__ bool has_loss(int mode, int d) {
  return d != kAudioRows && has_direction(mode, d);
}

// Losses and weights, up to what the warps of a team leave of their columns in `scratch`.
template <bool kWeights, class Store>
__device__ __forceinline__ void full_siglip(const HopperTile& tile, const float (&c)[kAccumulators],
                                            const HopperSlots& to, ColumnScratch scratch,
                                            const Store& store) {
  using Shape = HopperShape;
  const int x = Shape::row(), mode = tile.mode;
  const bool mirror = mode == kMirror;
  const Factors& own_f = tile.own_f;
  const float k2 = tile.k2, b = tile.b, over = 1 / k2;
  const FullSupport own(tile.own, k2);
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
        const Products z = HopperTile::products(c, n);
        const FullSupport other = tile.columns.full(y);
        Factors f;
        if (kWeights) f = tile.columns.factors(y);
        const Logistic S(k2 * z.S + b), P(k2 * z.P + b);
        row_loss[kTextRows] = add(row_loss[kTextRows], S.loss);
        loss[kTextRows][side] = P.loss;
        if (kWeights) {
          const float one = S.slope * own_f.f[kTextRows], two = P.slope * f.f[kTextRows];
          base[0] += one * z.S;
          base[1] += two * z.P;
          bias[0] += one;
          bias[1] += two;
          w[0][side] = one;
          w[1][side] = two;
        }
        // Adds what the support vectors of one tower, that of the row and that of the column, add
        // to the losses, the sums and the weights. `cross` is their own cross product (0: S, 1: P).
        const auto support = [&](int d, const SupportProduct& own_p, float own_length,
                                 const SupportProduct& other_p, float other_length, int rho,
                                 int product, int cross, float& gram) {
          const Logistic own_z(own_length * own_p.product + (own.offset + b));
          const Logistic other_z(other_length * other_p.product + (other.offset + b));
          row_loss[d] = add(row_loss[d], own_z.loss);
          loss[d][side] = other_z.loss;
          if (!kWeights) return;
          const float own_h = own_z.slope * own_f.f[d], other_h = other_z.slope * f.f[d];
          bias[cross] += own_h;
          bias[1 - cross] += other_h;
          const SupportSlopes mine(own_p, own_h * own_length, own.c, over);
          const SupportSlopes theirs(other_p, other_h * other_length, other.c, over);
          row[rho] += mine.rho;
          row[product] += mine.support;
          sums[rho - kRhoText][side] = theirs.rho;
          sums[product - kRhoText][side] = theirs.support;
          w[cross][side] += mine.own;
          w[1 - cross][side] += theirs.own;
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

// The rest of a SigLIP tile, full or not, whose losses and sums are in `scratch` together: the team
// adds up what its warps left of their columns, a thread for each column. Needs a barrier of the
// warpgroup before it.
template <bool kWeights>
__device__ __forceinline__ void siglip_columns(const HopperTile& tile, const HopperSlots& to,
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
  if constexpr (kWeights) {
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kColumnSums; ++sum)
      to.sums_j.at[(kRhoText + sum) * to.sums_j.plane + y] =
          has_sum(mode, kRhoText + sum) ? total(scratch.sum(sum)) : 0;
  }
}

}  // namespace supclap::cuda
