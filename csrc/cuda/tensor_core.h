// One warp's products on tensor cores, alike for all cards: sums (32, 8) += A (32, 16) B (16, 8).
//
// A block of sums is 8 floats a lane: ROWS rows of it (`row(lane, r)`), VALUES columns of each (`column(lane, v)`), the
// number (r, v) in `sums[at(r, v)]`. The lanes that hold the other columns of a row are `lane ^ m`, m = FIRST_PARTNER to 2.
// Rows in memory are `stride` numbers apart, aligned to 16 bytes.
#pragma once

#include "ptx.h"

namespace ifnd::cuda {

constexpr int WARP_ROWS = 32;

// Four products (8, 4) by (4, 8) at a time, each of other rows and of the same columns.
struct Volta {
  static constexpr int ROWS = 2, VALUES = 4, B_WORDS = 8;
  static constexpr int FIRST_PARTNER = 2;

  __device__ __forceinline__ static constexpr int at(int r, int v) { return (v & 1) | r << 1 | (v >> 1) << 2; }
  __device__ __forceinline__ static int row(int lane, int r) { return (lane & ~2) + 2 * r; }
  __device__ __forceinline__ static int column(int lane, int v) { return (lane & 2) + (v & 1) + 4 * (v >> 1); }

  // 16 columns of rows 0 to 31, row i at `row(i)`; there may be only 8 or none.
  template <class Row>
  __device__ __forceinline__ static void load_a(u32 (&a)[8], Row row, int columns, int lane) {
    const uint4* p = (const uint4*)row(lane);
    const uint4 zero = {0, 0, 0, 0}, x = columns > 0 ? p[0] : zero, y = columns > 8 ? p[1] : zero;
    a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w, a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
  }
  // B's columns are rows of memory.
  __device__ __forceinline__ static void load_b(u32 (&b)[8], const u16* columns, int stride, int lane) {
    load_a(b, [=](int column) { return columns + column * stride; }, 16, (lane & 3) + (lane >> 4) * 4);
  }
  template <class T>
  __device__ __forceinline__ static void mma(T, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[8]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) mma_m8n8k4(sums, a + 2 * k, b + 2 * k);
  }
  // The same with B's rows as rows of memory.
  __device__ __forceinline__ static void load_b_rows(u32 (&b)[8], const u16* rows, int stride, int lane) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint2 x = *(const uint2*)(rows + (4 * k + (lane & 3)) * stride + (lane >> 4) * 4);
      b[2 * k] = x.x, b[2 * k + 1] = x.y;
    }
  }
  template <class T>
  __device__ __forceinline__ static void mma_rows(T, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[8]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) mma_m8n8k4_rows(sums, a + 2 * k, b + 2 * k);
  }
  // Two blocks of sums, rounded, as an A. In A a lane holds four neighbouring columns of row `lane`, of which it has two
  // in its sums and lane ^ 2 the others.
  template <class T>
  __device__ __forceinline__ static void as_a(T type, u32 (&a)[8], const float (&left)[8], const float (&right)[8],
                                              int lane) {
    const bool upper = lane & 2;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float(&s)[8] = pair < 2 ? left : right;
      const int v = pair & 1 ? 4 : 0;
      const u32 first = pack(type, s[v], s[v + 1]), second = pack(type, s[v + 2], s[v + 3]);
      const u32 own = upper ? second : first;
      const u32 other = __shfl_xor_sync(0xffffffffu, upper ? first : second, 2);
      a[2 * pair] = upper ? other : own;
      a[2 * pair + 1] = upper ? own : other;
    }
  }
};

// Two blocks of 16 rows; a lane holds two neighbouring columns of rows lane / 4 and lane / 4 + 8 of each.
struct Turing {
  static constexpr int ROWS = 4, VALUES = 2, B_WORDS = 2;
  static constexpr int FIRST_PARTNER = 1;

