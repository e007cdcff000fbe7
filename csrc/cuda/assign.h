// Every row's nearest centroid, in one pass over the centroids, on tensor cores:
//
//   s_j = x.c_j - h_j,   label = argmax_j s_j,   confidence = 1 / sum_j 2^{(s_j - s_label) * scale}
//
// h_j = |c_j|^2 / 2 for l2, else 0; scale = log2(e) / temperature. A warp holds 32 rows in registers and walks the
// centroids, 16 at a time, double-buffered in shared memory. A lane keeps the best of the columns that it sees; lanes
// are joined at the end. Equal sums: the lowest index. NaN is never the largest, and makes the confidence NaN; a row that
// has no other similarity gets label -1.
//
// float32 comes as two terms of float16 (csrc/cuda/two_terms.h): high.high + high.low + low.high is within about 2^-22 of
// x.c. Rows that are not finite, which terms cannot be, have a unit of NaN, and `exact_kernel` does them again.
//
// Labels alone take less: SCREEN multiplies high.high and lists the rows whose two best are closer than their `margin`,
// a bound on what the other terms can change; only these rows are done again with all of them.
#pragma once

#include "arguments.h"
#include "number.h"
#include "staging.h"
#include "tensor_core.h"

namespace ifnd::cuda {

constexpr int ASSIGN_WARPS = 8, ASSIGN_THREADS = 32 * ASSIGN_WARPS, ASSIGN_ROWS = ASSIGN_WARPS * WARP_ROWS;
constexpr int ASSIGN_COLUMNS = 16, ASSIGN_BLOCKS = ASSIGN_COLUMNS / 8;

template <int CHUNK>
constexpr int ASSIGN_SHARED_BYTES = 2 * ASSIGN_COLUMNS * (CHUNK + PAD) * int(sizeof(u16));

// The nearest so far among the columns that one lane sees of one row.
template <Assign MODE>
struct Nearest {
  float best = -infinity(), second = -infinity(), total = 0;
  int label = -1;  // none yet, or past the last column: both more than any label as unsigned numbers

  // One tile's sums for this row, `s(i)` with i rising by column, `column(i)`.
  template <int COUNT, class Sums, class Columns>
  __device__ __forceinline__ void add(float scale, Sums s, Columns column) {
    float highest = best;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (MODE == Assign::SCREEN) second = fmaxf(second, fminf(highest, s(i)));
      highest = fmaxf(highest, s(i));
    }
    if (MODE == Assign::CONFIDENCE) {
      const float reference = highest == -infinity() ? 0.f : highest;
      total *= exp2_fast((best - reference) * scale);
      float added = 0;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) added += exp2_fast((s(i) - reference) * scale);
      total += added;
    }
    if (highest > best || label < 0) {  // the first -infinity, too, is the largest so far
#pragma unroll
      for (int i = COUNT - 1; i >= 0; --i)
        if (s(i) == highest) label = column(i);
      best = highest;
    }
  }

  __device__ __forceinline__ void join(int partner, float scale) {
    const float other = __shfl_xor_sync(0xffffffffu, best, partner);
    const int other_label = __shfl_xor_sync(0xffffffffu, label, partner);
    const float highest = fmaxf(best, other);
    if (MODE == Assign::SCREEN)
      second = fmaxf(fmaxf(second, __shfl_xor_sync(0xffffffffu, second, partner)), fminf(best, other));
    if (MODE == Assign::CONFIDENCE) {
      const float other_total = __shfl_xor_sync(0xffffffffu, total, partner);
      const float reference = highest == -infinity() ? 0.f : highest;
      total = total * exp2_fast((best - reference) * scale) + other_total * exp2_fast((other - reference) * scale);
    }
    if (other > best || (other == best && u32(other_label) < u32(label))) label = other_label;
    best = highest;
  }
};

