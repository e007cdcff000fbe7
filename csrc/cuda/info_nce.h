// info_nce on tensor cores: logits, false negatives, log-sum-exps and the query's gradient in one pass over the queue.
// The steps are those of kernels/info_nce.py, whose opening comment derives them; here each is one kernel:
//
// 1. DENSE: one online softmax over the keys in no F_l, and G, the keys' sum by its weights. Flags tiles with false
//    negatives.
// 2. MARKED_SUMS: in flagged tiles, |F_l| and each level's softmax over the keys that are in another level's F alone.
// 3. normalise_kernel: joins the splits of the queue.
// 4. MARKED_GRAD: in flagged tiles, the part of the gradient that those keys have.
// 5. add_splits_kernel. And NEGATIVES: d_k = sum_i g_i (d loss_i / d s_ik) q_i / tau, with keys and queries in exchanged
//    roles.
//
// Levels that are combined make one loss (p.n_losses), whose F is the `marked` pairs themselves.
//
// A warp holds 32 rows' gradient in registers and walks the columns, 32 at a time; a block's warps share the tile. Which
// pairs are false negatives is a word of 32 bits a lane, one for each of its sums. Logits carry a factor log2(e).
// float32 comes as two terms of float16 (csrc/cuda/two_terms.h); so do the weights then.
#pragma once

#include "loss_weights.h"

