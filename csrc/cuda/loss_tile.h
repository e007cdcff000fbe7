// What the passes of info_nce.h share: a tile of pairs, staged in shared memory and held by a warp, 32 rows by 32
// columns.
#pragma once

#include "arguments.h"
#include "staging.h"
#include "tensor_core.h"

namespace ifnd::cuda {

constexpr int TILE_COLUMNS = 32, TILE_BLOCKS = TILE_COLUMNS / 8, MAX_LOSS_WARPS = 4;
constexpr float LOG2E = 1.4426950408889634f, LOG2E_REST = 1.9259629911e-8f;  // what its rounding leaves
constexpr float LN2 = 0.6931471805599453f;

// What one block keeps in shared memory.
template <class T, int CHUNK>
struct LossShared {
  static constexpr int STRIDE = CHUNK + PAD;
  u16 *rows, *tile;                 // (32 * warps, STRIDE), (32, STRIDE)
  long long *row_ids, *column_ids;  // (32 * warps,), (32,)
  int *row_labels, *column_labels;  // (L, .): a lane then reads its columns at fixed distances
  float *column_units, *column_shares;  // of two terms, and relative to the largest
  float *column_shift, *column_most, *column_factor;  // NEGATIVES: of queries' exponentials
  float *level_max, *level_sum;  // MARKED_SUMS: (32 * warps, n_losses), L at most
  int* level_count;

  __host__ __device__ static constexpr int bytes(int warps, int L, Pass pass) {
    const int rows = WARP_ROWS * warps, both = rows + TILE_COLUMNS, of_terms = Terms<T>::STORED == 1 ? 0 : 8;
    const int of_pass = pass == Pass::MARKED_SUMS ? rows * L * 12 : pass == Pass::NEGATIVES ? TILE_COLUMNS * 12 : 0;
    return both * (STRIDE * 2 + 8 + 4 * L) + TILE_COLUMNS * of_terms + of_pass;
  }
  __device__ __forceinline__ LossShared(unsigned char* memory, int warps, int L) {
    const int count = WARP_ROWS * warps;
    rows = (u16*)memory;
    tile = rows + count * STRIDE;
    row_ids = (long long*)(tile + TILE_COLUMNS * STRIDE);
    column_ids = row_ids + count;
    row_labels = (int*)(column_ids + TILE_COLUMNS);
    column_labels = row_labels + count * L;
    column_units = (float*)(column_labels + TILE_COLUMNS * L);
    column_shares = column_units + TILE_COLUMNS;
    float* of_pass = Terms<T>::STORED == 1 ? column_units : column_shares + TILE_COLUMNS;
    column_shift = of_pass;
    column_most = column_shift + TILE_COLUMNS;
    column_factor = column_most + TILE_COLUMNS;
    level_max = of_pass;
    level_sum = level_max + count * L;
    level_count = (int*)(level_sum + count * L);
  }
};

// `count` rows of `side` from `first` on, by all threads of the block; zeros from `last` on and past the columns.
template <int CHUNK>
__device__ __forceinline__ void stage(u16* shared, const Side& side, int count, int first, int last, int stride, int at,
                                      int columns) {
  constexpr int ACROSS = CHUNK / PIECE;
#pragma unroll 4
  for (int i = recomputed(threadIdx.x); i < count * ACROSS; i += blockDim.x) {
    const int row = first + i / ACROSS, column = i % ACROSS * PIECE;
    *(uint4*)(shared + i / ACROSS * (CHUNK + PAD) + column) =
        row < last && column < columns ? *(const uint4*)(side.features + (long long)row * stride + at + column)
                                       : uint4{0, 0, 0, 0};
  }
}

// Their labels and ids, `none` for none.
__device__ __forceinline__ void stage_labels(int* labels, long long* ids, const Side& side, int count, int first, int last,
                                             int L, int none) {
  for (int i = recomputed(threadIdx.x); i < count * L; i += blockDim.x) {
    const int label = first + i / L < last ? side.labels[(long long)first * L + i] : -1;
    labels[i % L * count + i / L] = label < 0 ? none : label;
  }
  if (side.ids)
    for (int i = recomputed(threadIdx.x); i < count; i += blockDim.x) {
      const long long id = first + i < last ? side.ids[first + i] : -1;
      ids[i] = id < 0 ? none : id;
    }
}

// Of two terms: their units, and relative to the largest; 0 from `end` on, and where weights are NaN anyway.
template <class T, int CHUNK>
__device__ __forceinline__ void stage_units(const LossShared<T, CHUNK>& shared, const Side& side, int first, int end) {
  if (threadIdx.x >= TILE_COLUMNS) return;
  const float unit = first + threadIdx.x < end ? side.units[first + threadIdx.x] : 0.f;
  shared.column_units[threadIdx.x] = unit;
  shared.column_shares[threadIdx.x] = unit > 0 ? unit / *side.largest_unit : 0.f;
}

// One lane's sums of a tile, and words with a bit for each of them: number i is row r(i) and column c(i).
struct Lane {
  static constexpr int COUNT = TILE_BLOCKS * 8;
  const int lane;
  __device__ __forceinline__ static constexpr int index(int block, int r, int v) { return 8 * block + Core::at(r, v); }
  __device__ __forceinline__ int column(int block, int v) const { return 8 * block + Core::column(lane, v); }

