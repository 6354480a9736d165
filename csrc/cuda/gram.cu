// Launcher of gram.cuh, for sm_90a.
#include "cuda/cross.cuh"
#include "cuda/launch.h"
#include "cuda/launchers.h"

namespace supclap::cuda {

namespace {

static_assert(kGramShared == sizeof(GramShared<GramColumns>) + alignof(GramPipe));
static_assert(kGramShared >= sizeof(GramShared<CrossColumns>) + alignof(GramPipe));

// Boxes of `rows` x 64 of an operand [N, width], with the 128-byte swizzle.
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

std::string tensor_map(const Problem& p, const void* X, int rows, TensorMap& map) {
  static const Encode encode = encoder();
  if (!encode) return "gram_tile: the driver has no cuTensorMapEncodeTiled";
  const auto type =
      p.dtype == kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t size[] = {cuuint64_t(p.width), cuuint64_t(p.N)};
  const cuuint64_t stride[] = {cuuint64_t(p.width) * 2};
  const cuuint32_t box[] = {kGramDepth, cuuint32_t(rows)}, step[] = {1, 1};
  const CUresult result =
      encode(&map, type, 2, const_cast<void*>(X), size, stride, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "gram_tile: cuTensorMapEncodeTiled: error " + std::to_string(int(result));
}
#else
std::string tensor_map(const Problem& p, const void* X, int rows, TensorMap& map) {
  map = {X, p.N, p.width, rows, kGramDepth};
  return "";
}
#endif

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
  if (p.mode == kNone)
    return p.infonce ? sweep(launch_cross<Scalar, true>) : sweep(launch_cross<Scalar, false>);
  if (p.infonce) {
    if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, true>);
    if (p.mode == kShared) return sweep(launch_sweep<Scalar, kShared, true>);
    return sweep(launch_sweep<Scalar, kMirror, true>);
  }
  if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, false>);
  return sweep(launch_sweep<Scalar, kMirror, false>);
}

}  // namespace

std::string gram_tile(const Problem& p, const PanelTile& tile, const PanelScratch& scratch,
                      Stream stream) {
  if (p.dtype == kFloat32) return "gram_tile: 16-bit embeddings only";
  GramMaps maps;
  const int left = p.mode == kNone ? kCrossRows : kGroupRows;
  const int right = p.mode == kNone ? kCrossColumns : kGramColumns;
  struct {
    const void* X;
    int rows;
    TensorMap& map;
  } wanted[] = {{p.T, left, maps.text_left},
                {p.A, left, maps.audio_left},
                {p.T, right, maps.text_right},
                {p.A, right, maps.audio_right}};
  for (const auto& one : wanted) {
    const std::string error = tensor_map(p, one.X, one.rows, one.map);
    if (!error.empty()) return error;
  }
  if (p.dtype == kBfloat16) return by_mode<Bfloat16>(p, maps, tile, scratch, stream);
  return by_mode<Float16>(p, maps, tile, scratch, stream);
}

}  // namespace supclap::cuda
