// Labels of float32 features by bfloat16 dot instructions, at twice the rate of float32's, and yet the labels that
// assign_with<float> gives.
//
// Round x = x' + dx and c = c' + dc to bfloat16 x', c'. By Cauchy-Schwarz a score differs by
//     |x.c - x'.c'| = |dx.c + x'.dc| <= |dx| |c| + |x'| |dc|,
// and both are computed in float32: a sum of D products is off by D 2^-24 |x| |c| at most, whatever its order (to
// first order; the bound takes four times as much for both sums, and so covers rounding in its own arithmetic, and
// that of subtracting |c|^2 / 2). What is below 2^-126 may be flushed to 0, once for every addition.
// So E = |dx| C + |x'| dC + 2^-22 (D + 8) |x| C + tiny, with C and dC the largest |c| and |dc| of a tile, bounds every
// score's error; a centroid with s' + E < max_j (s'_j - E_j) can't be the nearest. What is left, one centroid for most
// features, is scored again exactly as assign_with<float> does. Features with too many left go through it.
#pragma once

#include "nearest.h"

IFND_BEGIN

#ifdef __AVX512BF16__

constexpr int kCandidates = 32;

struct Candidates {
  int n;
  bool too_many;
  int32_t centroid[kCandidates];
  float highest[kCandidates];  // s' + E

  void prune(float least) {
    int kept = 0;
    for (int i = 0; i < n; ++i)
      if (highest[i] >= least) centroid[kept] = centroid[i], highest[kept++] = highest[i];
    n = kept;
  }
  void add(int32_t j, float upper, float least) {
    if (n == kCandidates) prune(least);
    too_many |= n == kCandidates;
    if (!too_many) centroid[n] = j, highest[n++] = upper;
  }
};

// Norms of x' and dx, rounded up.
struct Norms {
  float rounded, rest;
};

static Norms pack_screened(const void* matrix, int64_t row, int D, Pair* out, int columns) {
  pack_row(matrix, DType::float32, row, D, out, columns);
  const float* x = static_cast<const float*>(matrix) + row * D;
  vfloat rounded = {}, rest = {};
  const auto add = [&](int d, vfloat exact) {
    const vfloat r = bits<vfloat>(widened(out, d)), difference = exact - r;
    rounded += r * r, rest += difference * difference;
  };
  const int whole = D / W * W;
  for (int d = 0; d < whole; d += W) add(d, load(x + d));
  if (whole < D) {
    float last[W] = {};
    memcpy(last, x + whole, sizeof(float) * size_t(D - whole));
    add(whole, load(last));
  }
  const float up = 1.0f + 1.2e-7f * float(D);
  // Squares below the smallest normal number are lost: 1e-18 is more than the root of kMaxDim of them.
  return {sqrtf(sum(rounded)) * up + 1e-18f, sqrtf(sum(rest)) * up + 1e-18f};
}

struct ScreenWork {
  Tile<Pair> tile;
  Pair* panels;
  float *rounded, *rest, *lower, *scores;
  Candidates* candidates;
  AssignWork<float> exact;  // for the features that screening does not decide

  ScreenWork(const AssignClusters& p, int64_t rows, Carver& carver) : tile(carver, p.D), exact(p, rows, carver) {
    const size_t lanes = size_t(round_up(rows, LANES));
    panels = carver.take<Pair>(lanes * words<Pair>(p.D));
    rounded = carver.take<float>(lanes);
    rest = carver.take<float>(lanes);
    lower = carver.take<float>(lanes);
    scores = carver.take<float>(size_t(tile_rows(p.D)) * LANES);
    candidates = carver.take<Candidates>(lanes);
  }
};

