// Vectors of W floats by the compilers' vector extension (GCC, Clang), as wide as the instruction set that
// this translation unit is compiled for; intrinsics only for what the extension can't say.
//
// Kernel sources are compiled once per instruction set, each time into the namespace IFND_ISA. They use no
// inline function or template from outside that namespace (so nothing of the standard library but C
// functions): the linker merges those, and might keep the copy that the oldest CPU can't run.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../kernels.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#ifndef IFND_ISA
#error "compile kernel sources with -DIFND_ISA=portable|avx2|avx512|avx512vnni|avx512bf16|amx and -DIFND_VECTOR_BYTES=16|32|64"
#endif

// IFND_PAIRS: bfloat16 is multiplied as pairs, by dot products; IFND_TILES: these are products of tiles (tile_unit.h).
#if defined(__AMX_BF16__) || defined(IFND_EMULATED_TILES)
#define IFND_TILES
#endif
#if defined(__AVX512BF16__) || defined(IFND_TILES)
#define IFND_PAIRS
#endif

// glibc 2.29 has a second exp and log, which set no errno. With the first ones, of the same values, what is compiled
// on a new system runs on older ones, as wheels must.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
#endif

#define IFND_BEGIN namespace ifnd { namespace IFND_ISA {
#define IFND_END } }
#define IFND_INLINE static inline __attribute__((always_inline))

IFND_BEGIN

typedef float vfloat __attribute__((vector_size(IFND_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(IFND_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(IFND_VECTOR_BYTES)));

constexpr int W = IFND_VECTOR_BYTES / 4;
constexpr int NARROW = W >= 8 ? W / 2 : W;  // lanes that a matrix product is rounded up to

template <class Lane, int N>
struct Lanes {
  typedef Lane Vector __attribute__((vector_size(sizeof(Lane) * N)));
};

// What a matrix product multiplies: floats, or pairs of bfloat16 (the first in the low half) by dot instructions.
typedef uint32_t Pair;
template <class Word> constexpr int kTerms = 1;
template <> constexpr int kTerms<Pair> = 2;
#ifdef __AVX512VNNI__
constexpr bool kInteger8Dots = true;
#else
constexpr bool kInteger8Dots = false;
#endif

// The matrix product holds ROWS x VECTORS vectors of sums in registers; a panel is VECTORS vectors wide.
constexpr int ROWS = IFND_VECTOR_BYTES == 64 ? 8 : IFND_VECTOR_BYTES == 32 ? 6 : 4;
constexpr int VECTORS = 2;
constexpr int LANES = W * VECTORS;

constexpr float kLowest = -3.40282347e38f;

IFND_INLINE vfloat load(const float* p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
IFND_INLINE vint load(const int32_t* p) { vint v; memcpy(&v, p, sizeof v); return v; }
IFND_INLINE vuint load(const uint32_t* p) { vuint v; memcpy(&v, p, sizeof v); return v; }
IFND_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
IFND_INLINE void store(int32_t* p, vint v) { memcpy(p, &v, sizeof v); }
IFND_INLINE void store(uint32_t* p, vuint v) { memcpy(p, &v, sizeof v); }
IFND_INLINE vfloat splat(float x) { return x - vfloat{}; }
IFND_INLINE vint splat(int32_t x) { return x - vint{}; }
IFND_INLINE vuint splat(uint32_t x) { return x - vuint{}; }
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

// Bit i: lane i of a comparison's result is true.
IFND_INLINE uint32_t true_lanes(vint mask) {
#if defined(__AVX512F__) && IFND_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(__m512i(mask));
#elif defined(__AVX2__) && IFND_VECTOR_BYTES == 32
  return uint32_t(_mm256_movemask_ps(__m256(mask)));
#elif defined(__SSE2__) && IFND_VECTOR_BYTES == 16
  return uint32_t(_mm_movemask_ps(__m128(mask)));
#else
  int32_t lane[W];
  store(lane, mask);
  uint32_t lanes = 0;
  for (int i = 0; i < W; ++i) lanes |= uint32_t(lane[i] & 1) << i;
  return lanes;
#endif
}

// sum + x * y, and for pairs sum + x_low * y_low + x_high * y_high (denormal numbers count as 0).
template <class Vector>
IFND_INLINE Vector add_product(Vector sum, Vector x, Vector y) { return sum + x * y; }
#ifdef __AVX512BF16__
IFND_INLINE vfloat add_product(vfloat sum, vuint x, vuint y) {
  return vfloat(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(y)));
}
IFND_INLINE Lanes<float, NARROW>::Vector add_product(Lanes<float, NARROW>::Vector sum, Lanes<Pair, NARROW>::Vector x,
                                                     Lanes<Pair, NARROW>::Vector y) {
  return Lanes<float, NARROW>::Vector(_mm256_dpbf16_ps(__m256(sum), __m256bh(x), __m256bh(y)));
}

// bfloat16 of 2 W floats in order, rounded to nearest even; denormal numbers give 0.
IFND_INLINE vuint to_bfloat16(vfloat first, vfloat second) {
  return vuint(_mm512_cvtne2ps_pbh(__m512(second), __m512(first)));
}

// Lane i: the pair (first_i, second_i), rounded so.
IFND_INLINE vuint to_pairs(vfloat first, vfloat second) {
  alignas(64) static const uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return vuint(_mm512_permutexvar_epi16(_mm512_load_si512(zip), __m512i(to_bfloat16(first, second))));
}
#endif

IFND_INLINE float sum(vfloat v) {  // pairwise
  float lane[W];
  store(lane, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// A number that is a multiple of Step because it was rounded where it was made. What relies on whole vectors, blocks or
// panels asks for one; a plain number does not become one, and a multiple of something else only where that divides.
template <int Step>
class Multiple {
 public:
  template <int Other>
  constexpr Multiple(Multiple<Other> n) : n_(n) {
    static_assert(Other % Step == 0, "a multiple of the one is not a multiple of the other");
  }
  constexpr operator int64_t() const { return n_; }

  template <int Any>
  friend constexpr Multiple<Any> round_down(int64_t n);

 private:
  explicit constexpr Multiple(int64_t n) : n_(n) {}
  int64_t n_;
};

template <int Step>
constexpr Multiple<Step> round_down(int64_t n) { return Multiple<Step>(n / Step * Step); }
template <int Step>
constexpr Multiple<Step> round_up(int64_t n) { return round_down<Step>(n + Step - 1); }

static_assert(LANES <= 32, "a panel's lanes are the bits of an uint32_t");
static_assert(kMaxDim % LANES == 0, "arrays of kMaxDim hold whole vectors");

IFND_END

#if defined(IFND_PAIRS) && !defined(__AVX512BF16__)
#include "emulated_pairs.h"
#endif
