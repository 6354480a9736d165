// Launcher of gram.cuh, for sm_90a.
#include <utility>

#include "cuda/hopper/plain_loss.cuh"
#include "cuda/launch.h"
#include "cuda/launchers.h"

namespace supclap::cuda {

namespace {

static_assert(kGramShared == sizeof(GramShared<GramColumns>) + alignof(GramPipe));
static_assert(kGramShared >= sizeof(GramShared<CrossColumns>) + alignof(GramPipe));

// Tensors of 16-bit elements and boxes of them, as copies with the 128-byte swizzle see them: the
// first dimension is that of neighbours, strides are in elements.
struct Boxes {
  const void* start;
  int64_t size[4], stride[4];
  int box[4], rank;
};

#ifdef __CUDACC__
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const auto error =
      cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &status);
#else
  const auto error = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &status);
#endif
  return error == cudaSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

std::string tensor_map(const Problem& p, const Boxes& of, TensorMap& map) {
  static const Encode encode = encoder();
  if (!encode) return "gram_tile: the driver has no cuTensorMapEncodeTiled";
  const auto type =
      p.dtype == kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t size[4], stride[4];  // the first stride is not told
  cuuint32_t box[4], step[4];
  for (int n = 0; n < 4; ++n)
    size[n] = of.size[n], stride[n] = of.stride[n] * 2, box[n] = of.box[n], step[n] = 1;
  const CUresult result =
      encode(&map, type, of.rank, const_cast<void*>(of.start), size, stride + 1, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "gram_tile: cuTensorMapEncodeTiled: error " + std::to_string(int(result));
}
#else
std::string tensor_map(const Problem&, const Boxes& of, TensorMap& map) {
  map.start = of.start;
  for (int n = 0; n < 4; ++n)
    map.size[n] = of.size[n], map.stride[n] = of.stride[n], map.box[n] = of.box[n];
  return "";
}
#endif

// Boxes of `rows` x 64 of an operand [N, width].
Boxes rows_of(const Problem& p, const void* X, int rows) {
  return {X, {p.width, p.N, 1, 1}, {1, p.width, 0, 0}, {kGramDepth, rows, 1, 1}, 2};
}
// Left operands of gram.cuh: groups of rows of two towers in turn.
Boxes groups_of(const Problem& p, const void* first, const void* second) {
  const int64_t between = static_cast<const char*>(second) - static_cast<const char*>(first);
  return {first,
          {p.width, kGroupRows, 2, p.N / kGroupRows},
          {1, p.width, between / 2, kGroupRows * p.width},
          {kGramDepth, kGroupRows, 2, kGramRows / kGroupRows},
          4};
}

template <class Scalar, int kMode, bool kInfonce>
std::string launch_sweep(const Problem& p, const GramMaps& maps, const PanelTile& tile,
                         const PanelScratch& scratch, Stream stream) {
  const auto kernel = scratch.weights ? gram_kernel<Scalar, kMode, kInfonce, true>
                                      : gram_kernel<Scalar, kMode, kInfonce, false>;
  const unsigned tiles = blocks_for(tile.ni, kGramRows) * blocks_for(tile.nj, kGramColumns);
  const Grid grid{{std::min(tiles, unsigned(multiprocessors()))}, kGramShared, false, kGramThreads};
  return launch("gram_tile", kernel, grid, stream, p, maps, tile, scratch);
}

template <class Scalar, bool kInfonce>
std::string launch_cross(const Problem& p, const GramMaps& maps, const PanelTile& tile,
                         const PanelScratch& scratch, Stream stream) {
  const auto kernel = scratch.weights ? cross_kernel<Scalar, kInfonce, true>
                                      : cross_kernel<Scalar, kInfonce, false>;
  const unsigned places = blocks_for(tile.ni, kCrossRows) * blocks_for(tile.nj, kCrossColumns);
  const Grid grid{
      {std::min(places, unsigned(multiprocessors()))}, kGramShared, false, kGramThreads};
  return launch("gram_tile", kernel, grid, stream, p, maps, tile, scratch);
}

template <class Scalar>
std::string by_mode(const Problem& p, const GramMaps& maps, const PanelTile& tile,
                    const PanelScratch& scratch, Stream stream) {
  const auto sweep = [&](auto go) { return go(p, maps, tile, scratch, stream); };
  if (p.mode == kPlain)
    return p.infonce ? sweep(launch_cross<Scalar, true>) : sweep(launch_cross<Scalar, false>);
  if (p.infonce) {
    if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, true>);
    if (p.mode == kShared) return sweep(launch_sweep<Scalar, kShared, true>);
    return sweep(launch_sweep<Scalar, kMirror, true>);
  }
  if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, false>);
  return sweep(launch_sweep<Scalar, kMirror, false>);
}

// Left operands in one copy, unless the towers are too far apart in memory.
void map_left(const Problem& p, GramMaps& maps) {
  const auto T = reinterpret_cast<uintptr_t>(p.T), A = reinterpret_cast<uintptr_t>(p.A);
  maps.audio_first = A < T;
  const auto boxes = maps.audio_first ? groups_of(p, p.A, p.T) : groups_of(p, p.T, p.A);
  maps.whole = tensor_map(p, boxes, maps.left).empty();
}

}  // namespace

bool gram_whole(const Problem& p) {
  GramMaps maps;
  map_left(p, maps);
  return maps.whole;
}

std::string gram_tile(const Problem& p, const PanelTile& tile, const PanelScratch& scratch,
                      Stream stream) {
  if (p.dtype == kFloat32) return "gram_tile: 16-bit embeddings only";
  GramMaps maps;
  const int left = p.mode == kPlain ? kCrossRows : kGroupRows;
  const int right = p.mode == kPlain ? kCrossColumns : kGramColumns;
  const std::pair<Boxes, TensorMap*> wanted[] = {{rows_of(p, p.T, left), &maps.text_left},
                                                 {rows_of(p, p.A, left), &maps.audio_left},
                                                 {rows_of(p, p.T, right), &maps.text_right},
                                                 {rows_of(p, p.A, right), &maps.audio_right}};
  for (const auto& [boxes, map] : wanted) {
    const std::string error = tensor_map(p, boxes, *map);
    if (!error.empty()) return error;
  }
  if (p.mode != kPlain) map_left(p, maps);
  if (p.dtype == kBfloat16) return by_mode<Bfloat16>(p, maps, tile, scratch, stream);
  return by_mode<Float16>(p, maps, tile, scratch, stream);
}

}  // namespace supclap::cuda
