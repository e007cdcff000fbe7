// Gradient of the negatives: d_k = sum_i g_i (d loss_i / d s_ik) q_i / tau, by recomputing the scores.
//   eliminate: d loss / d s_k = mean_l [k not in F_l] e^{s_k - lse_l}
//   attract:   d loss / d s_k = e^{s_k - lse} - mean_l [k in F_l] / (1 + |F_l|)
// For a key in no F_l the mean is one exponential: mean_l e^{s - lse_l} = e^{s - a} mean_l e^{a - lse_l}, a = min_l lse_l;
// such a key is in every denominator, so s <= a up to rounding and nothing overflows.
#pragma once

#include "exp.h"
#include "match.h"
#include "matmul.h"
#include "tile.h"

IFND_BEGIN

// A group of queries, packed once and read by all threads.
struct QueryGroup {
  float *panels, *rows;     // per panel of LANES queries: (D, LANES) and its transpose (LANES, padded D)
  float *shift, *factor;    // per query: a, and g / tau mean_l e^{a - lse_l}
  PanelLabels* labels;
  size_t bytes;

  QueryGroup(const InfoNceNegativesGrad& p, int64_t count, const void* base) {
    Carver carver{static_cast<char*>(const_cast<void*>(base))};
    const size_t lanes = size_t(round_up(count, LANES));
    panels = carver.take<float>(lanes * p.D);
    rows = carver.take<float>(lanes * padded(p.D));
    shift = carver.take<float>(lanes);
    factor = carver.take<float>(lanes);
    labels = carver.take<PanelLabels>(lanes / LANES);
    bytes = carver.used;
  }
};

struct NegativesWorkspace {
  float *tile, *grad, *scores;
  TileLabels* labels;
  size_t bytes;

  NegativesWorkspace(const InfoNceNegativesGrad& p, void* base) {
    Carver carver{static_cast<char*>(base)};
    const size_t keys = size_t(tile_rows(p.D));
    tile = carver.take<float>(keys * tile_stride(p.D));
    grad = carver.take<float>(keys * tile_stride(p.D));
    scores = carver.take<float>(keys * LANES);
    labels = carver.take<TileLabels>(1);
    bytes = carver.used;
  }
};

static size_t group_bytes(const InfoNceNegativesGrad& p, int64_t rows) { return QueryGroup(p, rows, nullptr).bytes; }
static size_t pass_bytes(const InfoNceNegativesGrad& p) { return NegativesWorkspace(p, nullptr).bytes; }

static void group_pack(const InfoNceNegativesGrad& p, Range rows, int panel, void* memory) {
  const int64_t at = int64_t(panel) * LANES, first = rows.begin + at;
  const int64_t count = min_of<int64_t>(LANES, rows.end - first);
  const QueryGroup group(p, rows.end - rows.begin, memory);
  pack_panel(p.query, p.dtype, first, count, p.D, group.panels + at * p.D);
  pack_labels(p, first, count, group.labels[panel]);
  for (int lane = 0; lane < LANES; ++lane) {
    float* row = group.rows + (at + lane) * padded(p.D);
    group.shift[at + lane] = group.factor[at + lane] = 0.0f;
    memset(row, 0, sizeof(float) * size_t(padded(p.D)));
    if (lane >= count) continue;
    convert_row(p.query, p.dtype, first + lane, p.D, row);
    const float* lse = p.log_normalizer + (first + lane) * p.L;
    float least = lse[0];
    for (int l = 1; l < p.L; ++l) least = min_of(lse[l], least);
    double mean = 0.0;
    for (int l = 0; l < p.L; ++l) mean += ::exp(double(least) - lse[l]) / p.L;
    group.shift[at + lane] = least;
    group.factor[at + lane] = float(p.loss_grad[first + lane] * mean / p.temperature);
  }
}