template <class T, int CHUNK, Assign MODE>
__global__ void __launch_bounds__(ASSIGN_THREADS, 2) assign_kernel(AssignArguments p) {
  if constexpr (Supports<T>::value) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    using Tile = Staging<ASSIGN_COLUMNS, CHUNK, ASSIGN_THREADS>;
    constexpr int TILE = ASSIGN_COLUMNS * Tile::STRIDE;
    u16* tiles = (u16*)shared_memory;  // two
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool listed = MODE == Assign::LABELS && p.rows;
    const int row_count = listed ? *p.row_count : p.N;
    const int block_row = blockIdx.x * ASSIGN_ROWS, warp_row = block_row + warp * WARP_ROWS;
    if (block_row >= row_count) return;
    constexpr int STORED = Terms<T>::STORED, PRODUCTS = MODE == Assign::SCREEN ? 1 : Terms<T>::PRODUCTS;
    const int stride = STORED * p.D, steps = PRODUCTS * ((p.D + CHUNK - 1) / CHUNK);
    const int last_row = row_count - 1;
    const auto source = [&](int row) -> long long {
      const int i = warp_row + row < last_row ? warp_row + row : last_row;
      return listed ? p.rows[i] : i;
    };

    // 1. The first tile, and the warp's rows; lanes past the last row read it again, and store nothing.
    Tile tile;
    const auto fetch = [&](int first, int step) {
      const Step at = Step::of<CHUNK>(step, p.D);
      tile.fetch(p.centroids + at.b, first, p.C, at.columns, stride);
    };
    fetch(0, 0);
    tile.store(tiles);
    __syncthreads();

    float row_units[Core::ROWS];
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) row_units[r] = STORED == 1 ? 1.f : p.feature_units[source(Core::row(lane, r))];
    // Rows that change with each product of terms are not held.
    constexpr int HELD = PRODUCTS == 1 ? CHUNK / 16 : 1;
    u32 a[HELD][8];
    Nearest<MODE> nearest[Core::ROWS];
    int buffer = 0;
    for (int first = 0; first < p.C; first += ASSIGN_COLUMNS) {
      float sums[ASSIGN_BLOCKS][8] = {};
      for (int step = 0; step < steps; ++step) {
        // 2. The next tile is on its way while this one is multiplied.
        const bool last_step = step + 1 == steps;
        const int next = last_step ? first + ASSIGN_COLUMNS : first;
        if (next < p.C) fetch(next, last_step ? 0 : step + 1);
        const Step at = Step::of<CHUNK>(step, p.D);
        const auto load_rows = [&](int k) {
          Core::load_a(a[k % HELD], [&](int row) { return p.features + source(row) * stride + at.a + 16 * k; },
                       at.columns - 16 * k, lane);
        };
        if (HELD > 1 && (steps > 1 || first == 0))
#pragma unroll
          for (int k = 0; k < HELD; ++k) load_rows(k);
        const u16* columns = tiles + buffer * TILE;
#pragma unroll (HELD > 1 ? HELD : 1)
        for (int k = 0; k < CHUNK / 16; ++k) {
          if (HELD == 1) load_rows(k);
#pragma unroll
          for (int block = 0; block < ASSIGN_BLOCKS; ++block) {
            u32 b[Core::B_WORDS];
            Core::load_b(b, columns + 8 * block * Tile::STRIDE + 16 * k, Tile::STRIDE, lane);
            const auto multiply = [&](float (&s)[8]) { Core::mma(T(), s, a[k % HELD], b); };
            PRODUCTS == 1 ? multiply(sums[block]) : add_product<T>(sums[block], multiply);
          }
        }
        if (last_step) {
          // 3. From products to similarities.
#pragma unroll
          for (int block = 0; block < ASSIGN_BLOCKS; ++block)
#pragma unroll
            for (int v = 0; v < Core::VALUES; ++v) {
              const int j = first + 8 * block + Core::column(lane, v);
              const float h = j >= p.C ? infinity() : p.half_norms ? p.half_norms[j] : 0.f;
              const float unit = STORED == 1 || j >= p.C ? 1.f : p.centroid_units[j];
#pragma unroll
              for (int r = 0; r < Core::ROWS; ++r) {
                float& s = sums[block][Core::at(r, v)];
                s = STORED == 1 ? s - h : fmaf(s * row_units[r], unit, -h);
              }
            }
        }
        if (next < p.C) tile.store(tiles + (buffer ^ 1) * TILE);
        __syncthreads();
        buffer ^= 1;
      }
      // 4. The best so far, and the running sum of exponentials.
#pragma unroll
      for (int r = 0; r < Core::ROWS; ++r)
        nearest[r].template add<ASSIGN_BLOCKS * Core::VALUES>(
            p.scale, [&](int i) { return sums[i / Core::VALUES][Core::at(r, i % Core::VALUES)]; },
            [&](int i) { return first + 8 * (i / Core::VALUES) + Core::column(lane, i % Core::VALUES); });
    }

    // 5. The lanes of a row agree; one of them stores.
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) {
#pragma unroll
      for (int partner = Core::FIRST_PARTNER; partner <= 2; partner *= 2) nearest[r].join(partner, p.scale);
      const int at = warp_row + Core::row(lane, r);
      if (at > last_row || (lane & (4 - Core::FIRST_PARTNER)) != 0) continue;
      const int i = listed ? p.rows[at] : at;
      p.labels[i] = nearest[r].label < p.C ? nearest[r].label : -1;
      if (MODE == Assign::CONFIDENCE)
        p.confidence[i] = nearest[r].best == -infinity() ? infinity() - infinity() : 1.f / nearest[r].total;
      if (MODE == Assign::SCREEN && !(nearest[r].best - nearest[r].second > p.margins[i]))
        p.near_rows[atomicAdd(p.near_count, 1)] = i;
    }
  }
}

// One warp: of a float32 row that is not finite, or of any where a centroid is not, what the terms cannot tell.
__global__ void __launch_bounds__(ASSIGN_THREADS) exact_kernel(AssignArguments p) {
  const int row = blockIdx.x * ASSIGN_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.N || (p.feature_units[row] > 0 && p.centroid_summary[1] == 0)) return;
  const float* x = p.exact_features + (long long)row * p.columns;
  float best = -infinity(), total = 0;
  int label = -1;
  for (int j = 0; j < p.C; ++j) {
    const float* c = p.exact_centroids + (long long)j * p.columns;
    float s = 0;
    for (int column = lane; column < p.columns; column += 32) s = fmaf(x[column], c[column], s);
    s = sum_of_lanes(s) - (p.half_norms ? p.half_norms[j] : 0.f);
    if (s > best || (s == best && label < 0)) label = j;
    const float highest = fmaxf(best, s), reference = highest == -infinity() ? 0.f : highest;
    total = total * exp2_fast((best - reference) * p.scale) + exp2_fast((s - reference) * p.scale);
    best = highest;
  }
  if (lane != 0) return;
  p.labels[row] = label;
  if (p.confidence) p.confidence[row] = best == -infinity() ? infinity() - infinity() : 1.f / total;
}

}  // namespace ifnd::cuda
