// A sweep over one tile pair without support vectors in one kernel, for Hopper: gram.cuh has those
// with. The products are S = T_I A_J^T and P = A_I T_J^T: a warpgroup multiplies 64 rows with 256
// columns, S and then P of one place. On the diagonal P = S^T is there for the audios' statistics.
//
// A thread has two rows and 64 columns. What a place knows of a row or a column is left in the
// first of the slots of kGramRows rows or kGramColumns columns that it covers.
#pragma once

#include "cuda/hopper/plain_loss_tile.cuh"
#include "cuda/hopper/sweep.cuh"

namespace supclap::cuda {

// The places of a pair, in the order in which blocks take them.
struct CrossPlaces {
  int down, count, jobs;  // jobs: of this block
  __device__ explicit CrossPlaces(const PanelTile& tile)
      : down((tile.ni + kCrossRows - 1) / kCrossRows),
        count(down * ((tile.nj + kCrossColumns - 1) / kCrossColumns)),
        jobs(int(blockIdx.x) < count ? (count - 1 - int(blockIdx.x)) / int(gridDim.x) + 1 : 0) {}
  __device__ GramPlace place(int job) const {
    const int n = blockIdx.x + job * gridDim.x;
    return {n % down * kCrossRows, n / down * kCrossColumns};
  }
  // Jobs that the teams work on at the same time, from `first` on.
  __device__ int together(int first) const {
    return jobs - first < kGramTeams ? jobs - first : kGramTeams;
  }
};

__device__ inline void cross_copies(const Problem& p, const GramMaps& maps, const PanelTile& tile,
                                    int products, GramPipe& at) {
  const CrossPlaces places(tile);
  int fill = 0;
  for (int first = 0; first < places.jobs; first += kGramTeams) {
    for (int n = 0; n < products; ++n) {
      for (int team = 0; team < places.together(first); ++team) {
        const GramPlace place = places.place(first + team);
        const int i = int(tile.i0) + place.x, j = int(tile.j0) + place.y;
        for (int column = 0; column < p.width; column += kGramDepth, ++fill) {
          const int slot = gram_fill(at, fill);
          GramStage& stage = at.stage[slot];
          const TensorMap& left = n ? maps.audio_left : maps.text_left;
          const TensorMap& right = n ? maps.text_right : maps.audio_right;
          copy_box(stage.left, left, i, column, at.full[slot]);
          copy_box(stage.right[0], right, j, column, at.full[slot]);
        }
      }
    }
  }
}

// Where a place leaves what it finds: two slots of a row where it has columns of both, and
// likewise.
struct CrossSlots {
  CrossSlot part_i, part_j, sums_i;
  __device__ CrossSlots(const PanelTile& tile, const PanelScratch& to, const GramPlace& place) {
    const GramSlots first(tile, to, place);
    const int64_t next_i = tile.nj - place.y > kGramColumns ? tile.ni : 0;
    const int64_t next_j = tile.ni - place.x > kGramRows ? tile.nj : 0;
    part_i = {first.part_i, next_i}, part_j = {first.part_j, next_j};
    sums_i = {first.sums_i, next_i};
  }
};

// What a team makes of one product: sweep 1, sweep 2, or with SigLIP both.
template <class Scalar, bool kInfonce, bool kWeights>
__device__ __forceinline__ void cross_epilogue(const Problem& p, const PanelTile& tile,
                                               const PanelScratch& to, const GramPlace& place,
                                               bool statistics, const CrossTile& own,
                                               const float (&c)[kAccumulators],
                                               CrossScratch scratch, CrossSums& sums) {
  const CrossSlots slots(tile, to, place);
  const bool swapped = own.product.swapped;
  const bool repeated = swapped && own.diagonal;  // P = S^T
  RowStore<Scalar> rows[CrossShape::kRows];
  SUPCLAP_UNROLL
  for (int u = 0; u < CrossShape::kRows; ++u)
    rows[u].to = static_cast<Scalar*>(to.weights) + swapped * tile.size +
                 (place.x + CrossShape::row(u)) * tile.ld + place.y + RowStore<Scalar>::column();
  const auto store = [&](int u, int n, const float (&w)[2]) {
    // Rows and columns are padded to multiples of kGramColumns.
    if (n < CrossShape::kColumns / 2 || own.J.count > kGramColumns) rows[u].put(n, w);
  };
  if (statistics && p.stats && !repeated) cross_similarity(own, c, sums);
  if (!kInfonce) {
    cross_siglip(own, c, slots.part_i, scratch, p.stats, kWeights && !repeated, sums, store);
  } else if (statistics) {
    const bool plain = uniform(own.plain) && !p.stats;
    const bool done = plain && cross_plain(own, c, slots.part_i, scratch);
    if (!uniform(done)) cross_statistics(own, c, slots.part_i, scratch);
  } else if (!repeated) {
    cross_weights(own, c, sums, store);
  }
  if (statistics && !own.diagonal) {
    warpgroup_barrier();
    cross_columns(own, kInfonce, slots.part_j, scratch);
  }
  warpgroup_barrier();
}

// One tile pair, by any number of blocks.
template <class Scalar, bool kInfonce, bool kWeights>
__global__ void __launch_bounds__(kGramThreads, 1)
    cross_kernel(const __grid_constant__ Problem p, const __grid_constant__ GramMaps maps,
                 const PanelTile tile, const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto& at = gram_start<CrossColumns>(memory);
  __syncthreads();
  const bool diagonal = tile.i0 == tile.j0, statistics = !kWeights || (!kInfonce && to.part_i);
  const int products = diagonal && !statistics ? 1 : 2;
  const int team = uniform(threadIdx.x / kWarpgroup);
  if (team == kGramTeams) {
    fewer_registers<24>();
    if (threadIdx.x % kWarpgroup == 0) cross_copies(p, maps, tile, products, at);
    return;
  }
  more_registers<240>();
  const CrossPlaces places(tile);
  const int steps = int(p.width / kGramDepth), thread = threadIdx.x % kWarpgroup;
  SUPCLAP_ROLLED
  for (int first = 0, item = 0; first + team < places.jobs; first += kGramTeams) {
    const int together = places.together(first);
    const GramPlace place = places.place(first + team);
    const Side I = side_of(p, tile.i0, place.x, tile.ni);
    const Side J = side_of(p, tile.j0, place.y, tile.nj);
    CrossSums sums = {};
    SUPCLAP_ROLLED
    for (int n = 0; n < products; ++n, ++item) {
      const CrossProduct product{n == 1};
      // On their way while the operands are multiplied.
      CrossNumbers row[2], column[2];
      SUPCLAP_UNROLL
      for (int u = 0; u < 2; ++u) {
        row[u] = CrossNumbers(I, CrossShape::row(u), product.rows(), kInfonce, kWeights);
        column[u] = CrossNumbers(J, thread + u * kWarpgroup, product.columns(), kInfonce, kWeights);
      }
      float c[kAccumulators];
      // The products before this one, by both teams.
      const int before = first * products + n * together + team;
      const int next = together == kGramTeams ? 1 - team : team;
      mbarrier_wait(at.turn[team], (item + 1 + team) & 1);
      gram_products<Scalar>(c, at, before * steps, steps, [&] { team_arrives(at.turn[next]); });
      SUPCLAP_UNROLL
      for (int u = 0; u < 2; ++u) at.columns[team].at[thread + u * kWarpgroup] = column[u];
      warpgroup_barrier();
      CrossTile own{I,
                    J,
                    at.columns[team],
                    product,
                    logit_scale_2(p),
                    logit_bias_2(p),
                    diagonal,
                    {row[0], row[1]},
                    {},
                    false};
      own.hide(p, c);
      cross_epilogue<Scalar, kInfonce, kWeights>(p, tile, to, place, statistics, own, c,
                                                 CrossScratch{at.scratch[team]}, sums);
    }
    const CrossSlots slots(tile, to, place);
    SUPCLAP_UNROLL
    for (int u = 0; u < CrossShape::kRows; ++u) {
      const int x = CrossShape::row(u);
      const auto total = [](float part) { return warp_sum<CrossShape::kLanes>(part); };
      const LogSum similarity{total(sums.similarity[u]), total(sums.pairs[u])};
      const float base = total(sums.base[u]), bias = total(sums.bias[u]);
      if (threadIdx.x % CrossShape::kLanes != 0 || x >= I.count) continue;
      if (statistics && p.stats) slots.part_i.put(2 * kSimilarity, x, similarity, {0, 0});
      if (kWeights) slots.sums_i.put_one(kBase, x, base), slots.sums_i.put_one(kBias, x, bias);
    }
  }
}

}  // namespace supclap::cuda
