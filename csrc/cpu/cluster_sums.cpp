// Lloyd's update: rows ordered by cluster (a counting sort), clusters over threads. A cluster's rows are added in their
// own order by one thread, so the result does not depend on how many there are.
#include <algorithm>
#include <vector>

#include "api.h"
#include "parallel.h"

namespace ifnd {
namespace {
constexpr int kTasksPerThread = 8;  // evens out clusters of different sizes
}

bool cluster_sums(const ClusterSums& p, int threads) {
  std::vector<int64_t> first(size_t(p.C) + 1, 0);  // place of each cluster's first row in the order
  for (int64_t i = 0; i < p.N; ++i) {
    if (p.labels[i] < 0 || p.labels[i] >= p.C) return false;
    ++first[size_t(p.labels[i]) + 1];
  }
  for (int64_t j = 0; j < p.C; ++j) {
    p.counts[j] = first[size_t(j) + 1];
    first[size_t(j) + 1] += first[size_t(j)];
  }
  std::vector<int64_t> order(size_t(p.N), 0), next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < p.N; ++i) order[size_t(next[size_t(p.labels[i])]++)] = i;

  const Kernels& k = kernels();
  const int64_t tasks = std::min<int64_t>(p.C, int64_t(threads) * kTasksPerThread);
  // The clusters of a task: about as many rows and clusters as any other's.
  const auto cluster_at = [&](int64_t task) {
    const int64_t target = (p.N + p.C) * task / tasks;
    int64_t low = 0, high = p.C;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (first[size_t(middle)] + middle < target) low = middle + 1; else high = middle;
    }
    return low;
  };
  parallel_for(threads, tasks, [&](int64_t task) {
    for (int64_t j = cluster_at(task); j < cluster_at(task + 1); ++j)
      k.sum_cluster(p, j, order.data() + first[size_t(j)], p.counts[j]);
  });
  return true;
}

}  // namespace ifnd
