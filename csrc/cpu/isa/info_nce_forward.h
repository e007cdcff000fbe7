// info_nce forward and the query's gradient, in one pass over the negatives.
//
// For a query q with s_k = q.n_k / tau, every level l needs
//     S_l = sum_{k not in F_l} e^{s_k}    and    sum_k ( mean_l [k not in F_l] / Z_l ) e^{s_k} n_k,  Z_l = S_l + e^{s+},
// and Z_l is known only at the end. S_l = S_all - S_{F_l} would lose every digit when F_l holds the largest logits,
// and one running maximum for all levels would underflow the level that has masked it. So nothing is ever
// subtracted. The keys are split by where they count:
//   common       in no F_l: they count alike at every level. One online softmax (maximum m, sum S, weighted key sum G)
//                over the dense logits, G accumulated as flash attention accumulates its output; other keys have
//                logit -inf there.
//   exceptional  in some F_l, not in all: for every level where it counts, a key joins that level's own
//                online softmax (m_l, S'_l, G_l). They are few: a sparse path, key by key.
//   in every F_l, or of the query's own image: in no sum at all.
// All terms are positive, each sum has its own maximum, and a level joins its parts at the end:
//     M_l = max(m, m_l, s+),   Z_l e^{-M_l} = S e^{m - M_l} + S'_l e^{m_l - M_l} + e^{s+ - M_l}.
//
// Attraction: every key but the own image's is common; level l keeps n_l = |F_l|, T_l = sum_{F_l} s_k and
// G_l = sum_{F_l} n_k in the same places instead.
#pragma once

#include "exp.h"
#include "false_negatives.h"
#include "tile.h"

IFND_BEGIN

IFND_INLINE bool has_level_sums(const InfoNce& p) {
  return uses_labels(p) && (p.strategy == Strategy::attract || p.L > 1);
}

// What a thread accumulates for a group of queries. Per panel of LANES queries: grad (D, LANES); per query and
// level: level_grad (padded D), and so on.
struct ForwardState {
  float *grad, *max, *sum, *rest;  // rest: what rounding has left out of the sum
  float *level_grad, *level_max;
  double* level_sum;
  int32_t* count;

  ForwardState(const InfoNceForward& p, int64_t rows, Carver& carver) {
    const size_t lanes = size_t(round_up<LANES>(rows)), levels = has_level_sums(p) ? size_t(p.L) : 0;
    grad = carver.take<float>(p.query_grad ? lanes * p.D : 0);
    max = carver.take<float>(lanes);
    sum = carver.take<float>(lanes);
    rest = carver.take<float>(lanes);
    level_grad = carver.take<float>(p.query_grad ? lanes * levels * size_t(padded(p.D)) : 0);
    level_max = carver.take<float>(lanes * levels);
    level_sum = carver.take<double>(lanes * levels);
    count = carver.take<int32_t>(lanes * p.L);
  }

  void start(const InfoNceForward& p, int64_t rows) const {
    const int64_t lanes = round_up<LANES>(rows), levels = has_level_sums(p) ? p.L : 0;
    for (int64_t i = 0; i < lanes; ++i) max[i] = -INFINITY, sum[i] = rest[i] = 0.0f;
    for (int64_t i = 0; i < lanes * levels; ++i) level_max[i] = -INFINITY, level_sum[i] = 0.0;
    memset(count, 0, sizeof(int32_t) * size_t(lanes * p.L));
    if (p.query_grad) {
      memset(grad, 0, sizeof(float) * size_t(lanes * p.D));
      memset(level_grad, 0, sizeof(float) * size_t(lanes * levels * padded(p.D)));
    }
  }
};

// And what it works with: the queries as words, a tile of keys, and one panel's scores against it.
template <class Word>
struct ForwardWork {
  ForwardState state;
  Word* panels;
  PanelLabels* labels;
  KeyTile<Word> tile;
  TileLabels* tile_labels;
  float* scores;
  Word* weights;  // e^{s - m}; floats lie in the place of the scores
  MarkedKeys* marked;

