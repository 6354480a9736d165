// Hopper's asynchronous units: barriers in shared memory, copies by tensor maps, and wgmma.
//
// wgmma.m64n256k16: a warpgroup of four warps multiplies operands in shared memory. Warp w, lane
// l = 4 g + t has of the result (64, 256)
//     c[4 q + 2 u + n]   row 16 w + 8 u + g, column 8 q + 2 t + n      (q < 32; u, n < 2)
// Operands are [rows, 64] of 16-bit numbers as a copy with the 128-byte swizzle leaves them: 8 rows
// of 128 bytes after the other, the 16-byte pieces of row r at places piece ^ r % 8.
#pragma once

#include "cuda/device/device.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace supclap::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kAccumulators = 128;
constexpr int kGroupRows = 8, kGroupBytes = kGroupRows * 128;  // rows of an operand

#ifdef __CUDACC__

using TensorMap = CUtensorMap;
struct Mbarrier {
  uint64_t state;
};

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

// A phase of the barrier is over after `count` arrivals and all bytes that were announced.
__device__ __forceinline__ void mbarrier_init(Mbarrier& at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&at)), "r"(count)
               : "memory");
}
// Follows the last mbarrier_init: the asynchronous units see the barriers from here on.
__device__ __forceinline__ void mbarriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier& at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&at)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_expect(Mbarrier& at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&at)),
               "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity is over. The first phase has parity 0, and the one before it
// counts as over.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& at, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n"
      "}\n" ::"r"(shared_address(&at)),
      "r"(parity)
      : "memory");
}

// Copies the box of `map` at (row, column) to shared memory, with zeros for what is outside of the
// tensor.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int row, int column,
                                         Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(shared_address(&full))
      : "memory");
}
// Copies the box of a map of [groups of rows, tensors, rows, columns] that begins at `group`, from
// all tensors.
__device__ __forceinline__ void copy_groups(void* to, const TensorMap& map, int group, int column,
                                            Mbarrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(0), "r"(group),
      "r"(shared_address(&full))
      : "memory");
}

// Tells the compiler that all threads of a warp have the same number.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Returns x, but the compiler does not know that: what it made of x before is of no use, and takes
// no registers.
__device__ __forceinline__ uint32_t again(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A warpgroup gives up or takes registers of the multiprocessor: from here on a thread has kCount.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// All threads of a warpgroup wait for each other.
__device__ __forceinline__ void warpgroup_barrier() {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / kWarpgroup) : "memory");
}

// Precedes a wgmma that reads registers which other instructions wrote.
__device__ __forceinline__ void wgmma_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending commits are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from reading results before the wait for them.
__device__ __forceinline__ void wgmma_end(float (&c)[kAccumulators]) {
  SUPCLAP_UNROLL
  for (int n = 0; n < kAccumulators; ++n) asm volatile("" : "+f"(c[n])::"memory");
}

#define SUPCLAP_FOUR(n) "+f"(c[n]), "+f"(c[n + 1]), "+f"(c[n + 2]), "+f"(c[n + 3])
#define SUPCLAP_SIXTEEN(n) \
  SUPCLAP_FOUR(n), SUPCLAP_FOUR(n + 4), SUPCLAP_FOUR(n + 8), SUPCLAP_FOUR(n + 12)
#define SUPCLAP_WGMMA(Scalar, type)                                                           \
  __device__ __forceinline__ void wgmma(float (&c)[kAccumulators], uint64_t a, uint64_t b,    \
                                        bool adds, Scalar) {                                  \
    asm volatile(                                                                             \
        "{\n"                                                                                 \
        ".reg .pred adds;\n"                                                                  \
        "setp.ne.b32 adds, %130, 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                          \
        " {"                                                                                  \
        "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                              \
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                    \
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                    \
        "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                    \
        "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                    \
        "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"                    \
        "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"        \
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"     \
        "}, %128, %129, adds, 1, 1, 0, 0;\n"                                                  \
        "}\n"                                                                                 \
        : SUPCLAP_SIXTEEN(0), SUPCLAP_SIXTEEN(16), SUPCLAP_SIXTEEN(32), SUPCLAP_SIXTEEN(48),  \
          SUPCLAP_SIXTEEN(64), SUPCLAP_SIXTEEN(80), SUPCLAP_SIXTEEN(96), SUPCLAP_SIXTEEN(112) \
        : "l"(a), "l"(b), "r"(int(adds)));                                                    \
  }
// c = a b^T, or with `adds` c += a b^T; a and b come from operand_at.
SUPCLAP_WGMMA(Bfloat16, "bf16")
SUPCLAP_WGMMA(Float16, "f16")
#undef SUPCLAP_WGMMA
#undef SUPCLAP_SIXTEEN
#undef SUPCLAP_FOUR

#else

using shim::copy_box;
using shim::copy_groups;
using shim::Mbarrier;
using shim::mbarrier_arrive;
using shim::mbarrier_expect;
using shim::mbarrier_init;
using shim::shared_address;
using shim::TensorMap;
using shim::wgmma_commit;
#define warpgroup_barrier() shim::warpgroup_barrier(SHIM_SITE)
#define mbarrier_wait(at, parity) shim::mbarrier_wait(SHIM_SITE, at, parity)

inline void mbarriers_ready() {}
inline uint32_t again(uint32_t x) { return x; }
inline int uniform(int x) { return x; }
template <int>
inline void fewer_registers() {}
template <int>
inline void more_registers() {}
inline void wgmma_begin() {}
template <int kPending>
inline void wgmma_wait() {
  shim::wgmma_wait(kPending);
}
inline void wgmma_end(float (&)[kAccumulators]) {}
template <class Scalar>
inline void wgmma(float (&c)[kAccumulators], uint64_t a, uint64_t b, bool adds, Scalar) {
  shim::wgmma_m64n256k16({c, a, b, adds, [](uint16_t bits) { return widen(Scalar{bits}); }});
}

#endif

// The descriptor of a swizzled operand whose groups of 8 rows follow each other. Adding
// kNextColumns moves it on by 16 columns.
__device__ __forceinline__ uint64_t operand_at(const void* start) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(kGroupBytes) >> 4 << 32 | uint64_t(1) << 16 |
         (shared_address(start) & 0x3ffff) >> 4;
}
constexpr uint64_t kNextColumns = 32 >> 4;

}  // namespace supclap::cuda
