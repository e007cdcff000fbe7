// cluster_sums: what Lloyd's update needs, of the rows of one cluster after the other.
//   sum = sum_i x_i (in double),  distance_i = |x_i - c|^2 from the differences themselves: exactly 0 for equal rows
#pragma once

#include "tile.h"

IFND_BEGIN

constexpr int kRowsAhead = 4;  // rows lie anywhere in memory, and each is known that long before its turn

IFND_INLINE void prefetch_row(const ClusterSums& p, int64_t row) {
  const ptrdiff_t bytes = ptrdiff_t(p.D) * (p.dtype == DType::float32 ? 4 : 2);
  const char* x = static_cast<const char*>(p.features) + row * bytes;
  for (ptrdiff_t at = 0; at < bytes; at += 64) __builtin_prefetch(x + at);
}

// Rows `rows[0..n)`, in this order; all of them, and no others, are of this cluster.
static void sum_cluster(const ClusterSums& p, int64_t cluster, const int64_t* rows, int64_t n) {
  const int columns = int(round_up<W>(p.D));
  float x[kMaxDim + W], centroid[kMaxDim + W];
  for (int d = p.D; d < columns; ++d) x[d] = centroid[d] = 0.0f;
  double* sums = p.sums + cluster * p.D;
  memset(sums, 0, sizeof(double) * size_t(p.D));
  convert_row(p.centroids, DType::float32, cluster, p.D, centroid);
  for (int64_t i = 0; i < n; ++i) {
    if (i + kRowsAhead < n) prefetch_row(p, rows[i + kRowsAhead]);
    convert_row(p.features, p.dtype, rows[i], p.D, x);
    for (int d = 0; d < p.D; ++d) sums[d] += x[d];
    vfloat squares = {};
    for (int d = 0; d < columns; d += W) {
      const vfloat difference = load(x + d) - load(centroid + d);
      squares += difference * difference;
    }
    p.distances[rows[i]] = sum(squares);
  }
}

IFND_END
