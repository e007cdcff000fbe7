// Splits the assignment over threads, by rows. Memory: a group of rows per thread, never N x C.
#include <algorithm>

#include "api.h"
#include "memory.h"
#include "parallel.h"

namespace ifnd {
namespace {
constexpr int64_t kGroupBytes = 256 * 1024;  // of a thread's features: a quarter of a second-level cache,
constexpr int64_t kMinPanels = 8;            // but enough of them to be worth packing a tile of centroids for
constexpr int64_t kNormsPerTask = 1024;
}  // namespace

void assign_clusters(const AssignClusters& p, int threads) {
  const Kernels& k = kernels();
  const bool l2 = p.metric == Metric::l2;
  Scratch norms(l2 ? sizeof(float) * size_t(p.C) : 1);
  float* half_norms = l2 ? reinterpret_cast<float*>(norms.at(0)) : nullptr;
  if (l2)
    parallel_for(threads, (p.C + kNormsPerTask - 1) / kNormsPerTask, [&](int64_t task) {
      k.half_norms(p, {task * kNormsPerTask, std::min(p.C, (task + 1) * kNormsPerTask)}, half_norms);
    });

  const int64_t panels = (p.N + k.lanes - 1) / k.lanes;
  const int64_t most = std::max<int64_t>(kMinPanels, kGroupBytes / (int64_t(sizeof(float)) * p.D * k.lanes));
  const int tasks = int(std::min<int64_t>(threads, panels));
  const int64_t group = std::min(most, (panels + tasks - 1) / tasks) * k.lanes;
  const size_t bytes = k.assign_bytes(p, group);
  Scratch scratch(bytes * size_t(tasks));
  parallel_for(threads, tasks, [&](int64_t t) {
    const int64_t begin = panels * t / tasks * k.lanes, end = std::min(p.N, panels * (t + 1) / tasks * k.lanes);
    bool screen = true;  // changes the speed, never a label
    for (int64_t row = begin; row < end; row += group) {
      const Range rows{row, std::min(end, row + group)};
      const int64_t in_vain = k.assign_rows(p, half_norms, rows, screen, scratch.at(bytes * size_t(t)));
      screen = screen && 2 * in_vain <= rows.end - rows.begin;
    }
  });
}

}  // namespace ifnd
