// The one matrix product of all kernels:  C (M, N) = alpha * A (M, P) B (P, N), or added to C.
//
// B and C have vectors along N, A is read a word at a time and broadcast, so neither the keys nor the logits need
// ever be transposed: C = scores (keys, queries), or C = gradient (dim, queries) with A = keys transposed, or
// C = gradient (keys, dim). A word is a float, or a pair of bfloat16 that lie next to each other along P. An element
// of C is summed in the same order whatever its place in the register block, so equal rows give equal bits.
#pragma once

#include "simd.h"

IFND_BEGIN

// Products are summed in registers over this many words, then added to C: better cached, better rounded.
constexpr int kDepth = 256;

template <bool Transposed, class Word>
IFND_INLINE Word element(const Word* a, ptrdiff_t lda, int m, int p) {
  Word word;
  memcpy(&word, Transposed ? a + p * lda + m : a + m * lda + p, sizeof word);
  return word;
}

// M rows, N columns: vectors of W lanes, or one of NARROW.
template <int M, int N, bool Transposed, class Word>
IFND_INLINE void register_block(int P, float alpha, const Word* a, ptrdiff_t lda, const Word* b, ptrdiff_t ldb,
                                float* c, ptrdiff_t ldc, bool add) {
  constexpr int width = N % W == 0 ? W : NARROW, V = N / width;
  using Sums = typename Lanes<float, width>::Vector;
  using Words = typename Lanes<Word, width>::Vector;
  Sums acc[M][V] = {};
  for (int p = 0; p < P; ++p) {
    Words row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) memcpy(&row[v], b + p * ldb + v * width, sizeof row[v]);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Words x = element<Transposed>(a, lda, m, p) - Words{};
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = add_product(acc[m][v], x, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* out = c + m * ldc + v * width;
      Sums before{};
      if (add) memcpy(&before, out, sizeof before);
      const Sums after = add ? before + alpha * acc[m][v] : alpha * acc[m][v];
      memcpy(out, &after, sizeof after);
    }
}

// The last, fewer than ROWS rows.
template <int M, int N, bool Transposed, class Word>
IFND_INLINE void remaining_rows(int m, int P, float alpha, const Word* a, ptrdiff_t lda, const Word* b, ptrdiff_t ldb,
                                float* c, ptrdiff_t ldc, bool add) {
  if constexpr (M > 0) {
    if (m == M)
      register_block<M, N, Transposed>(P, alpha, a, lda, b, ldb, c, ldc, add);
    else
      remaining_rows<M - 1, N, Transposed>(m, P, alpha, a, lda, b, ldb, c, ldc, add);
  }
}

template <int N, bool Transposed, class Word>
static void multiply_columns(int M, int P, float alpha, const Word* a, ptrdiff_t lda, const Word* b, ptrdiff_t ldb,
                             float* c, ptrdiff_t ldc, bool add) {
  for (int p = 0; p < P; p += kDepth) {
    const int depth = min_of(kDepth, P - p);
    const Word* panel = b + p * ldb;
    for (int m = 0; m < M; m += ROWS) {
      const Word* block = a + (Transposed ? p * lda + m : m * lda + p);
      if (M - m >= ROWS)
        register_block<ROWS, N, Transposed>(depth, alpha, block, lda, panel, ldb, c + m * ldc, ldc, add || p > 0);
      else
        remaining_rows<ROWS - 1, N, Transposed>(M - m, depth, alpha, block, lda, panel, ldb, c + m * ldc, ldc,
                                                add || p > 0);
    }
  }
}

// P counts words. A is (M, P) with row stride lda, or stored as (P, M) when Transposed.
template <bool Transposed, class Word>
static void multiply(int M, Multiple<NARROW> N, int P, float alpha, const Word* a, ptrdiff_t lda, const Word* b,
                     ptrdiff_t ldb, float* c, ptrdiff_t ldc, bool add) {
  int n = 0;
  for (; n + LANES <= N; n += LANES)
    multiply_columns<LANES, Transposed>(M, P, alpha, a, lda, b + n, ldb, c + n, ldc, add);
  for (; n + W <= N; n += W) multiply_columns<W, Transposed>(M, P, alpha, a, lda, b + n, ldb, c + n, ldc, add);
  if (n < N) multiply_columns<NARROW, Transposed>(M, P, alpha, a, lda, b + n, ldb, c + n, ldc, add);
}

IFND_END
