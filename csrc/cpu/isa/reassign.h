// What Lloyd's step can leave out: exactly, whatever the rounding.
//
// A row's `bound` is less than its distance to every centroid but its own. When these move by drift_j, the distance
// to centroid j stays above bound - drift_j (Hamerly, 2010, who takes the largest drift for all j). So with the
// centroids in order of falling drift, a row has to be compared with the first few of them alone: those of
//     drift_j >= bound - |x - own centroid|.
#pragma once

#include "tile.h"

IFND_BEGIN

constexpr float kNearlyAll = 0.8f;  // of the tiles: then all of them, which renews the bound

// The bound once centroids have moved by as much.
IFND_INLINE float moved_closer(float bound, float drift) {
  return drift > 0.0f ? (bound - drift) * 0.9999998f : bound;  // rounded down
}

IFND_INLINE float squared_distance(const float* x, const float* y, int D) {
  const int whole = D / W * W;
  vfloat squares = {};
  for (int d = 0; d < whole; d += W) {
    const vfloat difference = load(x + d) - load(y + d);
    squares += difference * difference;
  }
  float total = sum(squares);
  for (int d = whole; d < D; ++d) total += (x[d] - y[d]) * (x[d] - y[d]);
  return total;
}

static void drifts(const Reassign& p, Range centroids, float* out) {
  const float* now = static_cast<const float*>(p.now.centroids);
  const float up = 1.0f + 2.4e-7f * float(p.now.D + 8);
  for (int64_t j = centroids.begin; j < centroids.end; ++j) {
    const ptrdiff_t at = ptrdiff_t(j) * p.now.D;
    // As in screen_pack.h: 1e-18 is more than what squares may have lost.
    const bool same = memcmp(now + at, p.previous + at, sizeof(float) * size_t(p.now.D)) == 0;
    const float moved = same ? 0.0f : sqrtf(squared_distance(now + at, p.previous + at, p.now.D)) * up + 1e-18f;
    out[j] = moved == moved ? moved : INFINITY;
  }
}

static void tiles_to_visit(const Reassign& p, const float* beyond, int64_t tiles, float longest, Range rows,
                           float* distances, int32_t* tiles_of_rows) {
  const float sums = 2.4e-7f * float(p.now.D + 8);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t label = p.now.labels[i];
    if (label < 0 || label >= p.now.C) {
      distances[i] = INFINITY, tiles_of_rows[i] = int32_t(tiles);
      continue;
    }
    const float* x = static_cast<const float*>(p.now.features) + i * p.now.D;
    const float* own = static_cast<const float*>(p.now.centroids) + label * p.now.D;
    const float squares = squared_distance(x, own, p.now.D);
    distances[i] = squares;
    // Scores are off by sums |x| |c| + half norms' rounding at most, and decide by twice their difference.
    const float length = sqrtf(squares) + longest;
    const float rounding = 4.0f * sums * length * longest + 1e-36f;
    const float slack = p.bounds[i] - sqrtf(squares * (1.0f + sums) + rounding) * 1.000001f;
    int64_t low = 0, high = tiles;  // the first tile that can be left out
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (beyond[middle] < slack) high = middle; else low = middle + 1;
    }
    tiles_of_rows[i] = int32_t(float(low) > kNearlyAll * float(tiles) ? tiles : low);
    if (low == 0) p.bounds[i] = moved_closer(p.bounds[i], beyond[0]);
  }
}

IFND_END
