// Splits the assignment over threads, by rows. Memory: a group of rows per thread, never N x C; where there is
// screening also the centroids in 8 bits, which all threads share.
#include "assign_clusters.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace ifnd {
namespace {
constexpr int64_t kGroupBytes = 256 * 1024;  // of a thread's features: a quarter of a second-level cache,
constexpr int64_t kMinPanels = 8;            // but enough of them to be worth packing a tile of centroids for
constexpr int64_t kNormsPerTask = 1024;

void pack(const AssignClusters& p, const float* half_norms, const Visits& visits, int threads, char* packed) {
  const Kernels& k = kernels();
  k.pack_centroids(p, half_norms, visits.order, -1, packed);
  const int64_t tiles = visits.tiles ? visits.tiles[0] : k.packed_tiles(p);
  parallel_for(threads, tiles, [&](int64_t tile) { k.pack_centroids(p, half_norms, visits.order, tile, packed); });
}
}  // namespace

void half_norms_of(const AssignClusters& p, int threads, float* half_norms) {
  parallel_for(threads, (p.C + kNormsPerTask - 1) / kNormsPerTask, [&](int64_t task) {
    kernels().half_norms(p, {task * kNormsPerTask, std::min(p.C, (task + 1) * kNormsPerTask)}, half_norms);
  });
}

int64_t assign_places(const AssignClusters& p, const float* half_norms, const Visits& visits, int64_t n, int threads) {
  const Kernels& k = kernels();
  const size_t packed_bytes = k.packed_bytes(p);
  Scratch packed(std::max<size_t>(packed_bytes, 1));
  if (packed_bytes > 0) pack(p, half_norms, visits, threads, packed.at(0));

  const int64_t panels = (n + k.lanes - 1) / k.lanes;
  const int64_t most = std::max<int64_t>(kMinPanels, kGroupBytes / (int64_t(sizeof(float)) * p.D * k.lanes));
  const int tasks = int(std::min<int64_t>(threads, panels));
  const int64_t group = std::min(most, (panels + tasks - 1) / tasks) * k.lanes, groups = (n + group - 1) / group;
  const size_t bytes = k.assign_bytes(p, group);
  Scratch scratch(bytes * size_t(tasks));
  std::vector<int64_t> in_vain(size_t(tasks), 0);
  parallel_for(threads, tasks, [&](int64_t t) {
    const void* screen = packed_bytes > 0 ? packed.at(0) : nullptr;
    for (int64_t at = t; at < groups; at += tasks) {  // in turn: later places may be visited less
      const Range places{at * group, std::min(n, (at + 1) * group)};
      const int64_t failed = k.assign_rows(p, half_norms, visits, screen, places, scratch.at(bytes * size_t(t)));
      in_vain[size_t(t)] += failed;
      // Changes the speed, never a label; but what keeps bounds has to go on.
      if (!visits.bounds && 2 * failed > places.end - places.begin) screen = nullptr;
    }
  });
  return std::accumulate(in_vain.begin(), in_vain.end(), int64_t(0));
}

void assign_clusters(const AssignClusters& p, int threads) {
  const bool l2 = p.metric == Metric::l2;
  Scratch norms(l2 ? sizeof(float) * size_t(p.C) : 1);
  float* half_norms = l2 ? reinterpret_cast<float*>(norms.at(0)) : nullptr;
  if (l2) half_norms_of(p, threads, half_norms);
  assign_places(p, half_norms, Visits{}, p.N, threads);
}

}  // namespace ifnd