namespace ifnd::cuda {

// s += rows . columns for 16-bit columns that are staged, all CHUNK of them.
template <class T, int CHUNK>
__device__ __forceinline__ void add_products(TileSums& s, const u16* rows, const u16* columns, int lane) {
  constexpr int STRIDE = CHUNK + PAD;
#pragma unroll (Terms<T>::STORED == 1 ? CHUNK / 16 : 1)
  for (int k = 0; k < CHUNK / 16; ++k) {
    u32 a[8];
    Core::load_a(a, [&](int row) { return rows + row * STRIDE + 16 * k; }, 16, lane);
#pragma unroll
    for (int block = 0; block < TILE_BLOCKS; ++block) {
      u32 b[Core::B_WORDS];
      Core::load_b(b, columns + 8 * block * STRIDE + 16 * k, STRIDE, lane);
      add_product<T>(s[block], [&](float (&sums)[8]) { Core::mma(T(), sums, a, b); });
    }
  }
}

// grad += weights . columns; `load(a, k)` gives the weights of 16 columns, as 16 bits. Of two terms by a loop, else too many
// products are begun for the registers.
template <class T, int CHUNK, int GRAD_BLOCKS, class Load>
__device__ __forceinline__ void add_weighted(float (&grad)[GRAD_BLOCKS][8], Load load, const u16* columns, int lane) {
  constexpr int STRIDE = CHUNK + PAD;
#pragma unroll (Terms<T>::STORED == 1 ? TILE_COLUMNS / 16 : 1)
  for (int k = 0; k < TILE_COLUMNS / 16; ++k) {
    u32 a[8];
    load(a, k);
#pragma unroll
    for (int block = 0; block < GRAD_BLOCKS; ++block) {
      u32 b[Core::B_WORDS];
      Core::load_b_rows(b, columns + 16 * k * STRIDE + 8 * block, STRIDE, lane);
      add_product<T>(grad[block], [&](float (&sums)[8]) { Core::mma_rows(T(), sums, a, b); });
    }
  }
}

// MARKED_SUMS: the block's sums, from shared memory to the split's.
template <class T, int CHUNK>
__device__ __forceinline__ void store_level_sums(const InfoNceArguments& p, const LossShared<T, CHUNK>& shared,
                                                 int count) {
  const int block_row = blockIdx.x * count;
  __syncthreads();
  for (int i = threadIdx.x; i < count * p.n_losses; i += blockDim.x)
    if (block_row + i / p.n_losses < p.rows.count) {
      const long long at = ((long long)blockIdx.y * p.rows.count + block_row) * p.n_losses + i;
      p.level_max[at] = shared.level_max[i];
      p.level_sum[at] = shared.level_sum[i];
      p.level_count[at] = shared.level_count[i];
    }
}

// One row of a lane's part of the gradient.
template <class T, Pass PASS, int GRAD_BLOCKS>
__device__ __forceinline__ void store_grad(const InfoNceArguments& p, const float (&grad)[GRAD_BLOCKS][8], int r,
                                           long long at, float highest, int grad_at, int lane) {
  const float column_unit = Terms<T>::STORED == 1 ? 1.f : *p.columns.largest_unit;
  const float factor = PASS == Pass::MARKED_GRAD ? p.split_factor[at] : 0.f;
  const float unit = PASS == Pass::NEGATIVES ? column_unit * exp2_fast(1 - p.shift) * highest * p.scale * LN2
                                             : column_unit * exp2_fast(-p.shift);
  float* out = PASS == Pass::NEGATIVES ? p.negatives_grad : p.split_grad;
#pragma unroll
  for (int block = 0; block < GRAD_BLOCKS; ++block)
#pragma unroll
    for (int v = 0; v < Core::VALUES; ++v) {
      const int column = grad_at + 8 * block + Core::column(lane, v);
      if (column >= p.grad_columns) continue;
      float g = grad[block][Core::at(r, v)] * unit;
      float& place = out[at * p.grad_columns + column];
      if (PASS == Pass::MARKED_GRAD) g += place * factor;
      place = g;
    }
}

template <class T, int CHUNK, Pass PASS>
__global__ void __launch_bounds__(32 * MAX_LOSS_WARPS, 2) info_nce_kernel(InfoNceArguments p) {
  if constexpr (Supports<T>::value) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    constexpr bool GRAD = PASS != Pass::MARKED_SUMS, SELECTED = PASS == Pass::MARKED_SUMS || PASS == Pass::MARKED_GRAD;
    constexpr int STRIDE = CHUNK + PAD;
    const int count = blockDim.x, block_row = blockIdx.x * count, split = blockIdx.y;  // of rows: a thread for each
    const auto place = [&] { return Place<T, CHUNK>(shared_memory, block_row, p.L, recomputed(threadIdx.x)); };
    constexpr int STORED = Terms<T>::STORED;
    const int chunks = (p.D + CHUNK - 1) / CHUNK, steps = Terms<T>::PRODUCTS * chunks, stride = STORED * p.D;
    const int grad_at = blockIdx.z * CHUNK, first_column = split * p.split_columns;
    const int end = p.columns.count < first_column + p.split_columns ? p.columns.count : first_column + p.split_columns;

    {
      const LossShared<T, CHUNK> shared = place().shared;
      stage_labels(shared.row_labels, shared.row_ids, p.rows, count, block_row, p.rows.count, p.L, -2);
      if (steps == 1) stage<CHUNK>(shared.rows, p.rows, count, block_row, p.rows.count, stride, 0, p.D);
      if (PASS == Pass::MARKED_SUMS)
        for (int i = threadIdx.x; i < count * p.n_losses; i += blockDim.x)
          shared.level_max[i] = -infinity(), shared.level_sum[i] = 0, shared.level_count[i] = 0;
    }

    float grad[GRAD ? CHUNK / 8 : 1][8] = {};
    float highest[Core::ROWS], total[Core::ROWS];
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) highest[r] = PASS == Pass::NEGATIVES ? 0x1p-112f : -infinity(), total[r] = 0;

#pragma unroll 1
    for (int first = first_column; first < end; first += TILE_COLUMNS) {
      const Place<T, CHUNK> here = place();
      const LossShared<T, CHUNK>& shared = here.shared;
      const long long group = here.warp_row / WARP_ROWS;
      unsigned char* flag = p.flags ? p.flags + group * p.tiles + first / TILE_COLUMNS : nullptr;
      bool visit = here.warp_row < p.rows.count;  // the warp has rows; without any it only helps to stage
      if (SELECTED) {
        visit = visit && *flag;
        if (!__syncthreads_or(visit)) continue;
      } else {
        __syncthreads();  // the tile before was read
      }
      stage_labels(shared.column_labels, shared.column_ids, p.columns, TILE_COLUMNS, first, end, p.L, -1);
      if (STORED == 2) stage_units(shared, p.columns, first, end);
      if (PASS == Pass::NEGATIVES) stage_query_factors(p, shared, first, end);

      // 1. Products. Of two terms the first two share the rows' high terms.
      TileSums s = {};
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const Step at = Step::of<CHUNK>(step, p.D);
        if (step > 0) __syncthreads();
        if (steps > 1 && (step == 0 || at.a != Step::of<CHUNK>(step - 1, p.D).a))
          stage<CHUNK>(shared.rows, p.rows, count, block_row, p.rows.count, stride, at.a, at.columns);
        stage<CHUNK>(shared.tile, p.columns, TILE_COLUMNS, first, end, stride, at.b, at.columns);
        __syncthreads();
        if (visit) add_products<T, CHUNK>(s, shared.rows + here.warp * WARP_ROWS * STRIDE, shared.tile, here.own.lane);
      }

