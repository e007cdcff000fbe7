// Gradient of the negatives: d_k = sum_i g_i (d loss_i / d s_ik) q_i / tau, by recomputing the scores.
//   eliminate: d loss / d s_k = mean_l [k not in F_l] e^{s_k - lse_l}
//   attract:   d loss / d s_k = e^{s_k - lse} - mean_l [k in F_l] / (1 + |F_l|)
// For a key in no F_l the mean is one exponential: mean_l e^{s - lse_l} = e^{s - a} mean_l e^{a - lse_l}, a = min_l lse_l;
// such a key is in every denominator, so s <= a up to rounding and nothing overflows.
#pragma once

#include "exp.h"
#include "false_negatives.h"
#include "tile.h"

IFND_BEGIN

// A group of queries, packed once and read by all threads.
template <class Word>
struct QueryGroup {
  Word *panels, *rows;   // per panel of LANES queries: (words of D, LANES), and (words of LANES, padded D)
  float *shift, *factor;  // per query: a, and g / tau mean_l e^{a - lse_l}
  PanelLabels* labels;
  size_t bytes;

  QueryGroup(const InfoNceNegativesGrad& p, int64_t count, const void* base) {
    Carver carver{static_cast<char*>(const_cast<void*>(base))};
    const Multiple<LANES> lanes = round_up<LANES>(count);
    panels = carver.take<Word>(size_t(lanes) * size_t(panel_words<Word>(p.D)));
    rows = carver.take<Word>(size_t(Multiple<kTerms<Word>>(lanes) / kTerms<Word>) * size_t(padded(p.D)));
    shift = carver.take<float>(size_t(lanes));
    factor = carver.take<float>(size_t(lanes));
    labels = carver.take<PanelLabels>(size_t(lanes / LANES));
    bytes = carver.used;
  }
};

template <class Word>
struct NegativesWork {
  Tile<Word> tile;
  float *grad, *scores;
  Word* weights;  // (keys, words of LANES); floats lie in the place of the scores
  TileLabels* labels;
  MarkedKeys* marked;
  size_t bytes;

  NegativesWork(const InfoNceNegativesGrad& p, Carver&& carver) : tile(carver, p.D) {
    const size_t keys = size_t(tile_rows(p.D));
    grad = carver.take<float>(keys * size_t(tile_stride(p.D)));
    scores = carver.take<float>(keys * LANES);
    weights = kTerms<Word> == 1 ? reinterpret_cast<Word*>(scores) : carver.take<Word>(keys * LANES / kTerms<Word>);
    labels = carver.take<TileLabels>(1);
    marked = carver.take<MarkedKeys>(LANES);
    bytes = carver.used;
  }
};

template <class Word>
static void pack_queries(const InfoNceNegativesGrad& p, Range rows, int panel, void* memory) {
  const int64_t at = int64_t(panel) * LANES, first = rows.begin + at;
  const int64_t count = min_of<int64_t>(LANES, rows.end - first);
  const QueryGroup<Word> group(p, rows.end - rows.begin, memory);
  pack_panel(p.query, p.dtype, first, count, p.D, group.panels + at * panel_words<Word>(p.D));
  Word* zipped = group.rows + at / kTerms<Word> * padded(p.D);
  memset(zipped, 0, sizeof(Word) * size_t(LANES / kTerms<Word>) * size_t(padded(p.D)));
  pack_zipped(p.query, p.dtype, first, count, p.D, int(padded(p.D)), zipped);
  pack_labels(p, first, count, group.labels[panel]);
  for (int lane = 0; lane < LANES; ++lane) {
    group.shift[at + lane] = group.factor[at + lane] = 0.0f;
    if (lane >= count) continue;
    const float* lse = p.log_normalizer + (first + lane) * p.L;
    float least = lse[0];
    for (int l = 1; l < p.L; ++l) least = min_of(lse[l], least);
    double mean = 0.0;
    for (int l = 0; l < p.L; ++l) mean += ::exp(double(least) - lse[l]) / p.L;
    group.shift[at + lane] = least;
    group.factor[at + lane] = float(p.loss_grad[first + lane] * mean / p.temperature);
  }
}

// Overwrites the weights g (d loss / d s) / tau of one query's marked keys in its column.
static void marked_weights(const InfoNceNegativesGrad& p, int64_t query, const MarkedKeys& marked, float* column) {
  const double g = p.loss_grad[query] / p.temperature / p.L;
  const bool attract = p.strategy == Strategy::attract;
  float weight[kMaxTileRows + W] = {};
  for (int l = 0; l < p.L; ++l) {
    const float pull = float(g / (1.0 + p.false_negative_counts[query * p.L + l]));
    const vfloat lse = splat(p.log_normalizer[query * p.L + l]), push = splat(float(g));
    for (int j = 0; j < marked.n; j += W) {
      float kept[W], detected[W], score[W];
      for (int i = 0; i < W; ++i) {
        const int in_level = j + i < marked.n ? marked.levels[j + i] >> l & 1 : 1;
        kept[i] = float(1 - in_level), detected[i] = float(in_level);
        score[i] = in_level && !attract ? -INFINITY : marked.score[min_of(j + i, marked.n - 1)];
      }
      const vfloat added = attract ? push * exp(load(score) - lse) - splat(pull) * load(detected)
                                   : push * exp(load(score) - lse) * load(kept);
      store(weight + j, load(weight + j) + added);
    }
  }
  for (int j = 0; j < marked.n; ++j)
    column[ptrdiff_t(marked.key[j]) * LANES] = marked.levels[j] == 0 ? 0.0f : weight[j];
}

