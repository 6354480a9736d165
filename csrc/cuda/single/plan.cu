// How the single launch cuts a problem, and its launcher.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/single/kernel.cuh"

namespace supclap::cuda {

namespace {

// Sides of tiles, and the batch from which the next larger one is preferred: small tiles occupy
// every multiprocessor at small N, large ones read their operands less often.
struct TileSide {
  int side;
  int64_t until;
};
constexpr TileSide kSides[] = {{16, 256}, {32, 768}, {64, INT64_MAX}};

// Calls go(scalar, side) with the side as a constant.
template <class Go>
auto by_side(int dtype, int side, const Go& go) {
  return by_dtype(dtype, [&](auto scalar) {
    if (side == 16) return go(scalar, std::integral_constant<int, 16>{});
    if (side == 32) return go(scalar, std::integral_constant<int, 32>{});
    return go(scalar, std::integral_constant<int, 64>{});
  });
}

// Beyond this batch the weights, (2 + grams) N^2 numbers, would leave the L2 cache.
constexpr int64_t kMostRows = 4096;

int64_t aligned(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// Where there are few pairs, they are cut into slices, so that about kShares blocks multiply. A
// slice has at least kSliceBytes of a row, in whole fragments. N and D alone decide, not the
// device.
constexpr int kShares = 128, kSliceBytes = 256;

void cut(const CudaProblem& p, SinglePlan& plan) {
  const int64_t least = kSliceBytes / (p.dtype == kFloat32 ? 4 : 2);
  const int64_t most = std::min<int64_t>(kShares / plan.pairs, blocks_for(p.width, least));
  plan.slice = int(blocks_for(blocks_for(p.width, most < 1 ? 1 : most), 16) * 16);
  plan.slices = int(blocks_for(p.width, plan.slice));
}

// Whether a tower's rows must be packed: normalised, or not contiguous in whole pieces of 16 bytes.
bool packs(const CudaProblem& p, const void* X, int64_t stride_n, int64_t stride_d) {
  const bool as_given = stride_d == 1 && stride_n == p.width && p.D == p.width &&
                        reinterpret_cast<uintptr_t>(X) % 16 == 0;
  return p.normalize || !as_given;
}

// Lays out the parts of the scratch, one after the other, and returns its size.
int64_t lay_out(CudaProblem& p, const SinglePlan& plan, uintptr_t start, SingleScratch& to) {
  const int64_t padded = int64_t(plan.tiles) * plan.side, itemsize = p.dtype == kFloat32 ? 4 : 2;
  const int64_t operand = p.N * p.width * itemsize;
  uintptr_t at = start;
  const auto take = [&](auto*& field, int64_t bytes) {
    field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(at);
    at += aligned(bytes);
  };
  take(to.part, kPlanes * plan.tiles * padded * 4);
  take(to.sums, kTileSums * plan.tiles * padded * 4);
  take(to.literal, (p.N + 1) * 4);
  take(to.matrices, (2 + grams_of(p)) * padded * padded * itemsize);
  const int64_t slices = plan.slices > 1 ? plan.pairs * plan.slices : 0;
  take(to.slices, slices * (2 + grams_of(p)) * plan.side * plan.side * 4);
  take(p.running, kPlanes * p.N * 4);
  take(p.factors, 2 * kDirections * p.N * 4);
  if (!p.row_loss) take(p.row_loss, p.N * 4);
  p.T = const_cast<void*>(p.text);
  p.A = const_cast<void*>(p.audio);
  if (packs(p, p.text, p.text_n, p.text_d)) take(p.T, operand);
  if (packs(p, p.audio, p.audio_n, p.audio_d)) take(p.A, operand);
  return int64_t(at - start);
}

}  // namespace

SinglePlan plan_single(const CudaProblem& p, bool gradient, int side, int multiprocessors,
                       int64_t shared_limit) {
  if (p.N > kMostRows) return {};
  for (const TileSide& choice : kSides) {
    if (side ? side != choice.side : p.N > choice.until) continue;
    SinglePlan plan{};
    plan.side = choice.side;
    const int64_t tiles = blocks_for(p.N, plan.side);
    plan.tiles = int(tiles);
    plan.pairs = int(tiles * (tiles + 1) / 2);
    cut(p, plan);
    const int64_t items = tiles * blocks_for(p.width, plan.side), shares = plan.pairs * plan.slices;
    const int64_t most = gradient && items > shares ? items : shares;
    plan.blocks = int(most < multiprocessors ? most : multiprocessors);
    if (plan.blocks < 1) return {};
    plan.kept = p.infonce && gradient ? blocks_for(plan.pairs, plan.blocks) : 1;
    by_side(p.dtype, plan.side, [&](auto scalar, auto side) {
      plan.shared =
          4 * int64_t(SingleLayout<decltype(scalar), side>::size(grams_of(p), plan.kept, p.width));
      return std::string();
    });
    SingleScratch scratch;
    CudaProblem laid_out = p;
    plan.scratch = lay_out(laid_out, plan, 0, scratch);
    if (plan.shared <= shared_limit) return plan;
  }
  return {};
}

SinglePlan plan_single(const CudaProblem& p, bool gradient, int side) {
  return plan_single(p, gradient, side, multiprocessors(), shared_limit());
}

int64_t single_limit(CudaProblem p, int side, int multiprocessors, int64_t shared_limit) {
  int64_t N = 0;
  for (p.N = 16; plan_single(p, true, side, multiprocessors, shared_limit).blocks; p.N += 16)
    N = p.N;
  return N;
}
int64_t single_limit(const CudaProblem& p, int side) {
  return single_limit(p, side, multiprocessors(), shared_limit());
}

std::string single(CudaProblem p, const SinglePlan& plan, uintptr_t scratch, float* loss,
                   bool gradient, Stream stream) {
  SingleScratch to;
  lay_out(p, plan, scratch, to);
  const Grid grid{unsigned(plan.blocks), size_t(plan.shared), true};
  return by_side(p.dtype, plan.side, [&](auto scalar, auto side) {
    return launch("single", single_kernel<decltype(scalar), side>, grid, stream, p, plan, to, loss,
                  gradient);
  });
}

}  // namespace supclap::cuda
