// Rows of a matrix in global memory, copied by a block of threads into shared memory, 16 bytes at a time.
#pragma once

#include "ptx.h"

namespace ifnd::cuda {

constexpr int PIECE = 8;  // numbers of 16 bits in 16 bytes
constexpr int PAD = 8;    // numbers between rows in shared memory, so that 8 rows fall into different banks

// Columns of the operand that step `step` of a product takes: a term of the sum, then a chunk of its columns.
struct Step {
  int a, b, columns;
  template <int CHUNK>
  __device__ __forceinline__ static Step of(int step, int D) {
    const int chunks = (D + CHUNK - 1) / CHUNK, term = step / chunks, column = step % chunks * CHUNK;
    return {(term == 2 ? D : 0) + column, (term == 1 ? D : 0) + column, D - column};
  }
};

// `ROWS` rows of `CHUNK` columns, through registers: what is fetched early is stored late, with arithmetic in between.
template <int ROWS, int CHUNK, int THREADS>
struct Staging {
  static constexpr int STRIDE = CHUNK + PAD, ACROSS = CHUNK / PIECE, PIECES = (ROWS * ACROSS + THREADS - 1) / THREADS;
  uint4 piece[PIECES];

  // Rows [first, first + ROWS) of `matrix`, whose rows are `stride` numbers apart and have `columns` from there on;
  // zeros past `last` and past the columns.
  __device__ __forceinline__ void fetch(const u16* matrix, int first, int last, int columns, int stride) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int at = i * THREADS + threadIdx.x, column = at % ACROSS * PIECE;
      const int row = first + at / ACROSS;
      piece[i] = row < first + ROWS && row < last && column < columns ? *(const uint4*)(matrix + (long long)row * stride + column) : uint4{0, 0, 0, 0};
    }
  }
  __device__ __forceinline__ void store(u16* shared) const {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const int at = i * THREADS + threadIdx.x;
      if (at < ROWS * ACROSS) *(uint4*)(shared + at / ACROSS * STRIDE + at % ACROSS * PIECE) = piece[i];
    }
  }
};

}  // namespace ifnd::cuda