// d loss / d s of one query and a key that its mask marks; `dense` is what the key would get unmarked.
static float marked_weight(const InfoNceNegativesGrad& p, int64_t query, int32_t mask, float score, float dense) {
  if (mask == kSameImage) return 0.0f;
  const double g = p.loss_grad[query] / p.temperature / p.L;
  double mean = 0.0;
  for (int l = 0; l < p.L; ++l) {
    const bool detected = mask >> l & 1;
    if (p.strategy == Strategy::attract)
      mean -= detected ? 1.0 / (1.0 + p.false_negative_counts[query * p.L + l]) : 0.0;
    else
      mean += detected ? 0.0 : ::exp(double(score) - p.log_normalizer[query * p.L + l]);
  }
  return (p.strategy == Strategy::attract ? dense : 0.0f) + float(g * mean);
}

// scores (keys, LANES) become weights g d loss / d s / tau.
static void scores_to_weights(const InfoNceNegativesGrad& p, const QueryGroup& group, int64_t at, int64_t first,
                              int64_t count, const NegativesWorkspace& work, int keys) {
  const bool matching = uses_labels(p) || uses_ids(p);
  const PanelLabels& labels = group.labels[at / LANES];
  int32_t touched[LANES] = {}, mask[kMaxTileRows];
  float column[kMaxTileRows];
  if (matching) touched_lanes(p, labels, *work.labels, keys, touched);
  for (int lane = 0; lane < count; ++lane) {  // marked keys first, from the scores; parked until the rest is done
    if (!touched[lane]) continue;
    float* scores = work.scores + lane;
    const float shift = group.shift[at + lane], factor = group.factor[at + lane];
    lane_masks(p, labels, lane, *work.labels, keys, mask);
    for (int k = 0; k < keys; ++k) column[k] = scores[ptrdiff_t(k) * LANES];
    for (int k = 0; k < keys; ++k) {
      const float dense = mask[k] && p.strategy != Strategy::attract ? 0.0f : exp(column[k] - shift) * factor;
      scores[ptrdiff_t(k) * LANES] = mask[k] ? marked_weight(p, first + lane, mask[k], column[k], dense) : dense;
    }
  }
  for (int v = 0; v < LANES; v += W) {
    const vfloat shift = load(group.shift + at + v), factor = load(group.factor + at + v);
    const vint done = load(touched + v) != 0;
    for (int k = 0; k < keys; ++k) {
      float* scores = work.scores + ptrdiff_t(k) * LANES + v;
      const vfloat s = load(scores);
      store(scores, done ? s : exp(s - shift) * factor);
    }
  }
}

static void negatives_pass(const InfoNceNegativesGrad& p, Range rows, Range keys, const void* memory, void* workspace,
                           bool first_group) {
  const int64_t count = rows.end - rows.begin;
  const QueryGroup group(p, count, memory);
  const NegativesWorkspace work(p, workspace);
  const float inverse_temperature = float(1.0 / p.temperature);
  const int step = tile_rows(p.D), ld = tile_stride(p.D), columns = int(round_up(p.D, W));
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int n = int(min_of<int64_t>(step, keys.end - key));
    pack_tile(p.negatives, p.dtype, key, n, p.D, work.tile);
    if (uses_labels(p) || uses_ids(p)) pack_labels(p, key, n, *work.labels);
    memset(work.grad, 0, sizeof(float) * size_t(n) * size_t(ld));
    for (int64_t at = 0; at < count; at += LANES) {
      const int64_t lanes = min_of<int64_t>(LANES, count - at);
      panel_scores(n, lanes, p.D, inverse_temperature, work.tile, ld, group.panels + at * p.D, work.scores);
      scores_to_weights(p, group, at, rows.begin + at, lanes, work, n);
      multiply_add<false>(n, columns, int(lanes), 1.0f, work.scores, LANES, group.rows + at * padded(p.D),
                          padded(p.D), work.grad, ld);
    }
    for (int k = 0; k < n; ++k) {
      float* out = p.negatives_grad + (key + k) * p.D;
      const float* grad = work.grad + ptrdiff_t(k) * ld;
      for (int d = 0; d < p.D; ++d) out[d] = first_group ? grad[d] : out[d] + grad[d];
    }
  }
}

IFND_END
