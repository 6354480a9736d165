// Launchers of panel.cuh and merge.cuh.
#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/panel/merge.cuh"
#include "cuda/panel/panel.cuh"

namespace supclap::cuda {

static_assert(PanelShape::kBlockRows == kPanelRows && PanelShape::kBlockColumns == kPanelColumns);

namespace {

template <int kMode, bool kInfonce>
std::string launch_sweep(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                         Stream stream) {
  const auto kernel = !scratch.weights      ? panel_tile_kernel<kMode, kInfonce, false, 4>
                      : p.dtype == kFloat32 ? panel_tile_kernel<kMode, kInfonce, true, 4>
                                            : panel_tile_kernel<kMode, kInfonce, true, 2>;
  const Grid grid{{blocks_for(tile.ni, kPanelRows), blocks_for(tile.nj, kPanelColumns)},
                  size_t(panel_shared())};
  return launch("panel_tile", kernel, grid, stream, p, tile, scratch);
}

// Adds the partial results of one side, rows or columns, to the running ones.
std::string merge_side(const CudaProblem& p, const float* part, const float* sums, int slots, int n,
                       int64_t first, bool columns, Stream stream) {
  const unsigned blocks = blocks_for(n, kWarp);
  if (part) {
    int used = 0;
    for (int d = 0; d < kDirections; ++d) used |= direction_kept(p, d) << d;
    used |= (p.stats && !columns) << kDirections;
    const std::string error =
        launch("merge_statistics", merge_statistics_kernel,
               {{blocks, kDirections + 1}, kMergeScratch}, stream, p, part, slots, n, first, used);
    if (!error.empty()) return error;
  }
  const int of_support = p.mode == kPlain ? 0 : (1 << kTileSums) - (1 << kRhoText);
  const int used = of_support | (columns ? 0 : 1 << kBase | 1 << kBias);
  if (!sums || !used) return "";
  return launch("merge_sums", merge_sums_kernel, {{blocks, kTileSums}, kMergeScratch}, stream, p,
                sums, slots, n, first, used);
}

}  // namespace

int64_t panel_shared() { return kPanelScratch * sizeof(float); }

std::string panel_tile(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                       Stream stream) {
  const auto sweep = [&](auto go) { return go(p, tile, scratch, stream); };
  if (p.infonce) {
    if (p.mode == kPlain) return sweep(launch_sweep<kPlain, true>);
    if (p.mode == kOneSided) return sweep(launch_sweep<kOneSided, true>);
    if (p.mode == kShared) return sweep(launch_sweep<kShared, true>);
    return sweep(launch_sweep<kMirror, true>);
  }
  if (p.mode == kPlain) return sweep(launch_sweep<kPlain, false>);
  if (p.mode == kOneSided) return sweep(launch_sweep<kOneSided, false>);
  return sweep(launch_sweep<kMirror, false>);
}

std::string panel_merge(const CudaProblem& p, const PanelTile& tile, const PanelScratch& scratch,
                        Stream stream) {
  const int slots_i = int(blocks_for(tile.nj, kPanelColumns));
  const int slots_j = int(blocks_for(tile.ni, kPanelRows));
  const std::string error =
      merge_side(p, scratch.part_i, scratch.sums_i, slots_i, tile.ni, tile.i0, false, stream);
  if (!error.empty() || tile.i0 == tile.j0) return error;
  return merge_side(p, scratch.part_j, scratch.sums_j, slots_j, tile.nj, tile.j0, true, stream);
}

}  // namespace supclap::cuda