IFND_INLINE void as_words(const float*, int, int64_t, float*) {}
#ifdef IFND_PAIRS
IFND_INLINE void as_words(const float* scores, int keys, int64_t lanes, Pair* weights) {
  for (int k = 0; k < keys; ++k, scores += LANES, weights += W)
    store(weights, to_bfloat16(load(scores), lanes > W ? load(scores + W) : vfloat{}));
}
#endif

// scores (keys, LANES) become weights g (d loss / d s) / tau.
template <class Word>
static void scores_to_weights(const InfoNceNegativesGrad& p, const QueryGroup<Word>& group, int64_t at, int64_t first,
                              int64_t count, const NegativesWork<Word>& work, int keys) {
  uint32_t marked = 0;
  if (uses_labels(p) || uses_ids(p))
    marked = find_marked(p, group.labels[at / LANES], count, *work.labels, keys, work.scores, work.marked);
  if (p.ceiling) exclude_above(group.labels[at / LANES], keys, work.scores);
  for (int v = 0; v < count; v += W) {
    const vfloat shift = load(group.shift + at + v), factor = load(group.factor + at + v);
    for (int k = 0; k < keys; ++k) {
      float* scores = work.scores + ptrdiff_t(k) * LANES + v;
      store(scores, exp(load(scores) - shift) * factor);
    }
  }
  for (; marked; marked &= marked - 1) {
    const int lane = __builtin_ctz(marked);
    marked_weights(p, first + lane, work.marked[lane], work.scores + lane);
  }
  as_words(work.scores, keys, count, work.weights);
}

template <class Word>
static void negatives_over(const InfoNceNegativesGrad& p, Range rows, Range keys, const void* memory, void* workspace,
                           bool first_group) {
  const int64_t count = rows.end - rows.begin;
  const Tiles tiles;
  const QueryGroup<Word> group(p, count, memory);
  const NegativesWork<Word> work(p, Carver{static_cast<char*>(workspace)});
  const float inverse_temperature = float(1.0 / p.temperature);
  const int64_t step = tile_rows(p.D), ld = tile_stride(p.D);
  for (int64_t key = keys.begin; key < keys.end; key += step) {
    const int n = int(min_of(step, keys.end - key));
    work.tile.pack(p.negatives, p.dtype, key, n);
    if (uses_labels(p) || uses_ids(p)) pack_labels(p, key, n, *work.labels);
    for (int64_t at = 0; at < count; at += LANES) {
      const int64_t lanes = min_of<int64_t>(LANES, count - at);
      work.tile.scores(n, lanes, inverse_temperature, group.panels + at * panel_words<Word>(p.D), work.scores);
      scores_to_weights(p, group, at, rows.begin + at, lanes, work, n);
      multiply<false>(n, round_up<W>(p.D), words<Word>(int(lanes)), 1.0f, work.weights, LANES / kTerms<Word>,
                      group.rows + at / kTerms<Word> * padded(p.D), padded(p.D), work.grad, ld, at > 0);
    }
    for (int k = 0; k < n; ++k) {
      float* out = p.negatives_grad + (key + k) * p.D;
      const float* grad = work.grad + ptrdiff_t(k) * ld;
      for (int d = 0; d < p.D; ++d) out[d] = first_group ? grad[d] : out[d] + grad[d];
    }
  }
}

static size_t group_bytes(const InfoNceNegativesGrad& p, int64_t rows) {
  return by_word(p.dtype, [&](auto word) { return QueryGroup<decltype(word)>(p, rows, nullptr).bytes; });
}
static size_t pass_bytes(const InfoNceNegativesGrad& p) {
  return by_word(p.dtype, [&](auto word) { return NegativesWork<decltype(word)>(p, Carver{}).bytes; });
}
static void group_pack(const InfoNceNegativesGrad& p, Range rows, int panel, void* memory) {
  by_word(p.dtype, [&](auto word) { pack_queries<decltype(word)>(p, rows, panel, memory); });
}
static void negatives_pass(const InfoNceNegativesGrad& p, Range rows, Range keys, const void* memory, void* workspace,
                           bool first_group) {
  by_word(p.dtype,
          [&](auto word) { negatives_over<decltype(word)>(p, rows, keys, memory, workspace, first_group); });
}

IFND_END
