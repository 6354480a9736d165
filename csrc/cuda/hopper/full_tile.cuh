// What a team makes of the products of a full tile with InfoNCE: the same as general.cuh, in a
// third of the instructions. A full tile has no positive and no equal ids, and lies inside the
// batch.
//
// The exponentials of a tile are taken from one reference for each kind of logit, so that S_ij adds
// the same number to row i and to column j. A sum that could have lost digits to its reference is
// noticed afterwards, and general.cuh does the tile again.
#pragma once

#include "cuda/hopper/formulas.cuh"
#include "cuda/hopper/team.cuh"

namespace supclap::cuda {

// Sweep 1, up to what the warps of a team leave of their columns in `scratch`. Returns false where
// a sum could have lost digits: general_statistics must do the tile again.
__device__ __forceinline__ bool full_statistics(const HopperTile& tile,
                                                const float (&c)[kAccumulators], Slot slot_i,
                                                ColumnScratch scratch) {
  using Shape = HopperShape;
  const int mode = tile.mode;
  const bool mirror = mode == kMirror, shared = mode == kShared;
  const float k2 = tile.k2;
  const FullSupport own(tile.own, k2);
  const Products first = HopperTile::products(c, 0);
  const float m_pair = warp_max(k2 * first.S);
  const float m_text = warp_max(own.text * SupportProduct(first.S, first.Q, own.c).product);
  const float m_audio =
      mirror ? warp_max(own.audio * SupportProduct(first.P, first.K, own.c).product) : 0;
  const float m[kDirections] = {m_pair, m_pair, m_text, mirror ? m_audio : m_text};
  // Whether direction d belongs to a support vector of the row itself, and the tiles skip it.
  const auto skips = [&](int d, const FullSupport& of) {
    return (d == kSupportRows || (d == kOtherRows && mirror)) && of.offset != 0;
  };
  float row[kDirections] = {};
  Range range;
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    float column[kDirections][kChunk];
    SUPCLAP_UNROLL
    for (int n = 0; n < kChunk; ++n) {
      const Products z = HopperTile::products(c, h * kChunk + n);
      const FullSupport other = tile.columns.full(Shape::column(h * kChunk + n));
      const float S = exp_2(k2 * z.S - m_pair), P = exp_2(k2 * z.P - m_pair);
      row[kTextRows] += S;
      row[kAudioRows] += P;
      column[kTextRows][n] = P;
      column[kAudioRows][n] = S;
      const SupportProduct own_x(z.S, z.Q, own.c), other_x(z.P, z.Q, other.c);
      const float own_e = exp_2(own.text * own_x.product + (own.offset - m_text));
      const float other_e = exp_2(other.text * other_x.product + (other.offset - m_text));
      row[kSupportRows] += own_e;
      column[kSupportRows][n] = other_e;
      if (shared) {
        row[kOtherRows] += other_e;
        column[kOtherRows][n] = own_e;
      }
      if (!mirror) continue;
      const SupportProduct own_y(z.P, z.K, own.c), other_y(z.S, z.K, other.c);
      row[kOtherRows] += exp_2(own.audio * own_y.product + (own.offset - m_audio));
      column[kOtherRows][n] = exp_2(other.audio * other_y.product + (other.offset - m_audio));
    }
    const FullSupport of = tile.columns.full(scratch.column(h));
    SUPCLAP_UNROLL
    for (int d = 0; d < kDirections; ++d) {
      if (!has_direction(mode, d)) continue;
      const float l = join_columns(column[d], Add{});
      if (!skips(d, of)) range.take(l);
      scratch.chunk(2 * d, h) = skips(d, of) ? kHidden : m[d];
      scratch.chunk(2 * d + 1, h) = l;
    }
  }
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d) {
    if (!has_direction(mode, d)) continue;
    row[d] = warp_sum<Shape::kLanes>(row[d]);
    if (!skips(d, own)) range.take(row[d]);
  }
  if (!range.good()) return false;
  if (threadIdx.x % Shape::kLanes != 0) return true;
  SUPCLAP_UNROLL
  for (int d = 0; d < kDirections; ++d)
    if (has_direction(mode, d))
      slot_i.put(2 * d, Shape::row(), {skips(d, own) ? kHidden : m[d], row[d]});
  return true;
}