  ForwardWork(const InfoNceForward& p, int64_t rows, Carver&& carver) : state(p, rows, carver), tile(carver, p.D) {
    const size_t lanes = size_t(round_up<LANES>(rows));
    const Multiple<kTerms<Word>> keys = tile_rows(p.D);
    panels = carver.take<Word>(lanes * size_t(panel_words<Word>(p.D)));
    labels = carver.take<PanelLabels>(lanes / LANES);
    tile_labels = carver.take<TileLabels>(1);
    scores = carver.take<float>(size_t(keys) * LANES);
    weights = kTerms<Word> == 1 ? reinterpret_cast<Word*>(scores)
                                : carver.take<Word>(size_t(keys / kTerms<Word>) * LANES);
    marked = carver.take<MarkedKeys>(LANES);
    bytes = carver.used;
  }
  size_t bytes;
};

// A few keys of a tile, a score and a weight each; room for a whole vector more.
struct KeyList {
  int n = 0;
  int key[kMaxTileRows + W];
  float score[kMaxTileRows + W], weight[kMaxTileRows + W];
};

// out (D) = scale * out + sum_j weight_j key_j
template <class Word>
static void add_keys(const KeyList& list, const KeyTile<Word>& tile, float scale, float* out) {
  constexpr int V = 4;
  const int columns = int(padded(tile.D));
  int d = 0;
  for (; d + V * W <= columns; d += V * W) {
    vfloat acc[V] = {};
    for (int j = 0; j < list.n; ++j)
      for (int v = 0; v < V; ++v) acc[v] += splat(list.weight[j]) * tile.column(list.key[j], d + v * W);
    for (int v = 0; v < V; ++v) store(out + d + v * W, splat(scale) * load(out + d + v * W) + acc[v]);
  }
  for (; d < columns; d += W) {
    vfloat acc = {};
    for (int j = 0; j < list.n; ++j) acc += splat(list.weight[j]) * tile.column(list.key[j], d);
    store(out + d, splat(scale) * load(out + d) + acc);
  }
}

// The keys of `list` join the online softmax (max, sum, grad) of one query at one level.
template <class Word>
static void join_softmax(KeyList& list, const KeyTile<Word>& tile, float& max, double& sum, float* grad) {
  float highest = max;
  for (int j = 0; j < list.n; ++j) highest = list.score[j] > highest ? list.score[j] : highest;
  const float reference = IFND_ISA::max(highest, kLowest);
  const float scale = exp(max - reference);
  for (int j = list.n; j < list.n + W; ++j) list.score[j] = -INFINITY;
  for (int j = 0; j < list.n; j += W) store(list.weight + j, exp(load(list.score + j) - splat(reference)));
  double added = 0.0;
  for (int j = 0; j < list.n; ++j) added += list.weight[j];
  max = highest;
  sum = sum * scale + added;
  if (grad) add_keys(list, tile, scale, grad);
}

// Of one query's marked keys, those of level l that count in its own sums: the kept ones, or attracted ones.
static void level_keys(const MarkedKeys& marked, int l, bool attract, KeyList& list) {
  list.n = 0;
  for (int j = 0; j < marked.n; ++j) {
    list.key[list.n] = marked.key[j];
    list.score[list.n] = marked.score[j];
    list.weight[list.n] = 1.0f;
    list.n += marked.levels[j] != 0 && (marked.levels[j] >> l & 1) == int(attract);
  }
}

