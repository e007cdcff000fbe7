// The instructions that CUDA C++ has no name for, and the types of 16-bit numbers.
// Compiled for a CPU (tests/gpu/host), the emulation's own versions stand in for these.
#pragma once

#ifdef IFND_ON_HOST
#include "emulation.h"
#else

namespace ifnd::cuda {

typedef unsigned short u16;
typedef unsigned int u32;

struct Half {};      // tags: numbers themselves are u16
struct Bfloat16 {};

// D += A B of four pairs of matrices, (8, 4) by (4, 8): one for each eight lanes 4i..4i+3, 16+4i..16+4i+3. Volta's own.
// B is stored by columns (k is contiguous), or in the second by rows (n is contiguous).
__device__ __forceinline__ void mma_m8n8k4(float (&d)[8], const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
      "{%0,%1,%2,%3,%4,%5,%6,%7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m8n8k4_rows(float (&d)[8], const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
      "{%0,%1,%2,%3,%4,%5,%6,%7};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]));
}

// D (16, 8) += A (16, 8) B (8, 8): Turing.
__device__ __forceinline__ void mma_m16n8k8(float* d, const u32* a, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// D (16, 8) += A (16, 16) B (16, 8): Ampere and newer.
__device__ __forceinline__ void mma_m16n8k16(Half, float* d, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16(Bfloat16, float* d, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two (8, 8) matrices of 16-bit numbers from shared memory, transposed: lanes 0 to 15 name their rows. Turing and newer.
__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&d)[2], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(d[0]), "=r"(d[1])
               : "r"((u32)__cvta_generic_to_shared(row))
               : "memory");
}

// Two numbers rounded to 16 bits, the first in the low half.
__device__ __forceinline__ u32 pack(Half, float low, float high) {
  u32 d;
  asm("{.reg .b16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b};}"
      : "=r"(d)
      : "f"(low), "f"(high));
  return d;
}
__device__ __forceinline__ u32 pack(Bfloat16, float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ float unpack(Half, u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ float unpack(Bfloat16, u16 x) { return __uint_as_float((u32)x << 16); }

// The same number, as one that the compiler doesn't know: what is computed of it in a loop stays there, where before it
// would occupy registers all the while.
__device__ __forceinline__ int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// 2^x within 2 units of rounding; 0 at -infinity.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ifnd::cuda
#endif
