// What the C++ side may ask of the CUDA side.
//
// Streams are addresses of a cudaStream_t as integers, so that neither torch nor the CUDA headers
// are needed to call these. A launcher returns an empty string, or a message that begins with its
// kernel's name; it never waits for the device.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/problem.h"

namespace supclap::cuda {

using Stream = uintptr_t;

// Devices the driver offers; 0 also where there is no driver.
int device_count();
int current_device();  // -1 without one

// The rows (rows/rows.cu).
std::string pack_rows(const CudaProblem& p, bool text, Stream stream);  // p.T or p.A
std::string prepare_rows(const CudaProblem& p, Stream stream);
std::string finish_statistics(const CudaProblem& p, Stream stream);
std::string start_gradients(const CudaProblem& p, Stream stream);  // omega, bounds, factors, unit
std::string finish_gradients(const CudaProblem& p, Stream stream);

// One tile pair of the panel engine (panel/panel.cu), in two steps.
int64_t panel_shared();  // bytes of shared memory of a block
std::string panel_tile(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                       Stream stream);
std::string panel_merge(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                        Stream stream);

// The first step in one launch, products included (hopper/sweep.cu): `panel` is not read.
constexpr int64_t kHopperShared = 219136;        // bytes of shared memory of a block
bool hopper_copies_whole(const CudaProblem& p);  // whether it copies left operands whole
std::string hopper_tile(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                        Stream stream);

// Literal rows (rows/rows.cu): index [N] and count [1] int32.
std::string list_literal(const CudaProblem& p, int* index, int* count, Stream stream);
std::string literal_statistics(const CudaProblem& p, const int* index, const int* count,
                               Stream stream);
std::string literal_gradients(const CudaProblem& p, const int* index, const int* count,
                              Stream stream);

// The loss in one launch (single/plan.cu). A plan says how a problem is cut for a device, in tiles
// of `side` (0: by N); its `blocks` is 0 where the tiles do not fit on the chip. The problem needs
// its numbers and options, no tensors. Without numbers of a device, those of the current one hold.
SinglePlan plan_single(const CudaProblem& p, bool gradient, int side, int multiprocessors,
                       int64_t shared_limit);
SinglePlan plan_single(const CudaProblem& p, bool gradient, int side);
// The largest N that fits with gradients, or 0.
int64_t single_limit(CudaProblem p, int side, int multiprocessors, int64_t shared_limit);
int64_t single_limit(const CudaProblem& p, int side);
// `scratch` has plan.scratch bytes: running, factors, the operands where rows must be packed, and
// row_loss where it is null are laid out there. `loss` is [1], or null where row_loss is enough.
std::string single(CudaProblem p, const SinglePlan& plan, uintptr_t scratch, float* loss,
                   bool gradient, Stream stream);

}  // namespace supclap::cuda