// One query's marked keys in this tile: counts them, moves exceptional ones to the level sums, and takes out of the
// dense scores whatever is not a common key.
template <class Word>
static void marked_keys(const InfoNceForward& p, const ForwardWork<Word>& work, int64_t query) {
  const ForwardState& state = work.state;
  const MarkedKeys& marked = work.marked[query % LANES];
  const bool attract = p.strategy == Strategy::attract;
  for (int l = 0; l < p.L; ++l)
    for (int j = 0; j < marked.n; ++j) state.count[query * p.L + l] += marked.levels[j] >> l & 1;
  if (has_level_sums(p)) {
    KeyList list;
    for (int l = 0; l < p.L; ++l) {
      level_keys(marked, l, attract, list);
      if (list.n == 0) continue;
      const int64_t at = query * p.L + l;
      float* grad = p.query_grad ? state.level_grad + at * padded(p.D) : nullptr;
      if (attract) {
        for (int j = 0; j < list.n; ++j) state.level_sum[at] += list.score[j];
        if (grad) add_keys(list, work.tile, 1.0f, grad);
      } else {
        join_softmax(list, work.tile, state.level_max[at], state.level_sum[at], grad);
      }
    }
  }
  for (int j = 0; j < marked.n; ++j)
    if (!attract || marked.levels[j] == 0) work.scores[ptrdiff_t(marked.key[j]) * LANES + query % LANES] = -INFINITY;
}

// e^{s - reference} of every key, as weights; returns their sum, added up in blocks: nearly equal terms are rounded
// alike, and would pile up an error of one sign.
constexpr int kSumBlock = 16;

IFND_INLINE vfloat exponentials(const float* scores, int keys, vfloat reference, float* weights) {
  vfloat sum = {};
  for (int first = 0; first < keys; first += kSumBlock) {
    vfloat part = {};
    for (int k = first; k < min_of(keys, first + kSumBlock); ++k) {
      const vfloat e = exp(load(scores + ptrdiff_t(k) * LANES) - reference);
      store(weights + ptrdiff_t(k) * LANES, e);
      part += e;
    }
    sum += part;
  }
  return sum;
}

#ifdef IFND_PAIRS
IFND_INLINE vfloat exponentials(const float* scores, int keys, vfloat reference, Pair* weights) {
  vfloat sum = {};
  for (int begin = 0; begin < keys; begin += kSumBlock) {
    vfloat part = {};
    for (int k = begin; k < min_of(keys, begin + kSumBlock); k += 2, scores += 2 * LANES, weights += LANES) {
      const vfloat first = exp(load(scores) - reference);
      const vfloat second = k + 1 < keys ? exp(load(scores + LANES) - reference) : vfloat{};
      store(weights, to_pairs(first, second));
      part += first + second;
    }
    sum += part;
  }
  return sum;
}
#endif

// The online softmax of one panel: scores (keys, LANES) become weights e^{s - m}; max, sum and grad follow.
template <class Word>
static void common_keys(const ForwardWork<Word>& work, int64_t first, int64_t lanes, int keys, int D, bool with_grad) {
  const ForwardState& state = work.state;
  for (int v = 0; v < min_of<int64_t>(LANES, lanes); v += W) {
    const float* scores = work.scores + v;
    const vfloat before = load(state.max + first + v);
    const vfloat highest = max(highest_of(scores, keys), before);
    const vfloat reference = max(highest, splat(kLowest)), scale = exp(before - reference);
    const vfloat added = exponentials(scores, keys, reference, work.weights + v);
    store(state.max + first + v, highest);
    const vfloat kept = load(state.sum + first + v) * scale, sum = kept + added, joined = sum - kept;
    store(state.sum + first + v, sum);
    store(state.rest + first + v, load(state.rest + first + v) * scale + ((kept - (sum - joined)) + (added - joined)));
    if (!with_grad || !true_lanes(highest > before)) continue;
    float* grad = state.grad + first * D + v;
    for (int d = 0; d < D; ++d) store(grad + ptrdiff_t(d) * LANES, load(grad + ptrdiff_t(d) * LANES) * scale);
  }
}

