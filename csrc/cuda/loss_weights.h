// What each pass of info_nce.h makes of a tile's products: weights in their place, or sums.
//
// Exponents are differences of products, times the scale: these are exact where it matters, and differences of large
// logits are not.
#pragma once

#include "loss_tile.h"

namespace ifnd::cuda {

using TileSums = float[TILE_BLOCKS][8];

// The online softmax of each row (`highest`, without the scale, and `total`) with a tile more; `rescale` is what its
// gradient so far is to be multiplied by.
template <class T, int CHUNK>
__device__ __forceinline__ void dense_weights(const Pairs<T, CHUNK>& pairs, TileSums& s, float scale,
                                              float (&highest)[Core::ROWS], float (&total)[Core::ROWS],
                                              float (&rescale)[Core::ROWS]) {
  const float shift = pairs.p.shift;
  const u32 out = pairs.p.attract ? pairs.excluded : pairs.excluded | pairs.marked;
#pragma unroll
  for (int r = 0; r < Core::ROWS; ++r) {
    float raised = highest[r];
    FOR_ROW(i, r) {
      if (out >> i & 1) s[i / 8][i % 8] = -infinity();
      raised = fmaxf(raised, s[i / 8][i % 8]);
    }
    raised = max_of_row(raised);
    const float reference = finite_or_zero(raised);
    rescale[r] = exp2_fast((highest[r] - reference) * scale);
    highest[r] = raised;
    float added = 0;
    FOR_ROW(i, r) {
      s[i / 8][i % 8] = exp2_fast(fmaf(s[i / 8][i % 8] - reference, scale, shift));
      added += s[i / 8][i % 8];
    }
    total[r] = total[r] * rescale[r] + added;
  }
}

// Into shared memory: |F_l|, and each level's online softmax over the keys in another level's F alone; or the sum of the
// products in F_l, where these attract.
template <class T, int CHUNK>
__device__ __forceinline__ void add_marked(const Pairs<T, CHUNK>& pairs, const TileSums& s, float scale) {
  const InfoNceArguments& p = pairs.p;
  const LossShared<T, CHUNK>& shared = pairs.shared;
  const int lane = pairs.own.lane;
  for (int loss = 0; loss < p.n_losses; ++loss) {
    const u32 here = pairs.of_loss(loss), kept = pairs.marked & ~here;
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) {
      const int at = (pairs.warp * WARP_ROWS + Core::row(lane, r)) * p.n_losses + loss;
      float sum = 0, raised = shared.level_max[at];
      const float before = raised;
      int members = 0;
      FOR_ROW(i, r) {
        members += here >> i & 1;
        if (p.attract && here >> i & 1) sum += s[i / 8][i % 8];
        if (!p.attract && kept >> i & 1) raised = fmaxf(raised, s[i / 8][i % 8]);
      }
      raised = max_of_row(raised);
      const float reference = finite_or_zero(raised);
      if (!p.attract) FOR_ROW(i, r)
        if (kept >> i & 1) sum += exp2_fast((s[i / 8][i % 8] - reference) * scale);
      sum = sum_of_row(sum);
      members = sum_of_row(members);
      if ((lane & (4 - Core::FIRST_PARTNER)) == 0) {
        const float rescale = p.attract ? 1.f : exp2_fast((before - reference) * scale);
        shared.level_count[at] += members;
        shared.level_sum[at] = shared.level_sum[at] * rescale + sum;
        shared.level_max[at] = raised;
      }
    }
    __syncwarp();
  }
}

// Of two terms: products that are sums of terms' times their units, and weights of columns that are their terms alone.
template <class T, int CHUNK>
__device__ __forceinline__ void multiply_units(const Pairs<T, CHUNK>& pairs, TileSums& s, int warp_row) {
  if constexpr (Terms<T>::STORED == 2)
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) {
      const int row = warp_row + Core::row(pairs.own.lane, r);
      const float unit = row < pairs.p.rows.count ? pairs.p.rows.units[row] : 0.f;
      FOR_ROW(i, r) s[i / 8][i % 8] = s[i / 8][i % 8] * unit * pairs.shared.column_units[pairs.own.column(block_, v_)];
    }
}
template <class T, int CHUNK>
__device__ __forceinline__ void multiply_shares(const Pairs<T, CHUNK>& pairs, TileSums& weights) {
  if constexpr (Terms<T>::STORED == 2)
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r)
      FOR_ROW(i, r) weights[i / 8][i % 8] *= pairs.shared.column_shares[pairs.own.column(block_, v_)];
}

