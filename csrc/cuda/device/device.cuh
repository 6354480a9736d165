// What every kernel stands on: warp and block primitives, number formats, shared memory.
//
// Device code only touches the hardware through the files of this folder, so that a host which
// stands in for them (tests/shim) can run every kernel as it is. Barriers stand literally in the
// kernels, one a line: the tests take each away in turn and must notice.
#pragma once

#include <cstdint>

#include "cuda/problem.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
// All dynamic shared memory of the block, as bytes.
#define SUPCLAP_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define SUPCLAP_UNROLL _Pragma("unroll")
#define SUPCLAP_ROLLED _Pragma("unroll 1")
#define SUPCLAP_UNROLL_BY(count) SUPCLAP_PRAGMA(unroll(count))
#define SUPCLAP_PRAGMA(text) _Pragma(#text)
#else
#include "async.h"
#define SUPCLAP_SHARED(name) unsigned char* name = shim::shared_memory()
#define SUPCLAP_UNROLL
#define SUPCLAP_ROLLED
#define SUPCLAP_UNROLL_BY(count)
#define __noinline__ __attribute__((__noinline__))
#endif

namespace supclap::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

#ifdef __CUDACC__
// All blocks of a cooperative launch wait for each other; what they wrote is seen by all.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// Counts a block in; true for the last of `blocks`, which sees what all others wrote. The counter
// is 0 again then. Called by one thread, behind a barrier of those that wrote.
__device__ __forceinline__ bool arrive_last(unsigned* counter, unsigned blocks) {
  unsigned old;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(blocks - 1)
               : "memory");
  return old == blocks - 1;
}
#else
using shim::arrive_last;
#define grid_barrier() shim::grid_barrier(SHIM_SITE)
#endif

// ---------------------------------------------------------------- arithmetic

// exp_2(x) is 2^x to 2 units in the last place, and 0 where 2^x is not a normal number. log_2(x) is
// correct to 2^-22 (of itself outside of 1/2 to 2), and -infinity where x is not a normal number.
// quotient(x, y) is x / y to 2 units.
__device__ __forceinline__ float exp_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : exp2f(x);
#endif
}
__device__ __forceinline__ float log_2(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return fabsf(x) < 0x1p-126f ? -INFINITY : log2f(x);
#endif
}
__device__ __forceinline__ float quotient(float x, float y) {
#ifdef __CUDACC__
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// ---------------------------------------------------------------- number formats

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return shim::bit_cast<float>(bits);
#endif
}
__device__ __forceinline__ float widen(Float16 x) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return shim::from_half(x.bits);
#endif
}

// Rounds to nearest, ties to even.
template <class Scalar>
__device__ __forceinline__ Scalar narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bfloat16 narrow<Bfloat16>(float x) {
  Bfloat16 y;
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = shim::to_bfloat16(x);
#endif
  return y;
}
template <>
__device__ __forceinline__ Float16 narrow<Float16>(float x) {
  Float16 y;
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = shim::to_half(x);
#endif
  return y;
}

// As many elements as 16 bytes hold; they are read or written in one access.
template <class Scalar>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(Scalar);
  Scalar at[size];
};

template <class Scalar>
__device__ __forceinline__ Vector<Scalar> load_vector(const Scalar* from) {
  return *reinterpret_cast<const Vector<Scalar>*>(from);
}
template <class Scalar>
__device__ __forceinline__ void store_vector(Scalar* to, const Vector<Scalar>& value) {
  *reinterpret_cast<Vector<Scalar>*>(to) = value;
}

// ---------------------------------------------------------------- copies to shared memory

#ifdef __CUDACC__
// Copies 16 bytes, or zeros unless they are `there`; the thread does not wait.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void copies_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most kPending commits of this thread are under way.
template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#else
using shim::copies_commit;
using shim::copy_async;
template <int kPending>
inline void copies_wait() {
  shim::copies_wait(kPending);
}
#endif

// ---------------------------------------------------------------- sums and maxima

struct Add {
  template <class Real>
  __device__ Real operator()(Real x, Real y) const {
    return x + y;
  }
};
struct Max {
  __device__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// The value of the lane whose index differs from this one's in the bit `apart`.
template <class Real>
__device__ __forceinline__ Real shuffle_xor(Real x, int apart) {
  return __shfl_xor_sync(0xffffffffu, x, apart);
}

// Joins the values of the `kLanes` lanes around this one; every lane gets the result.
template <int kLanes, class Real, class Join>
__device__ __forceinline__ Real reduce_lanes(Real x, Join join) {
  SUPCLAP_UNROLL
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = join(x, shuffle_xor(x, offset));
  return x;
}
template <int kLanes = kWarp>
__device__ __forceinline__ float warp_max(float x) {
  return reduce_lanes<kLanes>(x, Max{});
}
template <int kLanes = kWarp, class Real = float>
__device__ __forceinline__ Real warp_sum(Real x) {
  return reduce_lanes<kLanes>(x, Add{});
}

// Joins the values of a block, warp after warp; every thread gets the result. `scratch` has kWarps
// places. Ends in a barrier.
template <class Real, class Join>
__device__ Real reduce_block(Real x, Real* scratch, Join join) {
  x = reduce_lanes<kWarp>(x, join);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) x = join(x, scratch[warp]);
  __syncthreads();
  return x;
}
template <class Real>
__device__ Real block_sum(Real x, Real* scratch) {
  return reduce_block(x, scratch, Add{});
}
__device__ inline float block_max(float x, float* scratch) {
  return reduce_block(x, scratch, Max{});
}

}  // namespace supclap::cuda