  __device__ __forceinline__ static constexpr int at(int r, int v) { return 2 * r + v; }
  __device__ __forceinline__ static int row(int lane, int r) { return 8 * r + lane / 4; }
  __device__ __forceinline__ static int column(int lane, int v) { return 2 * (lane & 3) + v; }

  template <class Row>
  __device__ __forceinline__ static void load_a(u32 (&a)[8], Row row, int columns, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const u16* p = row(8 * r + lane / 4) + 2 * (lane & 3);
#pragma unroll
      for (int k = 0; k < 2; ++k) a[4 * (r / 2) + 2 * k + (r & 1)] = columns > 8 * k ? *(const u32*)(p + 8 * k) : 0;
    }
  }
  __device__ __forceinline__ static void load_b(u32 (&b)[2], const u16* columns, int stride, int lane) {
    const u16* p = columns + (lane / 4) * stride + 2 * (lane & 3);
    b[0] = *(const u32*)p;
    b[1] = *(const u32*)(p + 8);
  }
  template <class T>
  __device__ __forceinline__ static void mma(T, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[2]) {
#pragma unroll
    for (int block = 0; block < 2; ++block)
#pragma unroll
      for (int k = 0; k < 2; ++k) mma_m16n8k8(sums + 4 * block, a + 4 * block + 2 * k, b[k]);
  }
  __device__ __forceinline__ static void load_b_rows(u32 (&b)[2], const u16* rows, int stride, int lane) {
    ldmatrix_x2_trans(b, rows + (lane & 15) * stride);
  }
  template <class T>
  __device__ __forceinline__ static void mma_rows(T type, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[2]) {
    mma(type, sums, a, b);
  }
  template <class T>
  __device__ __forceinline__ static void as_a(T type, u32 (&a)[8], const float (&left)[8], const float (&right)[8], int) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float(&s)[8] = i / 2 & 1 ? right : left;
      const int v = 4 * (i / 4) + 2 * (i & 1);
      a[i] = pack(type, s[v], s[v + 1]);
    }
  }
};

struct Ampere : Turing {
  template <class T>
  __device__ __forceinline__ static void mma(T type, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[2]) {
    mma_m16n8k16(type, sums, a, b);
    mma_m16n8k16(type, sums + 4, a + 4, b);
  }
  template <class T>
  __device__ __forceinline__ static void mma_rows(T type, float (&sums)[8], const u32 (&a)[8], const u32 (&b)[2]) {
    mma(type, sums, a, b);
  }
};

#if !defined(__CUDA_ARCH__)
#ifdef IFND_ON_HOST
using Core = IFND_ON_HOST;  // each of them in its turn
#else
using Core = Ampere;  // the pass for the host compiles no kernel
#endif
#elif __CUDA_ARCH__ < 750
using Core = Volta;
#elif __CUDA_ARCH__ < 800
using Core = Turing;
#else
using Core = Ampere;
#endif

// Numbers of a float32: two terms of float16, high + low, whose products are high.high + high.low + low.high.
struct TwoTerms : Half {};
template <class T>
struct Terms {
  static constexpr int STORED = 1, PRODUCTS = 1;
};
template <>
struct Terms<TwoTerms> {
  static constexpr int STORED = 2, PRODUCTS = 3;
};

// sums += A B. Tensor cores cut off what they add up, towards 0, for which the error of float32 has no room: of two terms
// each product starts at zero, and is added outside, rounded to nearest (Ootomo and Yokota 2022).
template <class T, class Multiply>
__device__ __forceinline__ void add_product(float (&sums)[8], Multiply multiply) {
  if constexpr (Terms<T>::STORED == 1) {
    multiply(sums);
  } else {
    float product[8] = {};
    multiply(product);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += product[i];
  }
}

template <class T>
struct Supports {
  static constexpr bool value = true;
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <>
struct Supports<Bfloat16> {
  static constexpr bool value = false;
};
#endif

}  // namespace ifnd::cuda
