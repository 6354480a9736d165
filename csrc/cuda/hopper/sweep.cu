// Launcher of sweep.cuh and plain_loss.cuh, for sm_90a.
#include <utility>

#include "cuda/hopper/plain_loss.cuh"
#include "cuda/hopper/sweep.cuh"
#include "cuda/launch.h"
#include "cuda/launchers.h"

namespace supclap::cuda {

namespace {

static_assert(kHopperShared == sizeof(HopperShared<HopperColumns>) + alignof(HopperPipe));
static_assert(kHopperShared >= sizeof(HopperShared<PlainColumns>) + alignof(HopperPipe));

// A tensor of 16-bit elements and the box that one copy with the 128-byte swizzle takes of it. The
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
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const auto error =
      cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &status);
#else
  const auto error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &status);
#endif
  return error == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

std::string tensor_map(const CudaProblem& p, const Boxes& of, TensorMap& map) {
  static const Encode encode = encoder();
  if (!encode) return "hopper_tile: the driver has no cuTensorMapEncodeTiled";
  const auto type =
      p.dtype == kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t size[4], stride[4];  // the driver takes no first stride
  cuuint32_t box[4], step[4];
  for (int n = 0; n < 4; ++n) {
    size[n] = of.size[n];
    stride[n] = of.stride[n] * 2;
    box[n] = of.box[n];
    step[n] = 1;
  }
  const CUresult result =
      encode(&map, type, of.rank, const_cast<void*>(of.start), size, stride + 1, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return "";
  return "hopper_tile: cuTensorMapEncodeTiled: error " + std::to_string(int(result));
}
#else
std::string tensor_map(const CudaProblem&, const Boxes& of, TensorMap& map) {
  map.start = of.start;
  for (int n = 0; n < 4; ++n) {
    map.size[n] = of.size[n];
    map.stride[n] = of.stride[n];
    map.box[n] = of.box[n];
  }
  return "";
}
#endif

// Boxes of `rows` x 64 of an operand [N, width].
Boxes rows_of(const CudaProblem& p, const void* X, int rows) {
  return {X, {p.width, p.N, 1, 1}, {1, p.width, 0, 0}, {kStageDepth, rows, 1, 1}, 2};
}
// Left operands of sweep.cuh: groups of rows of two towers in turn.
Boxes groups_of(const CudaProblem& p, const void* first, const void* second) {
  const int64_t between = static_cast<const char*>(second) - static_cast<const char*>(first);
  return {first,
          {p.width, kGroupRows, 2, p.N / kGroupRows},
          {1, p.width, between / 2, kGroupRows * p.width},
          {kStageDepth, kGroupRows, 2, kPanelRows / kGroupRows},
          4};
}

template <class Scalar, int kMode, bool kInfonce>
std::string launch_sweep(const CudaProblem& p, const HopperMaps& maps, const PanelTile& pair,
                         const PanelScratch& scratch, Stream stream) {
  const auto kernel = scratch.weights ? hopper_kernel<Scalar, kMode, kInfonce, true>
                                      : hopper_kernel<Scalar, kMode, kInfonce, false>;
  const unsigned tiles = blocks_for(pair.ni, kPanelRows) * blocks_for(pair.nj, kPanelColumns);
  const Grid grid{
      {std::min(tiles, unsigned(multiprocessors()))}, kHopperShared, false, kHopperThreads};
  return launch("hopper_tile", kernel, grid, stream, p, maps, pair, scratch);
}

template <class Scalar, bool kInfonce>
std::string launch_plain(const CudaProblem& p, const HopperMaps& maps, const PanelTile& pair,
                         const PanelScratch& scratch, Stream stream) {
  const auto kernel = scratch.weights ? hopper_plain_kernel<Scalar, kInfonce, true>
                                      : hopper_plain_kernel<Scalar, kInfonce, false>;
  const unsigned places = blocks_for(pair.ni, kPlainRows) * blocks_for(pair.nj, kPlainColumns);
  const Grid grid{
      {std::min(places, unsigned(multiprocessors()))}, kHopperShared, false, kHopperThreads};
  return launch("hopper_tile", kernel, grid, stream, p, maps, pair, scratch);
}

template <class Scalar>
std::string by_mode(const CudaProblem& p, const HopperMaps& maps, const PanelTile& pair,
                    const PanelScratch& scratch, Stream stream) {
  const auto sweep = [&](auto go) { return go(p, maps, pair, scratch, stream); };
  if (p.mode == kPlain)
    return p.infonce ? sweep(launch_plain<Scalar, true>) : sweep(launch_plain<Scalar, false>);
  if (p.infonce) {
    if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, true>);
    if (p.mode == kShared) return sweep(launch_sweep<Scalar, kShared, true>);
    return sweep(launch_sweep<Scalar, kMirror, true>);
  }
  if (p.mode == kOneSided) return sweep(launch_sweep<Scalar, kOneSided, false>);
  return sweep(launch_sweep<Scalar, kMirror, false>);
}

// Maps whole left operands, unless the towers are too far apart in memory.
void map_left(const CudaProblem& p, HopperMaps& maps) {
  const auto T = reinterpret_cast<uintptr_t>(p.T), A = reinterpret_cast<uintptr_t>(p.A);
  maps.audio_first = A < T;
  const auto boxes = maps.audio_first ? groups_of(p, p.A, p.T) : groups_of(p, p.T, p.A);
  maps.whole = tensor_map(p, boxes, maps.left).empty();
}

}  // namespace

bool hopper_copies_whole(const CudaProblem& p) {
  HopperMaps maps;
  map_left(p, maps);
  return maps.whole;
}

std::string hopper_tile(const CudaProblem& p, const PanelTile& pair, const PanelScratch& scratch,
                        Stream stream) {
  if (p.dtype == kFloat32) return "hopper_tile: 16-bit embeddings only";
  HopperMaps maps;
  const int left = p.mode == kPlain ? kPlainRows : kGroupRows;
  const int right = p.mode == kPlain ? kPlainColumns : kPanelColumns;
  const std::pair<Boxes, TensorMap*> wanted[] = {{rows_of(p, p.T, left), &maps.text_left},
                                                 {rows_of(p, p.A, left), &maps.audio_left},
                                                 {rows_of(p, p.T, right), &maps.text_right},
                                                 {rows_of(p, p.A, right), &maps.audio_right}};
  for (const auto& [boxes, map] : wanted) {
    const std::string error = tensor_map(p, boxes, *map);
    if (!error.empty()) return error;
  }
  if (p.mode != kPlain) map_left(p, maps);
  if (p.dtype == kBfloat16) return by_mode<Bfloat16>(p, maps, pair, scratch, stream);
  return by_mode<Float16>(p, maps, pair, scratch, stream);
}

}  // namespace supclap::cuda
