// A sweep over one tile pair in one kernel, for Hopper: no logit leaves the chip.
//
// With Z = [T; A] every mode is a function of Z Z^T. A warpgroup multiplies 32 texts and their
// audios with 128 audios and their texts. In the left operand texts and audios alternate in groups
// of 8 rows, so the accumulators of a thread are whole 2 x 2 blocks: S, P, Q and K of one row i
// with 32 columns j (of the modes with one of Q and K, a quarter of the product is in vain).
//
// A block is one warpgroup that copies and two that take tiles in turn: while one multiplies,
// the other turns its products into statistics or weights. Tiles, slots and padding are those of
// the panel engine (panel.cuh), and so is what merges the partial results.
#pragma once

#include "cuda/hopper/siglip.cuh"

namespace supclap::cuda {

constexpr int kGramDepth = 64;  // columns of an operand: 128 bytes
constexpr int kGramStages = 4;  // operands on their way, or being multiplied
constexpr int kGramTeams = 2;   // warpgroups that multiply
constexpr int kGramThreads = (kGramTeams + 1) * kWarpgroup;
constexpr int kGroupRows = 8, kGroupBytes = kGroupRows * 128;

struct GramMaps {
  TensorMap text_left, audio_left;    // boxes of kGroupRows, or of kCrossRows (cross.cuh)
  TensorMap text_right, audio_right;  // and of kGramColumns, or kCrossColumns
  TensorMap left;                     // of a whole left operand
  bool whole;                         // there is such a map
  bool audio_first;                   // in left operands: the tower at the lower address is
};

struct GramStage {
  unsigned char left[2 * kGramRows * 128];     // t 0-7, a 0-7, t 8-15, ...; or a 0-7, t 0-7, ...
  unsigned char right[2][kGramColumns * 128];  // audios, texts
};
struct alignas(1024) GramPipe {
  GramStage stage[kGramStages];
  Mbarrier full[kGramStages], empty[kGramStages];
  Mbarrier turn[kGramTeams];  // to multiply: the other team has all its operands
};
template <class Columns>
struct GramShared : GramPipe {
  Columns columns[kGramTeams];
  float scratch[kGramTeams][2 * kDirections * kTeamWarps * kGramColumns];
};

// Of a block, at a multiple of 1024 bytes; before a barrier of all threads.
template <class Columns>
__device__ GramShared<Columns>& gram_start(unsigned char* memory) {
  const uint32_t start = shared_address(memory);
  auto& at = *reinterpret_cast<GramShared<Columns>*>(memory + (1024 - start % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kGramStages; ++slot)
      mbarrier_init(at.full[slot], 1), mbarrier_init(at.empty[slot], kTeamWarps);
    for (int team = 0; team < kGramTeams; ++team) mbarrier_init(at.turn[team], kTeamWarps);
    mbarriers_ready();
  }
  return at;
}

// The tiles of a pair, in the order in which blocks take them.
struct GramTiles {
  int down, count;
  // Those on the diagonal cost more, and go to different blocks.
  __device__ GramPlace place(int n) const {
    const int across = n / down, below = (n + 5 * across) % down;
    return {below * kGramRows, across * kGramColumns};
  }
  __device__ explicit GramTiles(const PanelTile& tile)
      : down((tile.ni + kGramRows - 1) / kGramRows),
        count(down * ((tile.nj + kGramColumns - 1) / kGramColumns)) {}
};

// The stage that is filled next, once it is empty; a whole one is expected.
__device__ inline int gram_fill(GramPipe& at, int fill) {
  const int slot = fill % kGramStages;
  mbarrier_wait(at.empty[slot], (fill / kGramStages + 1) & 1);
  mbarrier_expect(at.full[slot], sizeof(GramStage));
  return slot;
}

// A left operand in pieces: where its rows are not all there, a group has fewer.
__device__ inline void copy_left(unsigned char* to, const GramMaps& maps, int row, int column,
                                 Mbarrier& full) {
  const int text = maps.audio_first * kGroupBytes, audio = kGroupBytes - text;
  SUPCLAP_ROLLED
  for (int end = row + kGramRows; row < end; row += kGroupRows, to += 2 * kGroupBytes) {
    copy_box(to + text, maps.text_left, row, column, full);
    copy_box(to + audio, maps.audio_left, row, column, full);
  }
}

// What one thread copies: the operands of the block's tiles, into the stages one after the other.
__device__ inline void gram_copies(const Problem& p, const GramMaps& maps, const PanelTile& tile,
                                   GramPipe& at) {
  const GramTiles tiles(tile);
  int fill = 0;
  for (int n = blockIdx.x; n < tiles.count; n += gridDim.x) {
    const GramPlace place = tiles.place(n);
    const int i = int(tile.i0) + place.x, j = int(tile.j0) + place.y;
    for (int column = 0; column < p.width; column += kGramDepth, ++fill) {
      const int slot = gram_fill(at, fill);
      GramStage& stage = at.stage[slot];
      Mbarrier& full = at.full[slot];
      if (maps.whole && i % kGroupRows == 0 && i + kGramRows <= p.N)
        copy_groups(stage.left, maps.left, i / kGroupRows, column, full);
      else
        copy_left(stage.left, maps, i, column, full);
      copy_box(stage.right[0], maps.audio_right, j, column, full);
      copy_box(stage.right[1], maps.text_right, j, column, full);
    }
  }
}

// One arrival for each warp of a team.
__device__ __forceinline__ void team_arrives(Mbarrier& at) {
  if (threadIdx.x % kWarp == 0) mbarrier_arrive(at);
}

// A team's product of one tile, from the stages that `fill` and the next are copied to. Calls
// passed() when it needs no further operands.
template <class Scalar, class Passed>
__device__ __forceinline__ void gram_products(float (&c)[kAccumulators], GramPipe& at, int fill,
                                              int steps, const Passed& passed) {
  SUPCLAP_ROLLED
  for (int step = 0; step < steps; ++step) {
    const int slot = (fill + step) % kGramStages;
    mbarrier_wait(at.full[slot], (fill + step) / kGramStages & 1);
    const uint64_t left = operand_at(at.stage[slot].left), right = operand_at(at.stage[slot].right);
    wgmma_begin();
    SUPCLAP_UNROLL
    for (int k = 0; k < kGramDepth / 16; ++k)
      wgmma(c, left + k * kNextColumns, right + k * kNextColumns, step + k > 0, Scalar{});
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) team_arrives(at.empty[(fill + step - 1) % kGramStages]);
  }
  passed();
  wgmma_wait<0>();
  wgmma_end(c);
  team_arrives(at.empty[(fill + steps - 1) % kGramStages]);
}

