// The matrix product of pairs (matmul.h) by tiles.
//
// A block of 2 x 2 tiles of C takes, for every 16 words of P, two loads of A, two of B and four products: a load (8
// cycles from the first-level cache) for each product (16 cycles, the unit's rate), which hides it. An element of C is
// summed in the same order whatever its place, so equal rows give equal bits: in a product, which adds up the 16 first
// and the 16 second elements of pairs apart before it adds both to C.
#pragma once

#include "matmul.h"
#include "tile_unit.h"

#ifdef IFND_TILES

IFND_BEGIN

static_assert(W == TILE && LANES == 2 * TILE, "a vector is a row of a tile, and a panel two tiles wide");

template <int C, int A, int B>
IFND_INLINE void tile_dot(const float*) { tile_dot_bfloat16<C, A, B>(); }
template <int C, int A, int B>
IFND_INLINE void tile_dot(const int32_t*) { tile_dot_int8<C, A, B>(); }

// C in tiles 0 to 3, A in 4 and 5, B in 6 and 7; where M or N is 1, without the second of A or B. Words are pairs where
// the sums are floats, and four signed bytes where they are integers.
template <int M, int N, class Sum>
static void tile_block(Multiple<TILE> P, const uint32_t* a, ptrdiff_t lda, const uint32_t* b, ptrdiff_t ldb, Sum* c,
                       ptrdiff_t ldc, bool add) {
  constexpr ptrdiff_t size = sizeof(Sum);
  Sum* const below = c + TILE * ldc;
  if (add) {
    tile_load<0>(c, ldc * size);
    if constexpr (N > 1) tile_load<1>(c + TILE, ldc * size);
    if constexpr (M > 1) tile_load<2>(below, ldc * size);
    if constexpr (M > 1 && N > 1) tile_load<3>(below + TILE, ldc * size);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (int64_t p = 0; p < P; p += TILE) {
    tile_load<4>(a + p, lda * size);
    tile_load<6>(b + p * ldb, ldb * size);
    tile_dot<0, 4, 6>(c);
    if constexpr (N > 1) tile_load<7>(b + p * ldb + TILE, ldb * size);
    if constexpr (N > 1) tile_dot<1, 4, 7>(c);
    if constexpr (M > 1) tile_load<5>(a + TILE * lda + p, lda * size);
    if constexpr (M > 1) tile_dot<2, 5, 6>(c);
    if constexpr (M > 1 && N > 1) tile_dot<3, 5, 7>(c);
  }
  tile_store<0>(c, ldc * size);
  if constexpr (N > 1) tile_store<1>(c + TILE, ldc * size);
  if constexpr (M > 1) tile_store<2>(below, ldc * size);
  if constexpr (M > 1 && N > 1) tile_store<3>(below + TILE, ldc * size);
}

// As matmul.h's, but whole tiles are read: A has rows up to a multiple of 16, of any values; words from P up to a
// multiple of 16 are zero in one of A and B and finite in the other.
template <bool Transposed>
static void multiply(int M, Multiple<TILE> N, int P, float alpha, const Pair* a, ptrdiff_t lda, const Pair* b,
                     ptrdiff_t ldb, float* c, ptrdiff_t ldc, bool add) {
  static_assert(!Transposed, "a tile is loaded by rows");
  alignas(64) float sums[2 * TILE * LANES];
  const Multiple<TILE> depth = round_up<TILE>(P);
  for (int m = 0; m < M; m += 2 * TILE)
    for (int n = 0; n < N; n += LANES) {
      const int rows = min_of(M - m, 2 * TILE), columns = int(min_of<int64_t>(N - n, LANES));
      const bool as_it_is = alpha == 1.0f && rows % TILE == 0;
      float *const to = c + m * ldc + n, *const out = as_it_is ? to : sums;
      const ptrdiff_t ld = as_it_is ? ldc : LANES;
      const auto block = [&](auto product) { product(depth, a + m * lda, lda, b + n, ldb, out, ld, as_it_is && add); };
      if (rows > TILE)
        block(columns > TILE ? tile_block<2, 2, float> : tile_block<2, 1, float>);
      else
        block(columns > TILE ? tile_block<1, 2, float> : tile_block<1, 1, float>);
      for (int i = 0; i < rows && !as_it_is; ++i)
        for (int v = 0; v < columns; v += W) {
          const vfloat product = splat(alpha) * load(sums + i * LANES + v);
          store(to + i * ldc + v, add ? load(to + i * ldc + v) + product : product);
        }
    }
}

// The transpose of 16 rows of 16 words, in place: words, then pairs of them and so on change places across the diagonal.
template <int Step, bool Upper, int... I>
IFND_INLINE vuint exchanged(vuint low, vuint high) {
  return __builtin_shufflevector(low, high, (Upper ? (I & Step ? TILE + I : I + Step) : (I & Step ? TILE + I - Step : I))...);
}

template <int Step, int... I>
IFND_INLINE void exchange(vuint* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < TILE; ++i) {
    if (i & Step) continue;
    const vuint low = rows[i], high = rows[i + Step];
    rows[i] = exchanged<Step, false, I...>(low, high), rows[i + Step] = exchanged<Step, true, I...>(low, high);
  }
}

template <int... I>
IFND_INLINE void transpose_by(vuint* rows) {
  exchange<1, I...>(rows), exchange<2, I...>(rows), exchange<4, I...>(rows), exchange<8, I...>(rows);
}
IFND_INLINE void transpose(vuint* rows) { transpose_by<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(rows); }

IFND_END
#endif
