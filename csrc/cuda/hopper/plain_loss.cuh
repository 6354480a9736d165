// A sweep over one tile pair of the plain loss in one kernel, for Hopper; sweep.cuh has those with
// support vectors.
//
// The products are S = T_I A_J^T and P = A_I T_J^T: a team multiplies 64 rows with 256 columns, S
// and then P of one place. On the diagonal P = S^T, and is there for the audios' statistics.
//
// A thread has two rows and 64 columns. A place covers two slots of kPanelRows rows, and two of
// kPanelColumns columns: what it knows of a row or a column is left in the first of them.
#pragma once

#include "cuda/hopper/pipe.cuh"
#include "cuda/hopper/plain_loss_tile.cuh"

namespace supclap::cuda {

// The places of a pair, in the order in which blocks take them.
struct PlainPlaces {
  int down, count, jobs;  // jobs: of this block
  __device__ explicit PlainPlaces(const PanelTile& pair)
      : down((pair.ni + kPlainRows - 1) / kPlainRows),
        count(down * ((pair.nj + kPlainColumns - 1) / kPlainColumns)),
        jobs(int(blockIdx.x) < count ? (count - 1 - int(blockIdx.x)) / int(gridDim.x) + 1 : 0) {}
  __device__ HopperPlace place(int job) const {
    const int n = blockIdx.x + job * gridDim.x;
    return {n % down * kPlainRows, n / down * kPlainColumns};
  }
  // Jobs that the teams work on at the same time, from `first` on.
  __device__ int together(int first) const { return jobs - first < kTeams ? jobs - first : kTeams; }
};

// What one thread copies: the operands of the block's places, into the stages one after the other.
__device__ inline void copy_plain_operands(const CudaProblem& p, const HopperMaps& maps,
                                           const PanelTile& pair, int products, HopperPipe& pipe) {
  const PlainPlaces places(pair);
  int fill = 0;
  for (int first = 0; first < places.jobs; first += kTeams) {
    for (int n = 0; n < products; ++n) {
      for (int team = 0; team < places.together(first); ++team) {
        const HopperPlace place = places.place(first + team);
        const int i = int(pair.i0) + place.x, j = int(pair.j0) + place.y;
        for (int column = 0; column < p.width; column += kStageDepth, ++fill) {
          const int slot = next_stage(pipe, fill);
          HopperStage& stage = pipe.stage[slot];
          const TensorMap& left = n ? maps.audio_left : maps.text_left;
          const TensorMap& right = n ? maps.text_right : maps.audio_right;
          copy_box(stage.left, left, i, column, pipe.full[slot]);
          copy_box(stage.right[0], right, j, column, pipe.full[slot]);
        }
      }
    }
  }
}

// Where a place leaves what it finds of its rows and columns.
struct PlainSlots {
  PlainSlot part_i, part_j, sums_i;
  __device__ PlainSlots(const PanelTile& pair, const PanelScratch& to, const HopperPlace& place) {
    const HopperSlots first(pair, to, place);
    const int64_t next_i = pair.nj - place.y > kPanelColumns ? pair.ni : 0;
    const int64_t next_j = pair.ni - place.x > kPanelRows ? pair.nj : 0;
    part_i = {first.part_i, next_i};
    part_j = {first.part_j, next_j};
    sums_i = {first.sums_i, next_i};
  }
};

// What a team makes of one product: sweep 1, sweep 2, or with SigLIP both.
template <class Scalar, bool kInfonce, bool kWeights>
__device__ __forceinline__ void plain_epilogue(const CudaProblem& p, const PanelTile& pair,
                                               const PanelScratch& to, const HopperPlace& place,
                                               bool statistics, const PlainTile& tile,
                                               const float (&c)[kAccumulators],
                                               PlainScratch scratch, PlainSums& sums) {
  const PlainSlots slots(pair, to, place);
  const bool swapped = tile.product.swapped;
  const bool repeated = swapped && tile.diagonal;  // P = S^T
  RowStore<Scalar> rows[PlainShape::kRows];
  SUPCLAP_UNROLL
  for (int u = 0; u < PlainShape::kRows; ++u)
    rows[u].to = static_cast<Scalar*>(to.weights) + swapped * pair.size +
                 (place.x + PlainShape::row(u)) * pair.ld + place.y + RowStore<Scalar>::column();
  const auto store = [&](int u, int n, const float (&w)[2]) {
    // Rows and columns are padded to multiples of kPanelColumns.
    if (n < PlainShape::kColumns / 2 || tile.J.count > kPanelColumns) rows[u].put(n, w);
  };
  if (statistics && p.stats && !repeated) plain_similarity(tile, c, sums);
  if (!kInfonce) {
    plain_siglip(tile, c, slots.part_i, scratch, p.stats, kWeights && !repeated, sums, store);
  } else if (statistics) {
    const bool full = uniform(tile.full) && !p.stats;
    const bool done = full && plain_full_statistics(tile, c, slots.part_i, scratch);
    if (!uniform(done)) plain_statistics(tile, c, slots.part_i, scratch);
  } else if (!repeated) {
    plain_weights(tile, c, sums, store);
  }
  if (statistics && !tile.diagonal) {
    warpgroup_barrier();
    plain_columns(tile, kInfonce, slots.part_j, scratch);
  }
  warpgroup_barrier();
}

// One tile pair, by any number of blocks.
template <class Scalar, bool kInfonce, bool kWeights>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_plain_kernel(const __grid_constant__ CudaProblem p,
                        const __grid_constant__ HopperMaps maps, const PanelTile pair,
                        const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto& pipe = start_pipe<PlainColumns>(memory);
  __syncthreads();
  const bool diagonal = pair.i0 == pair.j0, statistics = !kWeights || (!kInfonce && to.part_i);
  const int products = diagonal && !statistics ? 1 : 2;
  const int team = uniform(threadIdx.x / kWarpgroup);
  if (team == kTeams) {
    fewer_registers<24>();
    if (threadIdx.x % kWarpgroup == 0) copy_plain_operands(p, maps, pair, products, pipe);
    return;
  }
  more_registers<240>();
  const PlainPlaces places(pair);
  const int steps = int(p.width / kStageDepth), thread = threadIdx.x % kWarpgroup;
  SUPCLAP_ROLLED
  for (int first = 0, item = 0; first + team < places.jobs; first += kTeams) {
    const int together = places.together(first);
    const HopperPlace place = places.place(first + team);
    const Side I = side_of(p, pair.i0, place.x, pair.ni);
    const Side J = side_of(p, pair.j0, place.y, pair.nj);
    PlainSums sums = {};
    SUPCLAP_ROLLED
    for (int n = 0; n < products; ++n, ++item) {
      const PlainProduct product{n == 1};
      // On their way while the operands are multiplied.
      PlainNumbers row[2], column[2];
      SUPCLAP_UNROLL
      for (int u = 0; u < 2; ++u) {
        row[u] = PlainNumbers(I, PlainShape::row(u), product.rows(), kInfonce, kWeights);
        column[u] = PlainNumbers(J, thread + u * kWarpgroup, product.columns(), kInfonce, kWeights);
      }
      float c[kAccumulators];
      // The products before this one, by both teams.
      const int before = first * products + n * together + team;
      const int next = together == kTeams ? 1 - team : team;
      mbarrier_wait(pipe.turn[team], (item + 1 + team) & 1);
      multiply_operands<Scalar>(c, pipe, before * steps, steps,
                                [&] { team_arrives(pipe.turn[next]); });
      SUPCLAP_UNROLL
      for (int u = 0; u < 2; ++u) pipe.columns[team].at[thread + u * kWarpgroup] = column[u];
      warpgroup_barrier();
      PlainTile tile{I,
                     J,
                     pipe.columns[team],
                     product,
                     logit_scale_2(p),
                     logit_bias_2(p),
                     diagonal,
                     {row[0], row[1]},
                     {},
                     false};
      tile.hide(p, c);
      plain_epilogue<Scalar, kInfonce, kWeights>(p, pair, to, place, statistics, tile, c,
                                                 PlainScratch{pipe.scratch[team]}, sums);
    }
    const PlainSlots slots(pair, to, place);
    SUPCLAP_UNROLL
    for (int u = 0; u < PlainShape::kRows; ++u) {
      const int x = PlainShape::row(u);
      const auto total = [](float part) { return warp_sum<PlainShape::kLanes>(part); };
      const LogSum similarity{total(sums.similarity[u]), total(sums.pairs[u])};
      const float base = total(sums.base[u]), bias = total(sums.bias[u]);
      if (threadIdx.x % PlainShape::kLanes != 0 || x >= I.count) continue;
      if (statistics && p.stats) slots.part_i.put(2 * kSimilarity, x, similarity, {0, 0});
      if (!kWeights) continue;
      slots.sums_i.put_one(kBase, x, base);
      slots.sums_i.put_one(kBias, x, bias);
    }
  }
}

}  // namespace supclap::cuda
