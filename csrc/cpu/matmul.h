// The one matrix product of all kernels:  C (M, N) += alpha * A (M, P) B (P, N).
//
// B and C have vectors along N, A is read an element at a time and broadcast, so neither the keys nor the
// logits need ever be transposed: C = scores (keys, queries), or C = gradient (dim, queries) with A = keys
// transposed, or C = gradient (keys, dim). An element of C is summed in the same order whatever its place in
// the register block, so equal rows give equal bits.
#pragma once

#include "simd.h"

IFND_BEGIN

// Products are summed in registers over this many terms, then added to C: better cached, better rounded.
constexpr int kDepth = 256;

template <bool Transposed>
IFND_INLINE float element(const float* a, ptrdiff_t lda, int m, int p) {
  return Transposed ? a[p * lda + m] : a[m * lda + p];
}

template <int M, int V, bool Transposed>
IFND_INLINE void register_block(int P, float alpha, const float* a, ptrdiff_t lda, const float* b, ptrdiff_t ldb,
                                float* c, ptrdiff_t ldc) {
  vfloat acc[M][V] = {};
  for (int p = 0; p < P; ++p) {
    vfloat row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + p * ldb + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vfloat x = splat(element<Transposed>(a, lda, m, p));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] += x * row[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      float* out = c + m * ldc + v * W;
      store(out, load(out) + splat(alpha) * acc[m][v]);
    }
}

// The last, fewer than ROWS rows.
template <int M, int V, bool Transposed>
IFND_INLINE void remaining_rows(int m, int P, float alpha, const float* a, ptrdiff_t lda, const float* b,
                                ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  if constexpr (M > 0) {
    if (m == M)
      register_block<M, V, Transposed>(P, alpha, a, lda, b, ldb, c, ldc);
    else
      remaining_rows<M - 1, V, Transposed>(m, P, alpha, a, lda, b, ldb, c, ldc);
  }
}

template <int V, bool Transposed>
static void multiply_columns(int M, int P, float alpha, const float* a, ptrdiff_t lda, const float* b, ptrdiff_t ldb,
                             float* c, ptrdiff_t ldc) {
  for (int p = 0; p < P; p += kDepth) {
    const int depth = min_of(kDepth, P - p);
    const float* panel = b + p * ldb;
    for (int m = 0; m < M; m += ROWS) {
      const float* block = a + (Transposed ? p * lda + m : m * lda + p);
      if (M - m >= ROWS)
        register_block<ROWS, V, Transposed>(depth, alpha, block, lda, panel, ldb, c + m * ldc, ldc);
      else
        remaining_rows<ROWS - 1, V, Transposed>(M - m, depth, alpha, block, lda, panel, ldb, c + m * ldc, ldc);
    }
  }
}

// N is a multiple of W. A is (M, P) with row stride lda, or stored as (P, M) when Transposed.
template <bool Transposed>
static void multiply_add(int M, int N, int P, float alpha, const float* a, ptrdiff_t lda, const float* b,
                         ptrdiff_t ldb, float* c, ptrdiff_t ldc) {
  int n = 0;
  for (; n + LANES <= N; n += LANES)
    multiply_columns<VECTORS, Transposed>(M, P, alpha, a, lda, b + n, ldb, c + n, ldc);
  for (; n < N; n += W) multiply_columns<1, Transposed>(M, P, alpha, a, lda, b + n, ldb, c + n, ldc);
}

// scores (keys, LANES) = alpha * tile (keys, D) panel (D, LANES); only the first `rows` lanes need be right.
static inline void panel_scores(int keys, int64_t rows, int D, float alpha, const float* tile, ptrdiff_t ld,
                                const float* panel, float* scores) {
  memset(scores, 0, sizeof(float) * size_t(keys) * LANES);
  multiply_add<false>(keys, int(min_of<int64_t>(LANES, round_up(rows, W))), D, alpha, tile, ld, panel, LANES,
                      scores, LANES);
}

IFND_END
