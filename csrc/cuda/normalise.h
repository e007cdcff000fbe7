// The two kernels that join the splits of the queue; kernels/info_nce.py derives them.
#pragma once

#include "arguments.h"
#include "number.h"

namespace ifnd::cuda {

// A sum of powers of 2, relative to the largest.
struct Sum {
  double max = -infinity(), sum = 0;
  __device__ void add(double other_max, double other_sum) {
    const double raised = other_max > max ? other_max : max, reference = raised == -infinity() ? 0 : raised;
    sum = sum * exp2(max - reference) + other_sum * exp2(other_max - reference);
    max = raised;
  }
  __device__ void join_lanes() {
    for (int partner = 16; partner; partner /= 2)
      add(__shfl_xor_sync(0xffffffffu, max, partner), __shfl_xor_sync(0xffffffffu, sum, partner));
  }
};
// One warp: loss, log Z_l, |F_l| of a query, and `split_factor`, mean_l e^{m_split - lse_l}. In float64: it is little.
// One block at least: without that ptxas keeps to 96 registers on 12.0 and spills.
__global__ void __launch_bounds__(128, 1) normalise_kernel(NormaliseArguments p) {
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.B) return;
  double s_positive = 0;
  for (int d = lane; d < p.D; d += 32) {
    const long long at = (long long)row * p.D + d;
    s_positive += double(number(p.query, at, p.kind)) * number(p.positive, at, p.kind);
  }
  s_positive = sum_of_lanes(s_positive) * p.scale;
  Sum dense;
  for (int split = lane; split < p.splits; split += 32)
    dense.add(p.split_max[(long long)split * p.B + row], p.split_sum[(long long)split * p.B + row]);
  dense.join_lanes();

  double lse[MAX_LEVELS], loss = 0, weight = 0;
#pragma unroll
  for (int level = 0; level < MAX_LEVELS; ++level) {
    if (level >= p.losses) break;
    Sum own;
    double attracted = 0;
    int members = 0;
    for (int split = lane; p.visited && split < p.splits; split += 32) {
      const long long at = ((long long)split * p.B + row) * p.losses + level;
      members += p.level_count[at];
      if (p.attract)
        attracted += p.level_sum[at];
      else
        own.add(p.level_max[at], p.level_sum[at]);
    }
    own.join_lanes();
    attracted = sum_of_lanes(attracted);
    members = sum_of_lanes(members);
    own.add(dense.max, dense.sum);
    const double rest_max = own.max, rest_sum = own.sum;
    own.add(s_positive, 1);
    const double log_Z = log2(own.sum), rest = rest_sum * exp2(rest_max - own.max);
    lse[level] = own.max + log_Z;
    loss += lse[level] - s_positive;
    weight -= rest / own.sum;
    if (p.attract) {
      loss -= (attracted - members * s_positive) / (1 + members);
      weight += double(members) / (1 + members);
    }
    if (lane == 0) {
      p.log_normalizer[row * p.losses + level] = float(lse[level] * 0.69314718055994530942);
      p.counts[row * p.losses + level] = members;
    }
  }
  if (lane == 0) {
    p.loss[row] = float(loss / p.losses * 0.69314718055994530942);
    p.positive_weight[row] = float(weight / p.losses);
  }
  for (int split = lane; split < p.splits; split += 32) {
    const double m = p.split_max[(long long)split * p.B + row];
    double factor = 0;
#pragma unroll
    for (int level = 0; level < MAX_LEVELS; ++level)
      if (level < p.losses) factor += exp2(m - lse[level]);
    p.split_factor[(long long)split * p.B + row] = float(factor / p.losses);
  }
}

// One thread: a number of the query's gradient, the splits' parts in order.
__global__ void __launch_bounds__(256) add_splits_kernel(NormaliseArguments p) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= (long long)p.B * p.D) return;
  const int row = int(at / p.D), column = int(at % p.D);
  float grad = p.positive_weight[row] * number(p.positive, at, p.kind);
  for (int split = 0; split < p.splits; ++split) {
    const long long of_row = (long long)split * p.B + row;
    const float part = p.split_grad[of_row * p.grad_stride + column];
    grad += p.visited ? part : part * p.split_factor[of_row];
  }
  p.query_grad[at] = grad * p.inverse_temperature;
}

}  // namespace ifnd::cuda
