// A sweep over one tile pair in one kernel, for Hopper: no logit leaves the chip.
//
// With Z = [T; A] every mode is a function of Z Z^T. A team multiplies 32 texts and their audios
// with 128 audios and their texts. In the left operand texts and audios alternate in groups of 8
// rows, so the accumulators of a thread are whole 2 x 2 blocks: S, P, Q and K of one row i with 32
// columns j (of the modes with one of Q and K, a quarter of the product is in vain).
//
// Tiles, slots and padding are those of the panel engine (panel.cuh), and so is what merges the
// partial results (merge.cuh).
#pragma once

#include "cuda/hopper/full_tile.cuh"
#include "cuda/hopper/general.cuh"
#include "cuda/hopper/pipe.cuh"
#include "cuda/hopper/siglip.cuh"

namespace supclap::cuda {

// The tiles of a pair, in the order in which blocks take them.
struct HopperTiles {
  int down, count;
  // Tiles on the diagonal cost more, and go to different blocks.
  __device__ HopperPlace place(int n) const {
    const int across = n / down, below = (n + 5 * across) % down;
    return {below * kPanelRows, across * kPanelColumns};
  }
  __device__ explicit HopperTiles(const PanelTile& pair)
      : down((pair.ni + kPanelRows - 1) / kPanelRows),
        count(down * ((pair.nj + kPanelColumns - 1) / kPanelColumns)) {}
};

// A left operand in pieces: where its rows do not all exist, a group has fewer.
__device__ inline void copy_left(unsigned char* to, const HopperMaps& maps, int row, int column,
                                 Mbarrier& full) {
  const int text = maps.audio_first * kGroupBytes, audio = kGroupBytes - text;
  SUPCLAP_ROLLED
  for (int end = row + kPanelRows; row < end; row += kGroupRows, to += 2 * kGroupBytes) {
    copy_box(to + text, maps.text_left, row, column, full);
    copy_box(to + audio, maps.audio_left, row, column, full);
  }
}

// What one thread copies: the operands of the block's tiles, into the stages one after the other.
__device__ inline void copy_operands(const CudaProblem& p, const HopperMaps& maps,
                                     const PanelTile& pair, HopperPipe& pipe) {
  const HopperTiles tiles(pair);
  int fill = 0;
  for (int n = blockIdx.x; n < tiles.count; n += gridDim.x) {
    const HopperPlace place = tiles.place(n);
    const int i = int(pair.i0) + place.x, j = int(pair.j0) + place.y;
    for (int column = 0; column < p.width; column += kStageDepth, ++fill) {
      const int slot = next_stage(pipe, fill);
      HopperStage& stage = pipe.stage[slot];
      Mbarrier& full = pipe.full[slot];
      if (maps.whole && i % kGroupRows == 0 && i + kPanelRows <= p.N)
        copy_groups(stage.left, maps.left, i / kGroupRows, column, full);
      else
        copy_left(stage.left, maps, i, column, full);
      copy_box(stage.right[0], maps.audio_right, j, column, full);
      copy_box(stage.right[1], maps.text_right, j, column, full);
    }
  }
}

// Turns the products of a left operand that starts with audios into those of one that starts with
// texts.
__device__ __forceinline__ void exchange_towers(float (&c)[kAccumulators]) {
  SUPCLAP_UNROLL
  for (int n = 0; n < kAccumulators; n += 4) {
    const float first[] = {c[n], c[n + 1]};
    c[n] = c[n + 2];
    c[n + 1] = c[n + 3];
    c[n + 2] = first[0];
    c[n + 3] = first[1];
  }
}

// What a team makes of its products:
//
//   InfoNCE, sweep 1   full_statistics of a full tile; general_statistics of any other, and where
//                      full_statistics could have lost digits
//   InfoNCE, sweep 2   full_weights of a full tile, if k2 and all factors are `positive`; else
//                      general_weights
//   SigLIP             full_siglip of a full tile, losses and weights at once; else
//                      general_statistics, if this sweep takes losses, and general_weights
//
// A sweep that takes statistics for SVRStats treats no tile as full: ranks need the largest logits.
template <class Scalar, int kMode, bool kInfonce, bool kWeights>
__device__ __forceinline__ void hopper_epilogue(const CudaProblem& p, const PanelTile& pair,
                                                const PanelScratch& to, const HopperPlace& place,
                                                bool positive, HopperTile& tile,
                                                const float (&c)[kAccumulators], float* memory) {
  const bool diagonal = tile.diagonal, statistics = !kWeights || (!kInfonce && to.part_i);
  const ColumnScratch scratch{{memory}, !kInfonce && !(statistics && p.stats)};
  // Slots are computed where they are used: ahead of that they would take registers.
  const auto slots = [&] { return HopperSlots(pair, to, place); };
  RowStore<Scalar> rows[4];
  SUPCLAP_UNROLL
  for (int n = 0; n < 4; ++n)
    rows[n].to = static_cast<Scalar*>(to.weights) + (n - (n > 0 && diagonal)) * pair.size +
                 (place.x + HopperShape::row()) * pair.ld + place.y + RowStore<Scalar>::column();
  const auto store = [&](int column, const float (&w)[4][2]) {
    rows[0].put(column, w[0]);
    if (!again(diagonal)) rows[1].put(column, w[1]);  // else the compiler makes two of everything
    rows[2].put(column, w[2]);
    if (kMode == kMirror) rows[3].put(column, w[3]);
  };
  // What the warps left of the columns becomes the team's.
  const auto join_statistics = [&] {
    if (!diagonal) {
      warpgroup_barrier();
      column_statistics(tile, kInfonce, slots().part_j, scratch);
    }
    warpgroup_barrier();
  };
  const auto join_sums = [&] {
    if (!diagonal) {
      warpgroup_barrier();
      if (scratch.once)
        siglip_columns<kWeights>(tile, slots(), scratch);
      else
        column_sums(tile, slots().sums_j, scratch);
    }
    warpgroup_barrier();
  };
  const bool full = uniform(tile.full) && !(statistics && p.stats);
  if constexpr (kInfonce && !kWeights) {
    const bool done = full && full_statistics(tile, c, slots().part_i, scratch);
    if (!uniform(done)) general_statistics(p, tile, c, true, slots().part_i, scratch);
    join_statistics();
  } else if constexpr (kInfonce) {
    tile.hidden = again(tile.hidden);
    if (full && positive)
      full_weights(tile, c, slots().sums_i, scratch, store);
    else
      general_weights(tile, c, true, slots().sums_i, scratch, store);
    join_sums();
  } else {
    if (full) {
      full_siglip<kWeights>(tile, c, slots(), scratch, store);
    } else {
      if (statistics) general_statistics(p, tile, c, false, slots().part_i, scratch);
      if (statistics && !scratch.once) join_statistics();
      tile.hidden = again(tile.hidden);
      if (kWeights) general_weights(tile, c, false, slots().sums_i, scratch, store);
    }
    if (kWeights || scratch.once) join_sums();
  }
}

// One tile pair, by any number of blocks.
template <class Scalar, int kMode, bool kInfonce, bool kWeights>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(const __grid_constant__ CudaProblem p, const __grid_constant__ HopperMaps maps,
                  const PanelTile pair, const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto& pipe = start_pipe<HopperColumns>(memory);
  __syncthreads();
  const int team = uniform(threadIdx.x / kWarpgroup);
  if (team == kTeams) {
    fewer_registers<24>();
    if (threadIdx.x % kWarpgroup == 0) copy_operands(p, maps, pair, pipe);
    return;
  }
  more_registers<240>();
  const HopperTiles tiles(pair);
  const int steps = int(p.width / kStageDepth);
  const bool positive = kWeights && kInfonce && p.unit[1] == 0 && logit_scale_2(p) > 0;
  for (int round = 0;; ++round) {
    const int taken = kTeams * round + team, n = blockIdx.x + taken * gridDim.x;
    if (n >= tiles.count) break;
    const HopperPlace place = tiles.place(n);
    const Side I = side_of(p, pair.i0, place.x, pair.ni);
    const Side J = side_of(p, pair.j0, place.y, pair.nj);
    // On their way while the operands are multiplied.
    const HopperNumbers row(I, HopperShape::row(), kMode, kInfonce, kWeights);
    const HopperNumbers column(J, threadIdx.x % kWarpgroup, kMode, kInfonce, kWeights);
    float c[kAccumulators];
    mbarrier_wait(pipe.turn[team], (round + 1 + team) & 1);
    multiply_operands<Scalar>(c, pipe, taken * steps, steps,
                              [&] { team_arrives(pipe.turn[1 - team]); });
    if (maps.audio_first) exchange_towers(c);
    pipe.columns[team].keep(column, logit_scale_2(p), kMode, kInfonce, kWeights);
    warpgroup_barrier();
    HopperTile tile(p, c, I, J, row, pipe.columns[team], kMode, pair.i0 == pair.j0);
    hopper_epilogue<Scalar, kMode, kInfonce, kWeights>(p, pair, to, place, positive, tile, c,
                                                       pipe.scratch[team]);
  }
}

}  // namespace supclap::cuda
