// Tensor core instructions for 16-bit numbers with float32 sums.
//
// mma.m16n8k16, lane l = 4 g + t of a warp:
//     A (16, 16): a[0] rows g, columns 2t, 2t + 1; a[1] rows g + 8; a[2], a[3] columns + 8
//     B (16, 8):  b[0] rows 2t, 2t + 1, column g; b[1] rows + 8
//     C (16, 8):  c[0], c[1] row g, columns 2t, 2t + 1; c[2], c[3] row g + 8
#pragma once

#include "cuda/device/device.cuh"

namespace supclap::cuda {

#ifdef __CUDACC__

// c += a b, where a and b have one 16-bit type.
#define SUPCLAP_MMA(Scalar, type)                                            \
  __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], \
                                      const uint32_t (&b)[2], Scalar) {      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type               \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
SUPCLAP_MMA(Bfloat16, "bf16")
SUPCLAP_MMA(Float16, "f16")
#undef SUPCLAP_MMA

// Four 8 x 8 matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8,
// and gets of each matrix the elements (g, 2t), (g, 2t + 1); transposed: (2t, g), (2t + 1, g).
template <bool kTransposed>
__device__ __forceinline__ void ldmatrix(uint32_t (&out)[4], const void* row) {
  const auto address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

#else

template <class Scalar>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Scalar) {
  shim::mma_m16n8k16(c, a, b, [](uint16_t bits) { return widen(Scalar{bits}); });
}
template <bool kTransposed>
inline void ldmatrix(uint32_t (&out)[4], const void* row) {
  shim::ldmatrix_x4(out, row, kTransposed);
}

#endif

}  // namespace supclap::cuda