// Of two terms: weights as their terms of 16 bits, fragments of A, in a lane's own places of shared memory: registers would
// not hold them beside the gradient. Fragment 2 k + term is of columns 16 k to 16 k + 15.
template <class T>
__device__ __forceinline__ void keep_terms(uint4* places, TileSums& weights, int lane) {
#pragma unroll
  for (int fragment = 0; fragment < TILE_BLOCKS; ++fragment) {
    float(&left)[8] = weights[fragment / 2 * 2], (&right)[8] = weights[fragment / 2 * 2 + 1];
    u32 a[8];
    Core::as_a(T(), a, left, right, lane);
    places[64 * fragment + lane] = {a[0], a[1], a[2], a[3]};
    places[64 * fragment + 32 + lane] = {a[4], a[5], a[6], a[7]};
#pragma unroll
    for (int i = 0; fragment % 2 == 0 && i < 8; ++i) {  // what rounding leaves
      left[i] -= unpack(T(), (u16)pack(T(), left[i], 0));
      right[i] -= unpack(T(), (u16)pack(T(), right[i], 0));
    }
  }
}
__device__ __forceinline__ void load_term(u32 (&a)[8], const uint4* places, int fragment, int lane) {
  const uint4 x = places[64 * fragment + lane], y = places[64 * fragment + 32 + lane];
  a[0] = x.x, a[1] = x.y, a[2] = x.z, a[3] = x.w, a[4] = y.x, a[5] = y.y, a[6] = y.z, a[7] = y.w;
}

// e^{s - lse} by their logarithms to base 2. Rounded, a large lse may be below s: none is more than 1.
__device__ __forceinline__ float exponential(float s, float lse) { return exp2_fast(fminf(s - lse, 0.f)); }

__device__ __forceinline__ void multiply_all(TileSums& s, float factor) {
#pragma unroll
  for (int block = 0; block < TILE_BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 8; ++i) s[block][i] *= factor;
}

// n_losses times d loss / d s of the marked pairs, 0 of others, of logits s: the sum over l of [k not in F_l] e^{s -
// lse_l}, or where false negatives attract of -[k in F_l] / (1 + |F_l|), to which NEGATIVES, itself dense, adds e^{s - lse}.
template <Pass PASS, class T, int CHUNK>
__device__ __forceinline__ void marked_weights(const Pairs<T, CHUNK>& pairs, const TileSums& s, int warp_row,
                                               TileSums& weights) {
  const InfoNceArguments& p = pairs.p;
  for (int loss = 0; pairs.marked && loss < p.n_losses; ++loss) {
    const u32 here = pairs.of_loss(loss);
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) FOR_ROW(i, r) {
      if (!(pairs.marked >> i & 1)) continue;
      const int row = warp_row + Core::row(pairs.own.lane, r), column = pairs.first + pairs.own.column(block_, v_);
      const int at = (PASS == Pass::NEGATIVES ? column : row) * p.n_losses + loss;
      float& w = weights[i / 8][i % 8];
      const bool inside = here >> i & 1;
      if (PASS == Pass::NEGATIVES ? p.attract || !inside : !p.attract && !inside)
        w += exponential(s[i / 8][i % 8], p.log_normalizer[at] * LOG2E);
      if (p.attract && inside) w -= 1.f / (1 + p.false_negative_counts[at]);
    }
  }
  __syncwarp();  // lanes without marked pairs left the loop early, and products need them all together
}

