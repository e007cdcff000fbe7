// What screening (screen.h) leaves of the centroids for one row, and which of them is the nearest.
//
// The sums that decide are those of assign_with<Word>, formed one word after the other, which is slow. So first come dot
// products by vectors of floats. Each of the two is a sum of D products in some order, off by D 2^-24 |x| |c| at most; so
// they differ by less than 2^-22 (D + 8) |x| |c|, and what is further below the highest than that can't be the nearest.
#pragma once

#include "nearest.h"
#include "screen_pack.h"

IFND_BEGIN

#ifdef __AVX512VNNI__

// Kept until the highest score is known: of wide rows, hundreds may be near it as far as 8 bits tell.
constexpr int kCandidates = 512;
constexpr int kScored = 256;      // of them, by vectors,
constexpr int kExact = 2 * ROWS;  // and by the sums that decide: with more, scoring all centroids so is faster

struct Candidates {
  int n;
  bool too_many;
  int32_t centroid[kCandidates];
  float highest[kCandidates];  // s' + E; of the first, where it is the nearest so far: infinite until it is met

  void start(int32_t nearest_so_far, bool skip) {
    n = nearest_so_far >= 0, too_many = skip;
    centroid[0] = nearest_so_far, highest[0] = INFINITY;
  }
  // Those of index i stay where stays(i).
  template <class Stays>
  void filter(const Stays& stays) {
    int kept = 0;
    for (int i = 0; i < n; ++i)
      if (stays(i)) centroid[kept] = centroid[i], highest[kept++] = highest[i];
    n = kept;
  }
  void prune(float least) {
    filter([&](int i) { return highest[i] >= least; });
  }
  void add(int32_t j, float upper, float least) {
    if (n > 0 && centroid[0] == j && highest[0] == INFINITY) {
      highest[0] = upper;
      return;
    }
    if (n == kCandidates) prune(least);
    too_many |= n == kCandidates;
    if (!too_many) centroid[n] = j, highest[n++] = upper;
  }
};

// One row against a few centroids, by the product that assign_with<Word> uses: a sum depends on no other row.
template <class Word>
struct ExactScores {
  static constexpr int kColumns = kColumnStep<Word>;
  Word *row, *rows;
  int stride;

  ExactScores(const AssignClusters& p, Carver& carver) : stride(int(tile_stride(words<Word>(p.D)))) {
    row = carver.take<Word>(size_t(panel_words<Word>(p.D)) * kColumns);
    rows = carver.take<Word>(size_t(round_up<kWordStep<Word>>(ROWS)) * size_t(stride));
  }

  void start(const AssignClusters& p, int64_t i) const {
    Word packed[kScreenDim + W];
    const int64_t P = panel_words<Word>(p.D);
    pack_row(p.features, p.dtype, i, p.D, packed, round_up<W>(P));
    for (int d = 0; d < P; ++d)
      for (int lane = 0; lane < kColumns; ++lane) row[d * kColumns + lane] = packed[d];
  }
  void scores(const AssignClusters& p, const int32_t* centroids, int n, float* out) const {
    float product[ROWS * kColumns];
    for (int m = 0; m < n; ++m)
      pack_row(p.centroids, p.dtype, centroids[m], p.D, rows + m * stride, padded(words<Word>(p.D)));
    multiply<false>(n, round_up<kColumns>(kColumns), words<Word>(p.D), 1.0f, rows, stride, row, kColumns, product,
                    kColumns, false);
    for (int m = 0; m < n; ++m) out[m] = product[m * kColumns];
  }
};

// Products of a row with GROUP centroids at a time, whose rows are fetched side by side.
constexpr int GROUP = 4;

static void products(const float* x, const float* const* c, int D, float* out) {
  const int whole = D / W * W;
  vfloat sums[GROUP] = {};
  for (int d = 0; d < whole; d += W)
    for (int i = 0; i < GROUP; ++i) sums[i] += load(x + d) * load(c[i] + d);
  for (int i = 0; i < GROUP; ++i) {
    out[i] = sum(sums[i]);
    for (int d = whole; d < D; ++d) out[i] += x[d] * c[i][d];
  }
}

// By products of vectors; what is not a number rules nothing out, nor is it ruled out. `length` bounds |x|, and `longest`
// every |c|.
static void rule_out(const AssignClusters& p, const float* half_norms, int64_t row, float length, float longest,
                     Candidates& candidates) {
  float x_buffer[kScreenDim], buffers[GROUP][kScreenDim], upper[kScored + GROUP], lower = -INFINITY;
  const float* x = as_floats(p, p.features, row, x_buffer);
  for (int i = 0; i < candidates.n; i += GROUP) {
    const float* c[GROUP];
    float s[GROUP];
    for (int g = 0; g < GROUP; ++g)
      c[g] = as_floats(p, p.centroids, candidates.centroid[min_of(i + g, candidates.n - 1)], buffers[g]);
    products(x, c, p.D, s);
    for (int g = 0; g < GROUP && i + g < candidates.n; ++g) {
      const float half = half_norms ? half_norms[candidates.centroid[i + g]] : 0.0f;
      const float error = kSumError * (float(p.D + 8) * length * longest + half) + kFlushed * float(p.D);
      upper[i + g] = s[g] - half + error;
      lower = max(s[g] - half - error, lower);
    }
  }
  candidates.filter([&](int i) { return !(upper[i] < lower); });
}

// Place, among the candidates, of the nearest, of equals the lowest centroid; -1: too many, or not even one.
template <class Word>
static int decide(const AssignClusters& p, const float* half_norms, int64_t row, float length, float longest,
                  float lower, Candidates& candidates, const ExactScores<Word>& exact) {
  candidates.prune(lower);
  if (candidates.too_many || candidates.n == 0 || candidates.n > kScored) return -1;
  if (candidates.n > 1) rule_out(p, half_norms, row, length, longest, candidates);
  if (candidates.n == 1) return 0;
  if (candidates.n > kExact) return -1;
  exact.start(p, row);
  float score[kExact + ROWS], best = -INFINITY;
  for (int i = 0; i < candidates.n; i += ROWS)
    exact.scores(p, candidates.centroid + i, min_of(ROWS, candidates.n - i), score + i);
  int place = -1;
  for (int i = 0; i < candidates.n; ++i) {
    const int32_t j = candidates.centroid[i];
    const float s = half_norms ? score[i] - half_norms[j] : score[i];
    if (s > best || (s == best && place >= 0 && j < candidates.centroid[place])) best = s, place = i;
  }
  return place;
}

#endif

IFND_END