template <class Word>
static void forward_over(const InfoNceForward& p, Range rows, Range keys, void* workspace) {
  const int64_t count = rows.end - rows.begin;
  const Tiles tiles;
  const ForwardWork<Word> work(p, count, Carver{static_cast<char*>(workspace)});
  work.state.start(p, count);
  for (int64_t at = 0; at < count; at += LANES) {
    pack_panel(p.query, p.dtype, rows.begin + at, count - at, p.D, work.panels + at * panel_words<Word>(p.D));
    pack_labels(p, rows.begin + at, count - at, work.labels[at / LANES]);
  }
  const float inverse_temperature = float(1.0 / p.temperature);
  const bool matching = uses_labels(p) || uses_ids(p);
  const int64_t step = tile_rows(p.D);
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int n = int(min_of(step, keys.end - key));
    work.tile.pack(p.negatives, p.dtype, key, n);
    if (matching) pack_labels(p, key, n, *work.tile_labels);
    for (int64_t at = 0; at < count; at += LANES) {
      // 1. s = q n^T / tau
      work.tile.scores(n, count - at, inverse_temperature, work.panels + at * panel_words<Word>(p.D), work.scores);
      // 2. false negatives and the own image out of s, exceptional keys into their levels' sums
      if (matching)
        for (uint32_t lanes = find_marked(p, work.labels[at / LANES], count - at, *work.tile_labels, n, work.scores,
                                          work.marked);
             lanes; lanes &= lanes - 1)
          marked_keys(p, work, at + __builtin_ctz(lanes));
      if (p.ceiling) exclude_above(work.labels[at / LANES], n, work.scores);
      // 3. online softmax: s becomes e^{s - m}
      common_keys(work, at, count - at, n, p.D, p.query_grad != nullptr);
      // 4. G += n^T e^{s - m}
      if (p.query_grad) work.tile.add_weighted(n, count - at, work.weights, work.state.grad + at * p.D);
    }
  }
}

static size_t forward_bytes(const InfoNceForward& p, int64_t rows) {
  return by_word(p.dtype, [&](auto word) { return ForwardWork<decltype(word)>(p, rows, Carver{}).bytes; });
}
static void forward_pass(const InfoNceForward& p, Range rows, Range keys, void* workspace) {
  by_word(p.dtype, [&](auto word) { forward_over<decltype(word)>(p, rows, keys, workspace); });
}

// sum e^{max - reference}; a sum without a maximum is 0, or NaN from NaN logits, which must show.
static double rescaled(double sum, double max, double reference) {
  return max == -INFINITY ? sum : sum * ::exp(max - reference);
}

// The states that the chunks of the keys left for one group of queries, in order.
struct Chunks {
  const InfoNceForward& p;
  int64_t group_rows;
  char* base;
  size_t stride;
  int count;

  ForwardState operator[](int c) const {
    Carver carver{base + stride * size_t(c)};
    return ForwardState(p, group_rows, carver);
  }
};

struct OnlineSum {
  double max = -INFINITY, sum = 0.0;

  void join(double other_max, double other_sum) {
    const double highest = other_max > max ? other_max : max;
    sum = rescaled(sum, max, highest) + rescaled(other_sum, other_max, highest);
    max = highest;
  }
};

// What one query's chunks come to: the common keys' sum, and each level's own sum and |F_l|.
struct Totals {
  OnlineSum common, level[kMaxLevels];
  int64_t count[kMaxLevels] = {};

  Totals(const Chunks& chunks, int64_t at, int L, int levels) {
    for (int c = 0; c < chunks.count; ++c) {
      const ForwardState state = chunks[c];
      common.join(state.max[at], double(state.sum[at]) + state.rest[at]);
      for (int l = 0; l < L; ++l) count[l] += state.count[at * L + l];
      for (int l = 0; l < levels; ++l) level[l].join(state.level_max[at * L + l], state.level_sum[at * L + l]);
    }
  }
};

// d loss / d s+ and the factors of e^{m} G and of e^{m_l} G_l (of G_l itself in attraction).
struct Coefficients {
  double positive = 0.0, common = 0.0, level[kMaxLevels];
};