static void start_screening(const AssignClusters& p, Range rows, const ScreenWork& work) {
  const int64_t count = rows.end - rows.begin;
  const int P = words<Pair>(p.D);
  Pair row[kMaxDim / 2];
  for (int64_t i = 0; i < round_up(count, LANES); ++i) {
    Pair* column = work.panels + (i - i % LANES) * P + i % LANES;
    Norms norms{0.0f, 0.0f};
    if (i < count)
      norms = pack_screened(p.features, rows.begin + i, p.D, row, int(round_up(P, W)));
    else
      memset(row, 0, sizeof row);
    for (int d = 0; d < P; ++d) column[ptrdiff_t(d) * LANES] = row[d];
    work.rounded[i] = norms.rounded, work.rest[i] = norms.rest;
    work.lower[i] = -INFINITY;
    work.candidates[i].n = 0, work.candidates[i].too_many = i >= count;
  }
}

// What bounds the scores of one tile of centroids.
struct TileBound {
  float norm = 0.0f, rest = 0.0f, other;  // C, dC, and what does not depend on x
};

static TileBound pack_screened_tile(const AssignClusters& p, const ScreenWork& work, int64_t first, int n,
                                    const float* half_norms) {
  TileBound bound;
  float largest = 0.0f;
  for (int k = 0; k < n; ++k) {
    const Norms norms = pack_screened(p.centroids, first + k, p.D, work.tile.row(k), padded(words<Pair>(p.D)));
    // Written so that NaN counts as infinite: then nothing is ruled out.
    if (!(norms.rounded + norms.rest <= bound.norm)) bound.norm = norms.rounded + norms.rest;
    if (!(norms.rest <= bound.rest)) bound.rest = norms.rest;
    if (half_norms && !(half_norms[first + k] <= largest)) largest = half_norms[first + k];
  }
  if (bound.norm != bound.norm || bound.rest != bound.rest) bound.norm = bound.rest = INFINITY;
  bound.other = 2.4e-7f * largest + 4.8e-38f * float(p.D);
  return bound;
}

// One panel's scores against one tile of centroids, the first of them number `first`.
static void screen_tile(const AssignClusters& p, const ScreenWork& work, int64_t at, int64_t first, int n,
                        const float* half_norms, const TileBound& bound) {
  const vfloat sums = splat(2.4e-7f * float(p.D + 8));
  for (int v = 0; v < LANES; v += W) {
    float* scores = work.scores + v;
    vfloat highest = splat(-INFINITY);
    for (int k = 0; k < n; ++k) {
      vfloat s = load(scores + ptrdiff_t(k) * LANES);
      if (half_norms) {
        s -= splat(half_norms[first + k]);
        store(scores + ptrdiff_t(k) * LANES, s);
      }
      highest = max(s, highest);
    }
    const vfloat rounded = load(work.rounded + at + v), rest = load(work.rest + at + v);
    const vfloat error = (rest + sums * (rounded + rest)) * splat(bound.norm) + rounded * splat(bound.rest) +
                         splat(bound.other);
    const vfloat lower = max(highest - error, load(work.lower + at + v));
    store(work.lower + at + v, lower);
    if (!true_lanes(highest + error >= lower)) continue;
    for (int k = 0; k < n; ++k) {
      const vfloat upper = load(scores + ptrdiff_t(k) * LANES) + error;
      uint32_t lanes = true_lanes(upper >= lower);
      if (!lanes) continue;
      float upper_of[W];
      store(upper_of, upper);
      for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        work.candidates[at + v + lane].add(int32_t(first + k), upper_of[lane], work.lower[at + v + lane]);
      }
    }
  }
}

// The scores of N centroids in the order of additions of register_block.
template <int N>
static void exact_scores(const AssignClusters& p, int64_t row, const int32_t* centroids, float* scores) {
  const float *x = static_cast<const float*>(p.features) + row * p.D, *c[N];
  for (int i = 0; i < N; ++i) c[i] = static_cast<const float*>(p.centroids) + int64_t(centroids[i]) * p.D;
  for (int begin = 0; begin < p.D; begin += kDepth) {
    float sum[N] = {};
    for (int d = begin; d < min_of(p.D, begin + kDepth); ++d)
      for (int i = 0; i < N; ++i) sum[i] = sum[i] + c[i][d] * x[d];
    for (int i = 0; i < N; ++i) scores[i] = begin > 0 ? scores[i] + sum[i] : sum[i];
  }
}