  // Bits of the pairs for which `equal(row, column)`, values of which are read once.
  template <class OfRow, class OfColumn>
  __device__ __forceinline__ u32 pairs(OfRow of_row, OfColumn of_column) const {
    decltype(of_row(0)) own[Core::ROWS];
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) own[r] = of_row(Core::row(lane, r));
    u32 bits = 0;
#pragma unroll
    for (int block = 0; block < TILE_BLOCKS; ++block)
#pragma unroll
      for (int v = 0; v < Core::VALUES; ++v) {
        const auto other = of_column(column(block, v));
#pragma unroll
        for (int r = 0; r < Core::ROWS; ++r) bits |= own[r] == other ? 1u << index(block, r, v) : 0u;
      }
    return bits;
  }
};

// Where a thread is, and what its block has in shared memory. It is found out anew for each part of a tile: kept over
// them all it would take registers that the gradient leaves no room for.
template <class T, int CHUNK>
struct Place {
  const int warp, warp_row;
  const Lane own;
  const LossShared<T, CHUNK> shared;
  __device__ __forceinline__ Place(unsigned char* memory, int block_row, int L, int thread)
      : warp(thread / 32),
        warp_row(block_row + warp * WARP_ROWS),
        own{thread % 32},
        shared(memory, recomputed(blockDim.x) / 32, L) {}
  // Of two terms: the warp's weights, where its rows were until they were multiplied.
  __device__ __forceinline__ uint4* weight_terms() const {
    return (uint4*)(shared.rows + warp * WARP_ROWS * LossShared<T, CHUNK>::STRIDE);
  }
};

__device__ __forceinline__ float max_of_row(float x) {
#pragma unroll
  for (int partner = Core::FIRST_PARTNER; partner <= 2; partner *= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, partner));
  return x;
}
template <class N>
__device__ __forceinline__ N sum_of_row(N x) {
#pragma unroll
  for (int partner = Core::FIRST_PARTNER; partner <= 2; partner *= 2) x += __shfl_xor_sync(0xffffffffu, x, partner);
  return x;
}
__device__ __forceinline__ float finite_or_zero(float x) { return x == -infinity() ? 0.f : x; }

// Rows of the gradient times their factors, most often 1.
template <int BLOCKS>
__device__ __forceinline__ void multiply_rows(float (&grad)[BLOCKS][8], const float (&factor)[Core::ROWS]) {
  bool any = false;
#pragma unroll
  for (int r = 0; r < Core::ROWS; ++r) any |= factor[r] != 1;
  if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
  for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r)
#pragma unroll
      for (int v = 0; v < Core::VALUES; ++v) grad[block][Core::at(r, v)] *= factor[r];
}

// for each number i of a lane's sums that is in row r
#define FOR_ROW(i, r)                                    \
  _Pragma("unroll") for (int block_ = 0; block_ < TILE_BLOCKS; ++block_) \
  _Pragma("unroll") for (int v_ = 0, i; i = Lane::index(block_, r, v_), v_ < Core::VALUES; ++v_)

// One warp's pairs of a tile: which are of one image or past the end (`excluded`), and which are false negatives at
// some level, or at all (`marked`).
template <class T, int CHUNK>
struct Pairs {
  const InfoNceArguments& p;
  const LossShared<T, CHUNK>& shared;
  const Lane own;
  const int warp, first, end;  // columns [first, end) are the split's, the tile's the first of them
  u32 excluded = 0, marked = 0;

  __device__ __forceinline__ Pairs(const InfoNceArguments& p, const LossShared<T, CHUNK>& shared, Lane own, int warp,
                                   int first, int end)
      : p(p), shared(shared), own(own), warp(warp), first(first), end(end) {
    const long long* ids = shared.row_ids + warp * WARP_ROWS;
    if (p.rows.ids)
      excluded = own.pairs([&](int row) { return ids[row]; }, [&](int column) { return shared.column_ids[column]; });
    if (first + TILE_COLUMNS > end)
      excluded |= own.pairs([](int) { return true; }, [&](int column) { return first + column >= end; });
    if (p.L) marked = at_level(0);
    for (int level = 1; level < p.L; ++level) {
      const u32 here = at_level(level);
      marked = p.all_levels ? marked & here : marked | here;
    }
    marked &= ~excluded;
  }
  __device__ __forceinline__ u32 at_level(int level) const {
    const int* of_rows = shared.row_labels + level * (blockDim.x / 32 * WARP_ROWS) + warp * WARP_ROWS;
    const int* of_columns = shared.column_labels + level * TILE_COLUMNS;
    return own.pairs([&](int row) { return of_rows[row]; }, [&](int column) { return of_columns[column]; });
  }
  // Of the marked, those in this loss's F: a level's, or the only one's, which holds them all.
  __device__ __forceinline__ u32 of_loss(int loss) const { return p.n_losses == 1 ? marked : at_level(loss) & marked; }
};

}  // namespace ifnd::cuda
