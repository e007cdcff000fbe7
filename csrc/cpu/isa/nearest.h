// assign_clusters: the nearest centroid of every feature and its softmax probability, streaming the centroids.
//   s_j = x.c_j (- |c_j|^2 / 2 for l2),  label = argmax_j s_j,  confidence = 1 / sum_j e^{(s_j - s_label) / tau}
// A similarity that is not a number is never the nearest, and makes the row's confidence NaN; so do infinite ones that
// are the nearest. A row without any similarity that is a number gets label -1.
// A row's result depends on its own values and the centroids only, not on how rows are split or grouped.
#pragma once

#include "exp.h"
#include "tile.h"

IFND_BEGIN

template <class Word>
struct AssignWork {
  Tile<Word> tile;
  Word* panels;
  float *best, *sum, *scores;
  int32_t* label;

  AssignWork(const AssignClusters& p, int64_t rows, Carver& carver) : tile(carver, p.D) {
    const size_t lanes = size_t(round_up<LANES>(rows));
    panels = carver.take<Word>(lanes * size_t(panel_words<Word>(p.D)));
    best = carver.take<float>(lanes);
    sum = carver.take<float>(lanes);
    label = carver.take<int32_t>(lanes);
    scores = carver.take<float>(size_t(tile_rows(p.D)) * LANES);
  }
};

static void half_norms(const AssignClusters& p, Range centroids, float* out) {
  float row[kMaxDim];
  for (int64_t j = centroids.begin; j < centroids.end; ++j) {
    convert_row(p.centroids, p.dtype, j, p.D, row);
    const int whole = p.D / W * W;
    vfloat squares = {};
    for (int d = 0; d < whole; d += W) squares += load(row + d) * load(row + d);
    float total = sum(squares);
    for (int d = whole; d < p.D; ++d) total += row[d] * row[d];
    out[j] = 0.5f * total;
  }
}

// Of lanes that have no label yet, as no score was above -infinity: the first centroid whose score is a number.
static vint first_number(const float* scores, int64_t first, int centroids, vint label) {
  for (int j = 0; j < centroids; ++j) {
    const vfloat s = load(scores + ptrdiff_t(j) * LANES);
    label = (s == s) & (label < vint{}) ? splat(int32_t(first + j)) : label;
  }
  return label;
}

IFND_INLINE void subtract(float* scores, const float* half_norms, int centroids) {
  for (int j = 0; j < centroids; ++j, scores += LANES) store(scores, load(scores) - splat(half_norms[j]));
}

// Where `best` is more than it was: the first centroid that has it.
IFND_INLINE vint first_nearer(const float* scores, int64_t first, int centroids, vfloat best, vfloat before, vint label) {
  const vint nearer = best > before;
  for (int j = centroids - 1; j >= 0; --j)
    label = nearer & (load(scores + ptrdiff_t(j) * LANES) == best) ? splat(int32_t(first + j)) : label;
  return label;
}

// One panel against one tile of centroids, the first of them number `first`.
template <class Word>
static void update_nearest(const AssignWork<Word>& work, int64_t at, int64_t lanes, int64_t first, int centroids,
                           const float* half_norms, float inverse_temperature, bool with_confidence) {
  for (int v = 0; v < min_of<int64_t>(LANES, lanes); v += W) {
    float* scores = work.scores + v;
    const vfloat before = load(work.best + at + v);
    if (half_norms) subtract(scores, half_norms + first, centroids);
    const vfloat best = max(highest_of(scores, centroids), before);
    vint label = load(work.label + at + v);
    if (true_lanes(best > before)) label = first_nearer(scores, first, centroids, best, before, label);
    if (true_lanes(label < vint{})) label = first_number(scores, first, centroids, label);
    store(work.best + at + v, best);
    store(work.label + at + v, label);
    if (!with_confidence) continue;
    const vfloat reference = max(best, splat(kLowest)), t = splat(inverse_temperature);
    vfloat added = {};
    for (int j = 0; j < centroids; ++j) added += exp((load(scores + ptrdiff_t(j) * LANES) - reference) * t);
    store(work.sum + at + v, load(work.sum + at + v) * exp((before - reference) * t) + added);
  }
}

template <class Word>
static void assign_with(const AssignWork<Word>& work, const AssignClusters& p, const float* half_norms, Range rows) {
  const int64_t count = rows.end - rows.begin, lanes = round_up<LANES>(count);
  const float inverse_temperature = float(1.0 / p.temperature);
  const int64_t step = tile_rows(p.D);
  for (int64_t at = 0; at < lanes; at += LANES)
    pack_panel(p.features, p.dtype, rows.begin + at, count - at, p.D, work.panels + at * panel_words<Word>(p.D));
  for (int64_t i = 0; i < lanes; ++i) work.best[i] = -INFINITY, work.sum[i] = 0.0f, work.label[i] = -1;
  for (int64_t j = 0; j < p.C; j += step) {
    const int n = int(min_of(step, p.C - j));
    work.tile.pack(p.centroids, p.dtype, j, n);
    for (int64_t at = 0; at < count; at += LANES) {
      work.tile.scores(n, count - at, 1.0f, work.panels + at * panel_words<Word>(p.D), work.scores);
      update_nearest(work, at, count - at, j, n, half_norms, inverse_temperature, p.confidence != nullptr);
    }
  }
  memcpy(p.labels + rows.begin, work.label, sizeof(int32_t) * size_t(count));
  if (p.confidence)
    for (int64_t i = 0; i < count; ++i) p.confidence[rows.begin + i] = work.sum[i] > 0.0f ? 1.0f / work.sum[i] : NAN;
}

IFND_END
