// What Lloyd's algorithm needs of every cluster: the sum of its rows, and their squared distances to its centroid.
//
// Rows come in the order of their clusters, as a stable sort of the labels gives it: sums are in that order, with no
// atomics. A large cluster is split over blocks, whose parts are added afterwards.
#pragma once

#include "arguments.h"
#include "number.h"

namespace ifnd::cuda {

constexpr int SUMS_WARPS = 8, SUMS_COLUMNS = 32;

// One block: 32 columns of one part of one cluster. A lane has one column, a warp every eighth row.
__global__ void __launch_bounds__(32 * SUMS_WARPS) cluster_sums_kernel(ClusterSumsArguments p) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  double* parts = (double*)shared_memory;  // (SUMS_WARPS, SUMS_COLUMNS)
  const int cluster = blockIdx.x, part = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.y * SUMS_COLUMNS + lane;
  const long long begin = p.begins[cluster], size = p.begins[cluster + 1] - begin;
  const long long last = begin + size * (part + 1) / p.parts;
  double sum = 0;
  if (column < p.D)
    for (long long i = begin + size * part / p.parts + warp; i < last; i += SUMS_WARPS)
      sum += number(p.features, p.order[i] * p.D + column, p.kind);
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= p.D) return;
  for (int w = 1; w < SUMS_WARPS; ++w) sum += parts[w * SUMS_COLUMNS + lane];
  p.sums[((long long)part * p.C + cluster) * p.D + column] = sum;
}

// One warp: |x_i - c_label|^2 of one row, from the differences themselves; NaN where the label is no cluster's.
__global__ void __launch_bounds__(32 * SUMS_WARPS) distances_kernel(ClusterSumsArguments p) {
  const int row = blockIdx.x * SUMS_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.N) return;
  const int label = p.labels[row];
  const bool known = label >= 0 && label < p.C;
  float sum = 0;
  for (int column = lane; known && column < p.D; column += 32) {
    const float difference = number(p.features, (long long)row * p.D + column, p.kind) -
                             p.centroids[(long long)label * p.D + column];
    sum = fmaf(difference, difference, sum);
  }
  sum = sum_of_lanes(sum);
  if (lane == 0) p.distances[row] = known ? sum : infinity() - infinity();
}

}  // namespace ifnd::cuda