static Coefficients normalise(const InfoNceForward& p, const Totals& totals, double s_positive, int64_t query) {
  const bool attract = uses_labels(p) && p.strategy == Strategy::attract;
  const OnlineSum& common = totals.common;
  Coefficients out;
  double loss = 0.0;
  for (int l = 0; l < p.L; ++l) {
    const OnlineSum own = attract ? OnlineSum() : totals.level[l];
    const double n = double(totals.count[l]);
    double M = common.max > s_positive ? common.max : s_positive;
    M = own.max > M ? own.max : M;
    if (p.log_hard && p.log_hard[query] > M) M = p.log_hard[query];
    // Z e^{-M} in two parts: what the negatives add decides the loss where the positive is the maximum.
    double rest = rescaled(common.sum, common.max, M) + rescaled(own.sum, own.max, M);
    if (p.log_hard) rest += ::exp(p.log_hard[query] - M);
    const double Z = rest + ::exp(s_positive - M);
    const double log_Z = M == s_positive ? log1p(rest) : log(Z);
    p.log_normalizer[query * p.L + l] = float(M + log_Z);
    p.false_negative_counts[query * p.L + l] = int32_t(totals.count[l]);
    loss += (M - s_positive) + log_Z;
    out.positive -= rest / Z;  // e^{s+ - lse} - 1
    out.common += rescaled(1.0, common.max, M) / Z / p.L;
    out.level[l] = rescaled(1.0, own.max, M) / Z / p.L;
    if (attract) {
      loss -= (totals.level[l].sum - n * s_positive) / (1.0 + n);
      out.positive += n / (1.0 + n);
      out.level[l] = -1.0 / (1.0 + n) / p.L;
    }
  }
  out.positive /= p.L;
  p.loss[query] = float(loss / p.L);
  p.positive_weight[query] = float(out.positive);
  return out;
}

// grad = ( common G + sum_l level_l G_l + positive z+ ) / tau, with G and G_l summed over the chunks.
static void finish_grad(const InfoNceForward& p, const Chunks& chunks, const Totals& totals, const Coefficients& factor,
                        const float* positive, int64_t at, float* grad) {
  const bool attract = p.strategy == Strategy::attract;
  const int D = p.D, levels = has_level_sums(p) ? p.L : 0;
  const double inverse_temperature = 1.0 / p.temperature;
  for (int d = 0; d < D; ++d) grad[d] = float(factor.positive * inverse_temperature) * positive[d];
  for (int c = 0; c < chunks.count; ++c) {
    const ForwardState state = chunks[c];
    const float* G = state.grad + (at - at % LANES) * D + at % LANES;
    const double scale = rescaled(factor.common, state.max[at], totals.common.max) * inverse_temperature;
    if (state.max[at] != -INFINITY)
      for (int d = 0; d < D; ++d) grad[d] += float(scale) * G[ptrdiff_t(d) * LANES];
    for (int l = 0; l < levels; ++l) {
      const double max = state.level_max[at * p.L + l];
      if (attract ? state.count[at * p.L + l] == 0 : max == -INFINITY) continue;
      const double level_scale = (attract ? factor.level[l] : rescaled(factor.level[l], max, totals.level[l].max));
      const float* G_l = state.level_grad + (at * p.L + l) * padded(D);
      for (int d = 0; d < D; ++d) grad[d] += float(level_scale * inverse_temperature) * G_l[d];
    }
  }
}

static void forward_finish(const InfoNceForward& p, int64_t first_row, int64_t group_rows, Range rows, void* workspaces,
                           size_t stride, int count) {
  const Chunks chunks{p, group_rows, static_cast<char*>(workspaces), stride, count};
  float q[kMaxDim], positive[kMaxDim];
  for (int64_t query = rows.begin; query < rows.end; ++query) {
    convert_row(p.query, p.dtype, query, p.D, q);
    convert_row(p.positive, p.dtype, query, p.D, positive);
    double dot = 0.0;
    for (int d = 0; d < p.D; ++d) dot += double(q[d]) * positive[d];
    const Totals totals(chunks, query - first_row, p.L, has_level_sums(p) ? p.L : 0);
    const Coefficients factor = normalise(p, totals, dot / p.temperature, query);
    if (p.query_grad)
      finish_grad(p, chunks, totals, factor, positive, query - first_row, p.query_grad + query * p.D);
  }
}

IFND_END
