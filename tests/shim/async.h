// Stands in for what a GPU does asynchronously, as csrc/cuda/device uses it.
//
// What is done so happens as late as it may: a wgmma reads its operands when its results are waited
// for, 16 bytes arrive when their thread waits, a box when nothing else can go on; with one
// schedule bytes and boxes arrive at once. So a kernel that does not wait, or reuses memory too
// early, computes something else.
#pragma once

#include "shim.h"

namespace shim {

void copy_async(void* to, const void* from, bool there);
void copies_commit();
void copies_wait(int pending);

struct alignas(8) Mbarrier {
  uint16_t count;
  uint8_t pending, phase;
  int32_t bytes;  // announced, not yet there
};
void mbarrier_init(Mbarrier& at, int count);
void mbarrier_arrive(Mbarrier& at);
void mbarrier_expect(Mbarrier& at, int bytes);
void mbarrier_wait(Site site, Mbarrier& at, int parity);

struct TensorMap {  // of 16-bit elements; the first dimension is that of neighbours
  const void* start;
  int64_t size[4], stride[4];  // in elements
  int box[4];
};
void copy_box(void* to, const TensorMap& map, int row, int column, Mbarrier& full);
void copy_groups(void* to, const TensorMap& map, int group, int column, Mbarrier& full);

// Addresses in shared memory count from the block's first byte.
inline uint32_t shared_address(const void* at) {
  return uint32_t(static_cast<const unsigned char*>(at) - shared_memory());
}

struct Wgmma {
  float* c;       // 128 of this thread
  uint64_t a, b;  // descriptors
  bool adds;
  float (*widen)(uint16_t);
};
void wgmma_m64n256k16(const Wgmma& one);
void wgmma_commit();
void wgmma_wait(int pending);
void warpgroup_barrier(Site site);

}  // namespace shim
