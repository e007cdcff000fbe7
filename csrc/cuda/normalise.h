// The two kernels that join the splits of the queue; kernels/info_nce.py derives them.
#pragma once

#include "arguments.h"
#include "number.h"

namespace ifnd::cuda {

// Sums of powers of 2, each relative to its own maximum, as one: relative to the largest, in float64.
struct Sum {
  float max = -infinity();  // without the scale
  double sum = 0;

  // By one warp; number i at `at + i * stride`.
  __device__ __forceinline__ Sum(const float* maxima, const float* sums, long long at, long long stride, int count,
                                 float scale, int lane) {
    for (int i = lane; i < count; i += 32) max = fmaxf(max, maxima[at + i * stride]);
    max = max_of_lanes(max);
    const float reference = max == -infinity() ? 0.f : max;
    for (int i = lane; i < count; i += 32)
      sum += sums[at + i * stride] * exp2_fast((maxima[at + i * stride] - reference) * scale);
    sum = sum_of_lanes(sum);
  }
};

// One warp: loss, log Z_l, |F_l| of a query, splits side by side; what is left, which is little, in float64.
// `split_factor` is mean_l e^{m_split - lse_l} = e^{m_split - m} mean_l e^{m - lse_l}, m the largest.
__global__ void __launch_bounds__(128) normalise_kernel(NormaliseArguments p) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.B) return;
  double s_positive = 0;
  for (int d = lane; d < p.D; d += 32) {
    const long long at = (long long)row * p.D + d;
    s_positive += double(number(p.query, at, p.kind)) * number(p.positive, at, p.kind);
  }
  s_positive = sum_of_lanes(s_positive) * p.scale;
  const Sum dense(p.split_max, p.split_sum, row, p.B, p.splits, p.scale, lane);
  const double dense_max = double(dense.max) * p.scale;

  double loss = 0, weight = 0, factor = 0;
#pragma unroll 1
  for (int level = 0; level < p.n_losses; ++level) {
    const long long at = (long long)row * p.n_losses + level, stride = (long long)p.B * p.n_losses;
    int members = 0;
    for (int split = lane; p.has_marked_pass && split < p.splits; split += 32) members += p.level_count[at + split * stride];
    members = sum_of_lanes(members);
    double M = dense_max > s_positive ? dense_max : s_positive, rest;
    if (p.has_marked_pass && !p.attract) {
      const Sum own(p.level_max, p.level_sum, at, stride, p.splits, p.scale, lane);
      const double own_max = double(own.max) * p.scale;
      M = own_max > M ? own_max : M;
      rest = dense.sum * exp2(dense_max - M) + own.sum * exp2(own_max - M);
    } else {
      rest = dense.sum * exp2(dense_max - M);
    }
    const double Z = rest + exp2(s_positive - M), lse = M + log2(Z);
    loss += lse - s_positive;
    weight -= rest / Z;  // e^{s+ - lse} - 1
    factor += exp2(dense_max - M) / Z;
    if (p.attract) {
      double attracted = 0;
      for (int split = lane; p.has_marked_pass && split < p.splits; split += 32) attracted += p.level_sum[at + split * stride];
      loss -= (sum_of_lanes(attracted) * p.scale - members * s_positive) / (1 + members);
      weight += double(members) / (1 + members);
    }
    if (lane == 0) {
      p.log_normalizer[at] = float(lse * 0.69314718055994530942);
      p.false_negative_counts[at] = members;
    }
  }
  if (lane == 0) {
    p.loss[row] = float(loss / p.n_losses * 0.69314718055994530942);
    p.positive_weight[row] = float(weight / p.n_losses);
  }
  const float of_row = float(factor / p.n_losses), reference = dense.max == -infinity() ? 0.f : dense.max;
  for (int split = lane; split < p.splits; split += 32) {
    const long long at = (long long)split * p.B + row;
    p.split_factor[at] = exp2_fast((p.split_max[at] - reference) * p.scale) * of_row;
  }
}

// One block: 32 numbers of the query's gradient, of which each warp adds up every eighth split's part.
constexpr int ADD_WARPS = 8;
__global__ void __launch_bounds__(32 * ADD_WARPS) add_splits_kernel(NormaliseArguments p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  float* parts = (float*)shared_memory;  // (ADD_WARPS, 32)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long at = (long long)blockIdx.x * 32 + lane;
  const bool inside = at < (long long)p.B * p.D;
  const int row = inside ? int(at / p.D) : 0, column = inside ? int(at % p.D) : 0;
  float grad = 0;
#pragma unroll 4
  for (int split = warp; split < p.splits; split += ADD_WARPS) {
    const long long of_row = (long long)split * p.B + row;
    const float part = p.split_grad[of_row * p.D + column];
    grad += p.has_marked_pass ? part : part * p.split_factor[of_row];
  }
  parts[threadIdx.x] = grad;
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int w = 1; w < ADD_WARPS; ++w) grad += parts[32 * w + lane];
  grad += p.positive_weight[row] * number(p.positive, at, p.kind);
  p.query_grad[at] = grad * p.inverse_temperature;
}

}  // namespace ifnd::cuda