      // 2. Weights, in their place.
      if (visit) {
        const Place<T, CHUNK> here = place();
        const Pairs<T, CHUNK> pairs(p, here.shared, here.own, here.warp, first, end);
        multiply_units(pairs, s, here.warp_row);
        float rescale[Core::ROWS];
        if constexpr (PASS == Pass::DENSE) {
          const bool any = __any_sync(0xffffffffu, pairs.marked != 0);
          if (flag && here.own.lane == 0) *flag = any;
          dense_weights(pairs, s, p.scale, highest, total, rescale);
          if (p.with_grad) multiply_rows(grad, rescale);
        } else if constexpr (PASS == Pass::MARKED_SUMS) {
          add_marked(pairs, s, p.scale);
        } else if constexpr (PASS == Pass::MARKED_GRAD) {
          marked_grad_weights(pairs, s, p.scale, here.warp_row);
        } else {
          negatives_weights(pairs, s, p.scale, here.warp_row, highest, rescale);
          multiply_rows(grad, rescale);
        }
        if (PASS == Pass::DENSE || PASS == Pass::MARKED_GRAD) multiply_shares(pairs, s);
        if (GRAD && STORED == 2 && p.with_grad) keep_terms<T>(here.weight_terms(), s, here.own.lane);
      }

      // 3. The weighted sum of the columns' features.
      if constexpr (GRAD) {
        if (!p.with_grad) continue;
#pragma unroll 1
        for (int term = STORED - 1; term >= 0; --term) {
          if (steps > 1) {
            __syncthreads();
            stage<CHUNK>(shared.tile, p.columns, TILE_COLUMNS, first, end, stride, term * p.D + grad_at, p.D - grad_at);
            __syncthreads();
          }
          if (!visit) continue;
#pragma unroll 1
          for (int weight_term = 0; weight_term < STORED - term; ++weight_term)
            add_weighted<T, CHUNK>(
                grad,
                [&](u32(&a)[8], int k) {
                  if (STORED == 1)
                    Core::as_a(T(), a, s[2 * k], s[2 * k + 1], here.own.lane);
                  else
                    load_term(a, here.weight_terms(), 2 * k + weight_term, here.own.lane);
                },
                shared.tile, here.own.lane);
        }
      }
    }

    // 4. What the split's rows have come to.
    const Place<T, CHUNK> here = place();
    if (PASS == Pass::MARKED_SUMS) store_level_sums(p, here.shared, count);
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) {
      const int row = here.warp_row + Core::row(here.own.lane, r), lane = here.own.lane;
      const long long at = (long long)split * p.rows.count + row;
      if (PASS == Pass::DENSE) {
        const float sum = sum_of_row(total[r]) * exp2_fast(-p.shift);
        if (row < p.rows.count && blockIdx.z == 0 && (lane & (4 - Core::FIRST_PARTNER)) == 0)
          p.split_max[at] = highest[r], p.split_sum[at] = sum;
      }
      if (GRAD && p.with_grad && row < p.rows.count) store_grad<T, PASS>(p, grad, r, at, highest[r], grad_at, lane);
    }
  }
}

}  // namespace ifnd::cuda
