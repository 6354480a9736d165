// How operands reach the tensor cores of a Hopper block: one thread copies them, by tensor maps,
// into stages in shared memory; two teams take turns in multiplying what is there.
//
// A block is three warpgroups: two teams and one that copies. While one team multiplies, the other
// turns its products into statistics or weights.
#pragma once

#include "cuda/device/hopper.cuh"

namespace supclap::cuda {

constexpr int kStageDepth = 64;  // columns of an operand in a stage: 128 bytes
constexpr int kStages = 4;       // stages on their way, or being multiplied
constexpr int kTeams = 2;        // warpgroups that multiply
constexpr int kTeamWarps = kWarpgroup / kWarp;
constexpr int kHopperThreads = (kTeams + 1) * kWarpgroup;

// First row and first column of a team's tile within the tile pair.
struct HopperPlace {
  int x, y;
};

// The tensor maps of one launch. Boxes of the first four have 64 columns and, with support vectors,
// kGroupRows rows on the left and kPanelColumns on the right; for the plain loss they have
// kPlainRows and kPlainColumns rows.
struct HopperMaps {
  TensorMap text_left, audio_left;
  TensorMap text_right, audio_right;
  TensorMap left;    // a whole left operand, with support vectors
  bool whole;        // `left` exists
  bool audio_first;  // in left operands audios come first: the tower at the lower address does
};

struct HopperStage {
  unsigned char left[2 * kPanelRows * 128];     // t 0-7, a 0-7, t 8-15, ...; or a 0-7, t 0-7, ...
  unsigned char right[2][kPanelColumns * 128];  // audios, texts
};
struct alignas(1024) HopperPipe {
  HopperStage stage[kStages];
  Mbarrier full[kStages], empty[kStages];
  Mbarrier turn[kTeams];  // opens when this team may multiply: the other has all its operands
};
// All shared memory of a block. Columns: what each team keeps of its tile's columns.
template <class Columns>
struct HopperShared : HopperPipe {
  Columns columns[kTeams];
  float scratch[kTeams][2 * kDirections * kTeamWarps * kPanelColumns];
};

// The block's shared memory, at a multiple of 1024 bytes, with its barriers made. A barrier of all
// threads must follow.
template <class Columns>
__device__ HopperShared<Columns>& start_pipe(unsigned char* memory) {
  const uint32_t start = shared_address(memory);
  auto& pipe = *reinterpret_cast<HopperShared<Columns>*>(memory + (1024 - start % 1024) % 1024);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kStages; ++slot) {
      mbarrier_init(pipe.full[slot], 1);
      mbarrier_init(pipe.empty[slot], kTeamWarps);
    }
    for (int team = 0; team < kTeams; ++team) mbarrier_init(pipe.turn[team], kTeamWarps);
    mbarriers_ready();
  }
  return pipe;
}

// Waits until the stage for operands number `fill` is empty, and announces the bytes that will
// come; returns its index.
__device__ inline int next_stage(HopperPipe& pipe, int fill) {
  const int slot = fill % kStages;
  mbarrier_wait(pipe.empty[slot], (fill / kStages + 1) & 1);
  mbarrier_expect(pipe.full[slot], sizeof(HopperStage));
  return slot;
}

// Each warp of a team arrives once.
__device__ __forceinline__ void team_arrives(Mbarrier& at) {
  if (threadIdx.x % kWarp == 0) mbarrier_arrive(at);
}

// A team's products of one tile, from `steps` stages: operands number `fill` and the next ones.
// Calls passed() when the team needs no further operands.
template <class Scalar, class Passed>
__device__ __forceinline__ void multiply_operands(float (&c)[kAccumulators], HopperPipe& pipe,
                                                  int fill, int steps, const Passed& passed) {
  SUPCLAP_ROLLED
  for (int step = 0; step < steps; ++step) {
    const int slot = (fill + step) % kStages;
    mbarrier_wait(pipe.full[slot], (fill + step) / kStages & 1);
    const uint64_t left = operand_at(pipe.stage[slot].left);
    const uint64_t right = operand_at(pipe.stage[slot].right);
    wgmma_begin();
    SUPCLAP_UNROLL
    for (int k = 0; k < kStageDepth / 16; ++k)
      wgmma(c, left + k * kNextColumns, right + k * kNextColumns, step + k > 0, Scalar{});
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) team_arrives(pipe.empty[(fill + step - 1) % kStages]);
  }
  passed();
  wgmma_wait<0>();
  wgmma_end(c);
  team_arrives(pipe.empty[(fill + steps - 1) % kStages]);
}

}  // namespace supclap::cuda
