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
// Levels that are combined make one loss (p.losses), whose F is the `marked` pairs themselves.
//
// A warp holds 32 rows' gradient in registers and walks the columns, 32 at a time; a block's warps share the tile. Which
// pairs are false negatives is a word of 32 bits a lane, one for each of its sums. Logits carry a factor log2(e).
// float32 comes as two terms of 16 bits (csrc/cuda/assign.h); so do the weights then.
#pragma once

#include "loss_tile.h"

namespace ifnd::cuda {

template <class T, int CHUNK, Pass PASS>
__global__ void __launch_bounds__(32 * MAX_LOSS_WARPS, 2) info_nce_kernel(InfoNceArguments p) {
  if constexpr (Supports<T>::value) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    constexpr bool GRAD = PASS != Pass::MARKED_SUMS;
    constexpr int STRIDE = CHUNK + PAD, GRAD_BLOCKS = GRAD ? CHUNK / 8 : 1;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    const Lane own{(int)threadIdx.x % 32};
    const int lane = own.lane, count = WARP_ROWS * warps;
    const LossShared<CHUNK> shared(shared_memory, warps, p.L);
    const int block_row = blockIdx.x * count, warp_row = block_row + warp * WARP_ROWS, split = blockIdx.y;
    const int chunks = (p.D + CHUNK - 1) / CHUNK, steps = p.terms * chunks, stride = p.stored_terms * p.D;
    const int grad_at = blockIdx.z * CHUNK, grad_columns = p.D - grad_at;
    const int first_column = split * p.split_columns;
    const int end = p.columns.count < first_column + p.split_columns ? p.columns.count : first_column + p.split_columns;
    const float product_unit = p.unit ? *p.unit : 1.f, scale = p.scale * product_unit;
    const u16* own_rows = shared.rows + warp * WARP_ROWS * STRIDE;
    const int* own_labels = shared.row_labels + warp * WARP_ROWS;
    const bool active = warp_row < p.rows.count;  // the warp has rows; without any it only helps to stage

    stage_labels(shared.row_labels, shared.row_ids, p.rows, count, block_row, p.rows.count, p.L, -2);
    if (steps == 1) stage<CHUNK>(shared.rows, p.rows, count, block_row, p.rows.count, stride, 0, p.D);
    if (PASS == Pass::MARKED_SUMS)
      for (int i = threadIdx.x; i < count * p.losses; i += blockDim.x)
        shared.level_max[i] = -infinity(), shared.level_sum[i] = 0, shared.level_count[i] = 0;

    float grad[GRAD_BLOCKS][8] = {};
    float highest[Core::ROWS], total[Core::ROWS];
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) highest[r] = PASS == Pass::NEGATIVES ? 0x1p-112f : -infinity(), total[r] = 0;

#pragma unroll 1
    for (int first = first_column; first < end; first += TILE_COLUMNS) {
      const int tile = first / TILE_COLUMNS;
      bool visit = active;
      if (PASS == Pass::MARKED_SUMS || PASS == Pass::MARKED_GRAD) {
        visit = active && p.flags[(long long)(warp_row / WARP_ROWS) * p.tiles + tile];
        if (!__syncthreads_or(visit)) continue;
      } else {
        __syncthreads();  // the tile before was read
      }
      stage_labels(shared.column_labels, shared.column_ids, p.columns, TILE_COLUMNS, first, end, p.L, -1);
      if (PASS == Pass::NEGATIVES && threadIdx.x < TILE_COLUMNS) {
        const int i = first + threadIdx.x;
        const float* lse = p.log_normalizer + (long long)i * p.losses;
        float least = infinity(), mean = 0;
        for (int loss = 0; i < end && loss < p.losses; ++loss) least = fminf(least, lse[loss]);
        for (int loss = 0; i < end && loss < p.losses; ++loss) mean += exp2_fast((least - lse[loss]) * LOG2E);
        shared.column_shift[threadIdx.x] = i < end ? least * LOG2E : 0.f;
        shared.column_factor[threadIdx.x] = i < end ? p.loss_grad[i] * mean / p.losses : 0.f;
      }

      // 1. Logits.
      float s[TILE_BLOCKS][8] = {};
      for (int step = 0; step < steps; ++step) {
        const Step at = Step::of<CHUNK>(step, p.D);
        if (step > 0) __syncthreads();
        if (steps > 1) stage<CHUNK>(shared.rows, p.rows, count, block_row, p.rows.count, stride, at.a, at.columns);
        stage<CHUNK>(shared.tile, p.columns, TILE_COLUMNS, first, end, stride, at.b, at.columns);
        __syncthreads();
        if (visit)
#pragma unroll
          for (int k = 0; k < CHUNK / 16; ++k) {
            u32 a[8];
            Core::load_a(a, [&](int row) { return own_rows + row * STRIDE + 16 * k; }, 16, lane);
#pragma unroll
            for (int block = 0; block < TILE_BLOCKS; ++block) {
              u32 b[Core::B_WORDS];
              Core::load_b(b, shared.tile + 8 * block * STRIDE + 16 * k, STRIDE, lane);
              Core::mma(T(), s[block], a, b);
            }
          }
      }

      // 2. Which pairs are of one image or past the end (`excluded`), and which are false negatives at some level.
      u32 excluded = 0, marked = 0;
      if (visit) {
        const auto level_pairs = [&](int level) {
          const int *of_rows = own_labels + level * count, *of_columns = shared.column_labels + level * TILE_COLUMNS;
          return own.pairs([&](int row) { return of_rows[row]; }, [&](int column) { return of_columns[column]; });
        };
        if (p.rows.ids)
          excluded = own.pairs([&](int row) { return shared.row_ids[warp * WARP_ROWS + row]; },
                               [&](int column) { return shared.column_ids[column]; });
        if (first + TILE_COLUMNS > end)
          excluded |= own.pairs([](int) { return true; }, [&](int column) { return first + column >= end; });
        if (p.L) marked = level_pairs(0);
        for (int level = 1; level < p.L; ++level) {
          const u32 here = level_pairs(level);
          marked = p.all_levels ? marked & here : marked | here;
        }
        marked &= ~excluded;
        const auto loss_pairs = [&](int loss) { return p.losses == 1 ? marked : level_pairs(loss) & marked; };

        // 3. Weights, in the place of the products. Exponents are differences of products, times the scale: these are
        // exact where it matters, and differences of large logits are not.
        if constexpr (PASS == Pass::DENSE) {
          const bool flag = __any_sync(0xffffffffu, marked != 0);
          if (p.flags && lane == 0) p.flags[(long long)(warp_row / WARP_ROWS) * p.tiles + tile] = flag;
          const u32 out = p.attract ? excluded : excluded | marked;
          float rescale[Core::ROWS];
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
              s[i / 8][i % 8] = exp2_fast(fmaf(s[i / 8][i % 8] - reference, scale, p.shift));
              added += s[i / 8][i % 8];
            }
            total[r] = total[r] * rescale[r] + added;
          }
          if (p.with_grad) multiply_rows(grad, rescale);
        } else if constexpr (PASS == Pass::MARKED_SUMS) {
          for (int loss = 0; loss < p.losses; ++loss) {
            const u32 here = loss_pairs(loss), kept = marked & ~here;
#pragma unroll
            for (int r = 0; r < Core::ROWS; ++r) {
              const int at = (warp * WARP_ROWS + Core::row(lane, r)) * p.losses + loss;
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
                shared.level_count[at] += members;
                const float rescale = p.attract ? 1.f : exp2_fast((before - reference) * scale);
                shared.level_sum[at] = shared.level_sum[at] * rescale + sum;
                shared.level_max[at] = raised;
              }
            }
            __syncwarp();
          }
        } else {
          // mean_l [k not in F_l] e^{s - lse_l}, less mean_l [k in F_l] / (1 + |F_l|) where these attract. In the dense
          // part of NEGATIVES the mean is one exponential: e^{s - a} mean_l e^{a - lse_l}, a = min_l lse_l. Rounded, a
          // large lse_l may be below s: no exponential is more than 1.
#pragma unroll
          for (int block = 0; block < TILE_BLOCKS; ++block)
#pragma unroll
            for (int i = 0; i < 8; ++i) s[block][i] *= scale;
          const auto exponential = [&](int i, float lse) { return exp2_fast(fminf(s[i / 8][i % 8] - lse, 0.f)); };
          float weights[TILE_BLOCKS][8] = {};
          for (int loss = 0; marked && loss < p.losses; ++loss) {
            const u32 here = loss_pairs(loss);
#pragma unroll
            for (int r = 0; r < Core::ROWS; ++r) FOR_ROW(i, r) {
              if (!(marked >> i & 1)) continue;
              const int row = warp_row + Core::row(lane, r), column = first + own.column(block_, v_);
              const int at = (PASS == Pass::NEGATIVES ? column : row) * p.losses + loss;
              float& w = weights[i / 8][i % 8];
              const bool inside = here >> i & 1;
              if (PASS == Pass::NEGATIVES ? p.attract || !inside : !p.attract && !inside)
                w += exponential(i, p.log_normalizer[at] * LOG2E);
              if (p.attract && inside) w -= 1.f / (1 + p.counts[at]);
            }
          }
          if constexpr (PASS == Pass::MARKED_GRAD) {
            const float unit = exp2_fast(p.shift) / p.losses;
#pragma unroll
            for (int block = 0; block < TILE_BLOCKS; ++block)
#pragma unroll
              for (int i = 0; i < 8; ++i) s[block][i] = weights[block][i] * unit;
          } else {
            // A key may be far from every query: its weights are relative to `highest`, a power of 2, of which
            // the largest so far is 1 to 2 times.
            float rescale[Core::ROWS];
#pragma unroll
            for (int r = 0; r < Core::ROWS; ++r) {
              float raised = 0;
              FOR_ROW(i, r) {
                const int column = own.column(block_, v_);
                float w = exponential(i, shared.column_shift[column]) * shared.column_factor[column];
                if (marked >> i & 1) w = weights[i / 8][i % 8] * p.loss_grad[first + column] / p.losses;
                if (excluded >> i & 1) w = 0;
                s[i / 8][i % 8] = w;
                raised = fmaxf(raised, fabsf(w));
              }
              const float power = __int_as_float(__float_as_int(max_of_row(raised)) & 0x7f800000);
              const float largest = fmaxf(highest[r], power), unit = exp2_fast(p.shift - 1) / largest;
              rescale[r] = highest[r] / largest;
              highest[r] = largest;
              FOR_ROW(i, r) s[i / 8][i % 8] *= unit;
            }
            multiply_rows(grad, rescale);
          }
        }
      }

      // 4. The weighted sum of the columns' features.
      if constexpr (GRAD) {
        if (!p.with_grad) continue;
        for (int term = 0; term < (p.terms == 1 ? 1 : 2); ++term) {
          if (steps > 1) {
            __syncthreads();
            stage<CHUNK>(shared.tile, p.columns, TILE_COLUMNS, first, end, stride, term * p.D + grad_at, grad_columns);
            __syncthreads();
          }
          if (!visit) continue;
          for (int weight_term = 0; weight_term < (p.terms == 1 ? 1 : 2 - term); ++weight_term)
#pragma unroll
            for (int k = 0; k < TILE_COLUMNS / 16; ++k) {
              u32 a[8];
              if (weight_term == 0) {
                Core::as_a(T(), a, s[2 * k], s[2 * k + 1], lane);
              } else {  // what the first term leaves
                float left[8], right[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                  left[i] = s[2 * k][i] - unpack(T(), (u16)pack(T(), s[2 * k][i], 0));
                  right[i] = s[2 * k + 1][i] - unpack(T(), (u16)pack(T(), s[2 * k + 1][i], 0));
                }
                Core::as_a(T(), a, left, right, lane);
              }
#pragma unroll
              for (int block = 0; block < GRAD_BLOCKS; ++block) {
                u32 b[Core::B_WORDS];
                Core::load_b_rows(b, shared.tile + 16 * k * STRIDE + 8 * block, STRIDE, lane);
                Core::mma_rows(T(), grad[block], a, b);
              }
            }
        }
      }
    }

    // 5. What the split's rows have come to.
    if (PASS == Pass::MARKED_SUMS) {
      __syncthreads();
      for (int i = threadIdx.x; i < count * p.losses; i += blockDim.x)
        if (block_row + i / p.losses < p.rows.count) {
          const long long at = ((long long)split * p.rows.count + block_row) * p.losses + i;
          p.level_max[at] = shared.level_max[i] * product_unit;
          p.level_sum[at] = p.attract ? shared.level_sum[i] * product_unit : shared.level_sum[i];
          p.level_count[at] = shared.level_count[i];
        }
    }
    const float column_unit = p.column_unit ? *p.column_unit : 1.f;