// The nearest of the candidates, in ascending order; false: too many, or not even one.
static bool decide(const AssignClusters& p, const float* half_norms, int64_t row, Candidates& candidates, float lower,
                   int32_t& label) {
  candidates.prune(lower);
  const int n = candidates.n;
  if (candidates.too_many || n == 0) return false;
  label = candidates.centroid[0];
  if (n == 1) return true;
  float score[kCandidates + 4];
  int32_t centroid[kCandidates + 4];
  for (int i = 0; i < kCandidates + 4; ++i) centroid[i] = candidates.centroid[min_of(i, n - 1)];
  for (int i = 0; i < n; i += 4) exact_scores<4>(p, row, centroid + i, score + i);
  float best = -INFINITY;
  for (int i = 0; i < n; ++i) {
    const float s = half_norms ? score[i] - half_norms[centroid[i]] : score[i];
    if (s > best) best = s, label = centroid[i];
  }
  return true;
}

// Labels of `rows`; returns how many of them had to be found without screening.
static int64_t assign_screened(const AssignClusters& p, const float* half_norms, Range rows, void* workspace) {
  const int64_t count = rows.end - rows.begin;
  Carver carver{static_cast<char*>(workspace)};
  const ScreenWork work(p, count, carver);
  start_screening(p, rows, work);
  const int step = tile_rows(p.D);
  for (int64_t j = 0; j < p.C; j += step) {
    const int n = int(min_of<int64_t>(step, p.C - j));
    const TileBound bound = pack_screened_tile(p, work, j, n, half_norms);
    for (int64_t at = 0; at < count; at += LANES) {
      work.tile.scores(n, count - at, 1.0f, work.panels + at * words<Pair>(p.D), work.scores);
      screen_tile(p, work, at, j, n, half_norms, bound);
    }
  }
  int64_t undecided = 0, run = 0;  // whole panels, in runs
  for (int64_t at = 0; at <= round_up(count, LANES); at += LANES) {
    bool decided = true;
    for (int64_t i = at; i < min_of(count, at + LANES); ++i)
      decided &= decide(p, half_norms, rows.begin + i, work.candidates[i], work.lower[i], p.labels[rows.begin + i]);
    if (!decided) {
      run += min_of<int64_t>(LANES, count - at);
    } else if (run > 0) {
      const int64_t end = rows.begin + min_of(at, count);
      assign_with(work.exact, p, half_norms, {end - run, end});
      undecided += run, run = 0;
    }
  }
  return undecided;
}

#endif

// Whether screening is possible and worth its while: short rows and few centroids leave too much besides the products.
IFND_INLINE bool screens(const AssignClusters& p) {
  return kBfloat16Dots && p.dtype == DType::float32 && !p.confidence && p.D >= 32 && p.C >= 64;
}

static size_t assign_bytes(const AssignClusters& p, int64_t rows) {
  Carver carver{};
  by_word(p.dtype, [&](auto word) { AssignWork<decltype(word)>(p, rows, carver); });
#ifdef __AVX512BF16__
  if (screens(p)) ScreenWork(p, rows, carver);  // both, one after the other: a little too much
#endif
  return carver.used;
}

static int64_t assign_rows(const AssignClusters& p, const float* half_norms, Range rows, bool screen, void* workspace) {
#ifdef __AVX512BF16__
  if (screen && screens(p)) return assign_screened(p, half_norms, rows, workspace);
#endif
  (void)screen;
  Carver carver{static_cast<char*>(workspace)};
  by_word(p.dtype, [&](auto word) {
    assign_with(AssignWork<decltype(word)>(p, rows.end - rows.begin, carver), p, half_norms, rows);
  });
  return 0;
}

IFND_END