// Products as hopper.cuh has them of a left operand that starts with texts, from those of one that
// starts with audios.
__device__ __forceinline__ void exchange_towers(float (&c)[kAccumulators]) {
  SUPCLAP_UNROLL
  for (int n = 0; n < kAccumulators; n += 4) {
    const float first[] = {c[n], c[n + 1]};
    c[n] = c[n + 2], c[n + 1] = c[n + 3];
    c[n + 2] = first[0], c[n + 3] = first[1];
  }
}

// A row's weights on their way to memory. Of each 8 columns a lane has two: with its neighbour's of
// two times 8 it writes four next to each other, so that the lanes of a row fill 32 bytes.
template <class Scalar>
struct RowStore {
  Scalar* to;       // of column()
  uint32_t before;  // the last two
  __device__ static int column() {
    const int lane = threadIdx.x % GramShape::kLanes;
    return lane / 2 * 4 + lane % 2 * 8;
  }
  // Columns n and n + 1 of this lane: all lanes, in the columns' order.
  __device__ __forceinline__ void put(int n, const float (&w)[2]) {
    const uint32_t low = narrow<Scalar>(w[0]).bits, high = narrow<Scalar>(w[1]).bits;
    const uint32_t two = low | high << 16;
    if (n % 4 == 0) {
      before = two;
      return;
    }
    const bool odd = threadIdx.x % 2;
    const uint32_t other = shuffle_xor(odd ? before : two, 1);
    struct alignas(8) Four {
      uint32_t at[2];
    };
    *reinterpret_cast<Four*>(to + GramShape::beyond(n - 2)) =
        odd ? Four{other, two} : Four{before, other};
  }
};

