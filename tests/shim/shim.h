// Stands in for the CUDA run time: kernels compiled for the host, every thread a fiber.
//
// What the kernels of csrc/cuda may use, and nothing more. A launch runs its blocks one after the
// other; a cooperative launch runs all of them at once, so that protocols between blocks are
// exercised. A fiber runs until it waits for others: at a block, warp or grid barrier, or in an
// exchange between lanes. The order in which fibers run is one of several schedules.
//
// Under ThreadSanitizer every fiber is a thread of its own, and only barriers and the acquire and
// release of atomics order their accesses. The tag through which a barrier passes that order on
// alternates: with one tag, a thread that already waits at the next barrier would publish its
// accesses to a slow one that has not left this one, and hide a race between the two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_THREAD__)
#define SHIM_UNSEEN __attribute__((no_sanitize("thread")))
#else
#define SHIM_UNSEEN
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

// A barrier's place in the source: what a mutant takes away.
struct Site {
  const char* file;
  int line;
};
#define SHIM_SITE (shim::Site{__FILE__, __LINE__})

struct Thread {  // what a kernel sees of itself
  dim3 thread, block, threads, blocks;
  unsigned char* shared;
};
const Thread& self();
inline unsigned char* shared_memory() { return self().shared; }

void block_barrier(Site site);
void warp_barrier(Site site, unsigned mask);
void grid_barrier(Site site);
// Leaves `size` bytes for the other lanes of `mask`, meets them, and returns where each left its
// own; they stay there until the lane's next exchange but one.
void exchange(unsigned mask, const void* value, size_t size, const void* (&others)[32]);
bool arrive_last(unsigned* counter, unsigned blocks);

// Runs one launch; throws std::runtime_error where no thread can go on, or a mutant raced.
void launch(dim3 blocks, unsigned threads, size_t shared, bool cooperative,
            const std::function<void()>& body);

// For the tests.
int schedules();
void set_schedule(int schedule);
// "csrc/cuda/panel/panel.cuh:57", or "" for none; a launch ends when the sanitizer's `log` is no
// longer empty.
void remove_barrier(const char* file_and_line, const char* log);
int multiprocessors();
void set_multiprocessors(int count);
// From the one call to the other launches are noted down, as a CUDA graph does; `replay` runs them
// again with the arguments that they had.
void record(bool on);
void replay();

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t x) { return float(bit_cast<_Float16>(x)); }
inline uint16_t to_half(float x) { return bit_cast<uint16_t>(_Float16(x)); }

template <class Value>
SHIM_UNSEEN Value shuffle(unsigned mask, Value value, unsigned source) {
  const void* others[32];
  exchange(mask, &value, sizeof value, others);
  memcpy(&value, others[source % 32], sizeof value);
  return value;
}

// mma.m16n8k16: c += a b, fragments as PTX lays them out; `widen` turns 16 bits into a float.
template <class Widen>
SHIM_UNSEEN void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Widen widen) {
  struct Fragments {
    uint32_t a[4], b[2];
  } own, *lanes[32];
  memcpy(own.a, a, sizeof a);
  memcpy(own.b, b, sizeof b);
  exchange(~0u, &own, sizeof own, reinterpret_cast<const void*(&)[32]>(lanes));
  const int lane = self().thread.x % 32;
  const auto half = [&](uint32_t pair, int high) { return widen(uint16_t(pair >> 16 * high)); };
  for (int n = 0; n < 4; ++n) {
    const int row = lane / 4, upper = n / 2, column = 2 * (lane % 4) + n % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2, outer = k / 8;
      const float x = half(lanes[row * 4 + quarter]->a[upper + 2 * outer], k % 2);
      const float y = half(lanes[column * 4 + quarter]->b[outer], k % 2);
      sum += x * y;
    }
    c[n] += sum;
  }
}

// ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8.
SHIM_UNSEEN inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, bool transposed) {
  const void* const* lanes[32];
  exchange(~0u, &row, sizeof row, reinterpret_cast<const void*(&)[32]>(lanes));
  const int lane = self().thread.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t pair = 0;
    for (int n = 0; n < 2; ++n) {
      const int major = transposed ? 2 * (lane % 4) + n : lane / 4;
      const int minor = transposed ? lane / 4 : 2 * (lane % 4) + n;
      const auto* from = static_cast<const uint16_t*>(*lanes[matrix * 8 + major]);
      pair |= uint32_t(from[minor]) << 16 * n;
    }
    out[matrix] = pair;
  }
}

}  // namespace shim

#define threadIdx (shim::self().thread)
#define blockIdx (shim::self().block)
#define blockDim (shim::self().threads)
#define gridDim (shim::self().blocks)
#define __syncthreads() shim::block_barrier(SHIM_SITE)
#define __syncwarp() shim::warp_barrier(SHIM_SITE, ~0u)

template <class Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return shim::shuffle(mask, value, threadIdx.x % 32 ^ unsigned(lanes));
}
template <class Value>
inline Value __shfl_sync(unsigned mask, Value value, int lane) {
  return shim::shuffle(mask, value, unsigned(lane));
}
SHIM_UNSEEN inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const void* others[32];
  shim::exchange(mask, &vote, sizeof vote, others);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) votes |= unsigned(*static_cast<const bool*>(others[lane])) << lane;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
