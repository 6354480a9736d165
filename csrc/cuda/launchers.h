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

// The rows (rows.cu).
std::string pack_rows(const Problem& p, bool text, Stream stream);  // p.T or p.A
std::string prepare_rows(const Problem& p, Stream stream);
std::string finish_statistics(const Problem& p, Stream stream);
std::string start_gradients(const Problem& p, Stream stream);  // omega, bounds, factors, unit
std::string finish_gradients(const Problem& p, Stream stream);

// One tile pair of the panel engine (panel.cu), in two steps.
int64_t panel_shared();  // bytes of shared memory of a block
std::string panel_tile(const Problem& p, const PanelTile& tile, const PanelScratch& scratch,
                       Stream stream);
std::string panel_merge(const Problem& p, const PanelTile& tile, const PanelScratch& scratch,
                        Stream stream);

// The first step in one launch, products included (gram.cu, Hopper): `panel` is not read.
constexpr int64_t kGramShared = 219136;  // bytes of shared memory of a block
bool gram_whole(const Problem& p);       // whether it copies left operands at once
std::string gram_tile(const Problem& p, const PanelTile& tile, const PanelScratch& scratch,
                      Stream stream);

// Literal rows (rows.cu): index [N] and count [1] int32.
std::string list_literal(const Problem& p, int* index, int* count, Stream stream);
std::string literal_statistics(const Problem& p, const int* index, const int* count, Stream stream);
std::string literal_gradients(const Problem& p, const int* index, const int* count, Stream stream);

// The loss in one launch (single.cu). How a problem is cut for a device, in tiles of `side` (0: by
// N); `blocks` is 0 where they do not fit on the chip. The problem needs its numbers and options,
// no tensors. Without a device, the current one.
SinglePlan plan_single(const Problem& p, bool gradient, int side, int multiprocessors,
                       int64_t shared_limit);
SinglePlan plan_single(const Problem& p, bool gradient, int side);
// The largest N that fits, gradients included; 0: none.
int64_t single_limit(Problem p, int side, int multiprocessors, int64_t shared_limit);
int64_t single_limit(const Problem& p, int side);
// scratch: plan.scratch bytes, in which running, factors, the operands where rows must be packed,
// and row_loss where it is null are laid out. loss [1], or null where row_loss is enough.
std::string single(Problem p, const SinglePlan& plan, uintptr_t scratch, float* loss, bool gradient,
                   Stream stream);

}  // namespace supclap::cuda