// Sweep 2, if k2 and all factors are positive, up to what the warps of a team leave of their
// columns in `scratch`.
template <class Store>
__device__ __forceinline__ void full_weights(const HopperTile& tile,
                                             const float (&c)[kAccumulators], Slot slot_i,
                                             ColumnScratch scratch, const Store& store) {
  using Shape = HopperShape;
  const int x = Shape::row(), mode = tile.mode;
  const bool mirror = mode == kMirror, shared = mode == kShared;
  const float k2 = tile.k2, over = 1 / k2;
  const FullSupport own(tile.own, k2);
  const auto& own_top = FullFactors(tile.own_f, own, mode).top;
  float base = 0, base_columns = 0, row[kTileSums] = {};
  SUPCLAP_UNROLL
  for (int h = 0; h < Shape::kColumns / kChunk; ++h) {
    float column[kColumnSums][kChunk];
    SUPCLAP_UNROLL
    for (int e = 0; e < kChunk; e += 2) {
      float w[4][2];
      SUPCLAP_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int n = h * kChunk + e + side, y = Shape::column(n);
        const Products z = HopperTile::products(c, n);
        const FullSupport other = tile.columns.full(y);
        const auto& top = tile.columns.full_factors(y).top;
        float one = exp_2(k2 * z.S - own_top[kTextRows]) + exp_2(k2 * z.S - top[kAudioRows]);
        float two = exp_2(k2 * z.P - top[kTextRows]) + exp_2(k2 * z.P - own_top[kAudioRows]);
        base += one * z.S;
        base_columns += two * z.P;
        const SupportProduct own_x(z.S, z.Q, own.c), other_x(z.P, z.Q, other.c);
        float own_h = exp_2(own.text * own_x.product - own_top[kSupportRows]);
        float other_h = exp_2(other.text * other_x.product - top[kSupportRows]);
        if (shared) own_h += own.text * exp_2(own.text * own_x.product - top[kOtherRows]);
        if (shared)
          other_h += other.text * exp_2(other.text * other_x.product - own_top[kOtherRows]);
        if (shared && own.offset != 0) own_h = 0;
        if (shared && other.offset != 0) other_h = 0;
        const auto add = [&](const SupportSlopes& mine, const SupportSlopes& theirs, int rho,
                             int support, float& own_w, float& other_w, float& gram) {
          row[rho] += mine.rho;
          row[support] += mine.support;
          column[rho - kRhoText][e + side] = theirs.rho;
          column[support - kRhoText][e + side] = theirs.support;
          own_w += mine.own;
          other_w += theirs.own;
          gram = mine.gram + theirs.gram;
        };
        add(SupportSlopes(own_x, own_h, own.c, over),
            SupportSlopes(other_x, other_h, other.c, over), kRhoText, kSupportText, one, two,
            w[2][side]);
        if (mirror) {
          const SupportProduct own_y(z.P, z.K, own.c), other_y(z.S, z.K, other.c);
          const float own_u = exp_2(own.audio * own_y.product - own_top[kOtherRows]);
          const float other_u = exp_2(other.audio * other_y.product - top[kOtherRows]);
          add(SupportSlopes(own_y, own_u, own.c, over),
              SupportSlopes(other_y, other_u, other.c, over), kRhoAudio, kSupportAudio, two, one,
              w[3][side]);
        }
        w[0][side] = one;
        w[1][side] = two;
      }
      store(h * kChunk + e, w);
    }
    const Support of = tile.columns.support(scratch.column(h));
    SUPCLAP_UNROLL
    for (int sum = 0; sum < kColumnSums; ++sum) {
      if (!has_sum(mode, kRhoText + sum)) continue;
      scratch.chunk(sum, h) = without_length(kRhoText + sum, join_columns(column[sum], Add{}), of);
    }
  }
  row[kBase] = k2 * (base + (tile.diagonal ? 0 : base_columns));  // kBias is SigLIP's
  SUPCLAP_UNROLL
  for (int sum = 0; sum < kTileSums; ++sum) {
    const float total = warp_sum<Shape::kLanes>(without_length(sum, row[sum], tile.own));
    if (threadIdx.x % Shape::kLanes == 0) slot_i.at[sum * slot_i.plane + x] = total;
  }
}

}  // namespace supclap::cuda