#pragma unroll
    for (int r = 0; r < Core::ROWS; ++r) {
      const int row = warp_row + Core::row(lane, r);
      const long long at = (long long)split * p.rows.count + row;
      if (PASS == Pass::DENSE) {
        const float sum = sum_of_row(total[r]);
        if (row < p.rows.count && blockIdx.z == 0 && (lane & (4 - Core::FIRST_PARTNER)) == 0)
          p.split_max[at] = highest[r] * product_unit, p.split_sum[at] = sum * exp2_fast(-p.shift);
      }
      if (!GRAD || !p.with_grad || row >= p.rows.count) continue;
      const float factor = PASS == Pass::MARKED_GRAD ? p.split_factor[at] : 0.f;
      const float unit = PASS == Pass::NEGATIVES ? column_unit * exp2_fast(1 - p.shift) * highest[r] * p.scale * LN2
                                                 : column_unit * exp2_fast(-p.shift);
      float* out = PASS == Pass::NEGATIVES ? p.negatives_grad : p.split_grad;
#pragma unroll
      for (int block = 0; block < GRAD_BLOCKS; ++block)
#pragma unroll
        for (int v = 0; v < Core::VALUES; ++v) {
          const int column = grad_at + 8 * block + Core::column(lane, v);
          if (column >= p.D) continue;
          float g = grad[block][Core::at(r, v)] * unit;
          float& place = out[at * p.D + column];
          if (PASS == Pass::MARKED_GRAD) g += place * factor;
          place = g;
        }
    }
  }
}

}  // namespace ifnd::cuda
