// Lloyd's step: rows in order of how many centroids they have to be compared with.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "assign_clusters.h"
#include "parallel.h"

namespace ifnd {
namespace {

constexpr int64_t kRowsPerTask = 4096;

// How far each centroid has moved at most, and the centroids in the order of that, the farthest first.
void order_by_drift(const Reassign& p, int threads, std::vector<float>& drifts, std::vector<int32_t>& order) {
  const int64_t C = p.now.C;
  drifts.resize(size_t(C)), order.resize(size_t(C));
  parallel_for(threads, (C + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    kernels().drifts(p, {task * kRowsPerTask, std::min(C, (task + 1) * kRowsPerTask)}, drifts.data());
  });
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return drifts[size_t(a)] > drifts[size_t(b)]; });
}

// Rows in order of falling `tiles`, those of equal number in their own; rows with none left out. Sorts `tiles` too.
std::vector<int32_t> sort_by_tiles(std::vector<int32_t>& tiles, int64_t most) {
  std::vector<int64_t> place(size_t(most) + 2, 0);
  for (int32_t n : tiles) ++place[size_t(most - n) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  std::vector<int32_t> rows(size_t(place[size_t(most)]), 0), sorted(rows.size(), 0);
  for (size_t i = 0; i < tiles.size(); ++i) {
    if (tiles[i] == 0) continue;
    const size_t at = size_t(place[size_t(most - tiles[i])]++);
    rows[at] = int32_t(i), sorted[at] = tiles[i];
  }
  tiles.swap(sorted);
  return rows;
}

}  // namespace

int64_t reassign(const Reassign& p, int threads) {
  const Kernels& k = kernels();
  const AssignClusters& now = p.now;
  if (k.packed_bytes(now) == 0) return -1;
  Scratch norms(sizeof(float) * size_t(now.C));
  float* half_norms = reinterpret_cast<float*>(norms.at(0));
  half_norms_of(now, threads, half_norms);
  Visits visits{};
  visits.bounds = p.bounds;
  if (!p.previous) return assign_places(now, half_norms, visits, now.N, threads);

  std::vector<float> drifts;
  std::vector<int32_t> order;
  order_by_drift(p, threads, drifts, order);
  const int64_t all = k.packed_tiles(now);
  std::vector<float> beyond(size_t(all) + 1, 0.0f);
  for (int64_t tile = 0; tile < all; ++tile)
    beyond[size_t(tile)] = drifts[size_t(order[size_t(tile * k.tile_centroids(now.D))])];

  const float longest = std::sqrt(2.0f * *std::max_element(half_norms, half_norms + now.C)) * 1.0001f;
  Scratch squares(sizeof(float) * size_t(now.N));
  float* distances = reinterpret_cast<float*>(squares.at(0));
  std::vector<int32_t> tiles(size_t(now.N), 0);
  parallel_for(threads, (now.N + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const Range rows{task * kRowsPerTask, std::min(now.N, (task + 1) * kRowsPerTask)};
    k.tiles_to_visit(p, beyond.data(), all, longest, rows, distances, tiles.data());
  });
  const std::vector<int32_t> rows = sort_by_tiles(tiles, all);
  if (rows.empty()) return 0;
  visits = {order.data(), rows.data(), tiles.data(), distances, beyond.data(), p.bounds};
  return assign_places(now, half_norms, visits, int64_t(rows.size()), threads);
}

}  // namespace ifnd