template <class T, int CHUNK>
__device__ __forceinline__ void marked_grad_weights(const Pairs<T, CHUNK>& pairs, TileSums& s, float scale, int warp_row) {
  multiply_all(s, scale);
  TileSums weights = {};
  marked_weights<Pass::MARKED_GRAD>(pairs, s, warp_row, weights);
  const float unit = exp2_fast(pairs.p.shift) / pairs.p.n_losses;
#pragma unroll
  for (int block = 0; block < TILE_BLOCKS; ++block)
#pragma unroll
    for (int i = 0; i < 8; ++i) s[block][i] = weights[block][i] * unit;
}

// In shared memory, for each of the tile's queries, with a = min_l lse_l: e^{s - a} g mean_l e^{a - lse_l} is a power of 2
// whose exponent is the logit less `column_shift`, times `column_factor`. Where a is moderate the shift is 0, else an
// integer: the exponent of a small logit is then as exact as that logit. Of two terms the factor has the column's share.
template <class T, int CHUNK>
__device__ __forceinline__ void stage_query_factors(const InfoNceArguments& p, const LossShared<T, CHUNK>& shared, int first,
                                                    int end) {
  if (threadIdx.x >= TILE_COLUMNS) return;
  const int i = first + threadIdx.x;
  const float* lse = p.log_normalizer + (long long)i * p.n_losses;
  float least = infinity(), mean = 0;
  for (int loss = 0; i < end && loss < p.n_losses; ++loss) least = fminf(least, lse[loss]);
  for (int loss = 0; i < end && loss < p.n_losses; ++loss) mean += exp2_fast((least - lse[loss]) * LOG2E);
  const float a = i < end ? least : 0.f, whole = rintf(a * LOG2E), rest = fmaf(a, LOG2E_REST, fmaf(a, LOG2E, -whole));
  const bool moderate = fabsf(whole) < 32;
  shared.column_shift[threadIdx.x] = moderate ? 0.f : whole;
  shared.column_most[threadIdx.x] = moderate ? whole + rest : rest;
  shared.column_factor[threadIdx.x] =
      i < end ? p.loss_grad[i] * mean / p.n_losses * exp2_fast(-rest) * (moderate ? exp2_fast(-whole) : 1.f) : 0.f;
  if constexpr (Terms<T>::STORED == 2) shared.column_factor[threadIdx.x] *= shared.column_shares[threadIdx.x];
}

// g d loss / d s of each pair, rows being keys: of pairs that are not marked one exponential, e^{s - a} times a query's
// factor. A key may be far from every query: its weights are relative to `highest`, a power of 2, of which the largest so
// far is 1 to 2 times.
template <class T, int CHUNK>
__device__ __forceinline__ void negatives_weights(const Pairs<T, CHUNK>& pairs, TileSums& s, float scale, int warp_row,
                                                  float (&highest)[Core::ROWS], float (&rescale)[Core::ROWS]) {
  const InfoNceArguments& p = pairs.p;
  multiply_all(s, scale);
  TileSums weights = {};
  marked_weights<Pass::NEGATIVES>(pairs, s, warp_row, weights);
#pragma unroll
  for (int r = 0; r < Core::ROWS; ++r) {
    float raised = 0;
    FOR_ROW(i, r) {
      const int column = pairs.own.column(block_, v_);
      const float power = fminf(s[i / 8][i % 8] - pairs.shared.column_shift[column], pairs.shared.column_most[column]);
      float w = exp2_fast(power) * pairs.shared.column_factor[column];
      if (pairs.marked >> i & 1) {
        w = weights[i / 8][i % 8] * p.loss_grad[pairs.first + column] / p.n_losses;
        if constexpr (Terms<T>::STORED == 2) w *= pairs.shared.column_shares[column];
      }
      if (pairs.excluded >> i & 1) w = 0;
      s[i / 8][i % 8] = w;
      raised = fmaxf(raised, fabsf(w));
    }
    const float power = __int_as_float(__float_as_int(max_of_row(raised)) & 0x7f800000);
    const float largest = fmaxf(highest[r], power), unit = exp2_fast(p.shift - 1) / largest;
    rescale[r] = highest[r] / largest;
    highest[r] = largest;
    FOR_ROW(i, r) s[i / 8][i % 8] *= unit;
  }
}

}  // namespace ifnd::cuda