// What a team makes of its products: sweep 1, sweep 2, or with SigLIP both. `positive`: k2 and all
// factors are.
template <class Scalar, int kMode, bool kInfonce, bool kWeights>
__device__ __forceinline__ void gram_epilogue(const Problem& p, const PanelTile& tile,
                                              const PanelScratch& to, const GramPlace& place,
                                              bool positive, GramTile& own,
                                              const float (&c)[kAccumulators], float* memory) {
  const bool diagonal = own.diagonal, statistics = !kWeights || (!kInfonce && to.part_i);
  // Where they are wanted: ahead of that they would take registers.
  const auto slots = [&] { return GramSlots(tile, to, place); };
  const ColumnScratch scratch{{memory}, !kInfonce && !(statistics && p.stats)};
  RowStore<Scalar> rows[4];
  SUPCLAP_UNROLL
  for (int n = 0; n < 4; ++n)
    rows[n].to = static_cast<Scalar*>(to.weights) + (n - (n > 0 && diagonal)) * tile.size +
                 (place.x + GramShape::row()) * tile.ld + place.y + RowStore<Scalar>::column();
  const auto store = [&](int column, const float (&w)[4][2]) {
    rows[0].put(column, w[0]);
    if (!again(diagonal)) rows[1].put(column, w[1]);  // else the compiler makes two of everything
    rows[2].put(column, w[2]);
    if (kMode == kMirror) rows[3].put(column, w[3]);
  };
  const bool plain = uniform(own.plain) && !(statistics && p.stats);
  if (!kInfonce && plain) {
    plain_siglip<kWeights>(own, c, slots(), scratch, store);
  } else {
    if (statistics) {
      const bool done = kInfonce && plain && plain_statistics(own, c, slots().part_i, scratch);
      if (!uniform(done)) gram_statistics(p, own, c, kInfonce, slots().part_i, scratch);
    }
    if (statistics && !scratch.once) {
      if (!diagonal) {
        warpgroup_barrier();
        column_statistics(own, kInfonce, slots().part_j, scratch);
      }
      warpgroup_barrier();
    }
    own.hidden = again(own.hidden);
    if (kWeights && kInfonce && plain && positive)
      plain_weights(own, c, slots().sums_i, scratch, store);
    else if (kWeights)
      gram_weights(own, c, kInfonce, slots().sums_i, scratch, store);
  }
  if (!kWeights && !scratch.once) return;
  if (!diagonal) {
    warpgroup_barrier();
    if (scratch.once)
      siglip_columns<kWeights>(own, slots(), scratch);
    else
      column_sums(own, slots().sums_j, scratch);
  }
  warpgroup_barrier();
}

// One tile pair, by any number of blocks.
template <class Scalar, int kMode, bool kInfonce, bool kWeights>
__global__ void __launch_bounds__(kGramThreads, 1)
    gram_kernel(const __grid_constant__ Problem p, const __grid_constant__ GramMaps maps,
                const PanelTile tile, const PanelScratch to) {
  SUPCLAP_SHARED(memory);
  auto& at = gram_start<GramColumns>(memory);
  __syncthreads();
  const int team = uniform(threadIdx.x / kWarpgroup);
  if (team == kGramTeams) {
    fewer_registers<24>();
    if (threadIdx.x % kWarpgroup == 0) gram_copies(p, maps, tile, at);
  } else {
    more_registers<240>();
    const GramTiles tiles(tile);
    const int steps = int(p.width / kGramDepth);
    const bool positive = kWeights && kInfonce && p.unit[1] == 0 && logit_scale_2(p) > 0;
    for (int round = 0;; ++round) {
      const int taken = kGramTeams * round + team, n = blockIdx.x + taken * gridDim.x;
      if (n >= tiles.count) break;
      const GramPlace place = tiles.place(n);
      const Side I = side_of(p, tile.i0, place.x, tile.ni);
      const Side J = side_of(p, tile.j0, place.y, tile.nj);
      // On their way while the operands are multiplied.
      const GramNumbers row(I, GramShape::row(), kMode, kInfonce, kWeights);
      const GramNumbers column(J, threadIdx.x % kWarpgroup, kMode, kInfonce, kWeights);
      float c[kAccumulators];
      mbarrier_wait(at.turn[team], (round + 1 + team) & 1);
      gram_products<Scalar>(c, at, taken * steps, steps, [&] { team_arrives(at.turn[1 - team]); });
      if (maps.audio_first) exchange_towers(c);
      at.columns[team].keep(column, logit_scale_2(p), kMode, kInfonce, kWeights);
      warpgroup_barrier();
      GramTile own(p, c, I, J, row, at.columns[team], kMode, tile.i0 == tile.j0);
      gram_epilogue<Scalar, kMode, kInfonce, kWeights>(p, tile, to, place, positive, own, c,
                                                       at.scratch[team]);
    }
  }
}

}  // namespace supclap::cuda
