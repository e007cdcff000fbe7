// Vectors of W floats by the compilers' vector extension (GCC, Clang), as wide as the instruction set that
// this translation unit is compiled for.
//
// Kernel sources are compiled once per instruction set, each time into the namespace IFND_ISA. They use no
// inline function or template from outside that namespace (so nothing of the standard library but C
// functions): the linker merges those, and might keep the copy that the oldest CPU can't run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

#ifndef IFND_ISA
#error "compile kernel sources with -DIFND_ISA=portable|avx2|avx512 and -DIFND_VECTOR_BYTES=16|32|64"
#endif

#define IFND_BEGIN namespace ifnd { namespace IFND_ISA {
#define IFND_END } }
#define IFND_INLINE static inline __attribute__((always_inline))

IFND_BEGIN

typedef float vfloat __attribute__((vector_size(IFND_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(IFND_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(IFND_VECTOR_BYTES)));

constexpr int W = IFND_VECTOR_BYTES / 4;

// The matrix product holds ROWS x VECTORS vectors of sums in registers; a panel is VECTORS vectors wide.
constexpr int ROWS = IFND_VECTOR_BYTES == 64 ? 8 : IFND_VECTOR_BYTES == 32 ? 6 : 4;
constexpr int VECTORS = 2;
constexpr int LANES = W * VECTORS;

constexpr float kLowest = -3.40282347e38f;

IFND_INLINE vfloat load(const float* p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
IFND_INLINE vint load(const int32_t* p) { vint v; memcpy(&v, p, sizeof v); return v; }
IFND_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
IFND_INLINE void store(int32_t* p, vint v) { memcpy(p, &v, sizeof v); }
IFND_INLINE vfloat splat(float x) { return x - vfloat{}; }
IFND_INLINE vint splat(int32_t x) { return x - vint{}; }
IFND_INLINE vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }  // b where either is NaN
IFND_INLINE float max(float a, float b) { return a > b ? a : b; }

template <class T>
IFND_INLINE T min_of(T a, T b) { return a < b ? a : b; }

template <class To, class From>
IFND_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpretation keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

IFND_INLINE bool any(vint mask) {
  int32_t lane[W], all = 0;
  store(lane, mask);
  for (int i = 0; i < W; ++i) all |= lane[i];
  return all != 0;
}

IFND_INLINE float sum(vfloat v) {  // pairwise
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

IFND_END
