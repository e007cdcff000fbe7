// Labels by dot instructions of 8-bit integers, at four times the rate of float32's, and yet the labels that
// assign_with<Word> gives.
//
// Round t = x - m = t' + dt and d = c - m = d' + dd to 8 bits, a scale for each row; m is 0, or the centroids' mean
// where they lie far from the origin, which changes a feature's scores by the same for all centroids. By
// Cauchy-Schwarz a product differs by
//     |t.d - t'.d'| = |dt.d + t'.dd| <= |dt| |d| + |t'| |dd|.
// t'.d' is exact but for the scales. The scores that decide are sums of D float32 products, off by D 2^-24 |x| |c| at
// most, whatever their order (to first order; the bound takes four times as much, and so covers what float32 rounds
// here, and in its own arithmetic). What is below 2^-126 may be flushed to 0, once for every addition.
// So E = |dt| C + |t'| dC + 2^-22 (D + 8) |x| (C + |m|) + tiny, with C and dC the largest |d| and |dd| of a tile, bounds
// every score's error; a centroid with s' + E < max_j (s'_j - E_j) can't be the nearest. What is left, one centroid for
// most features, is scored again exactly as assign_with<float> does. Features with too many left go through it.
//
// The largest s' + E but for the nearest's bounds the distance of every other centroid from below: see reassign.h.
#pragma once

#include "candidates.h"
#include "reassign.h"

IFND_BEGIN

#ifdef __AVX512VNNI__

constexpr int kExactRows = 4 * LANES;  // that go through assign_with<Word> together

struct ScreenWork {
  Quad* panels;  // (words, LANES) for every LANES rows
  float *scale, *norm, *rest, *squares, *lower, *highest, *second, *scores, *blocks;
  Candidates* candidates;
  int32_t* undecided;  // places among the rows

  ScreenWork(const AssignClusters& p, int64_t rows, Carver& carver) {
    const size_t lanes = size_t(round_up<LANES>(rows));
    panels = carver.take<Quad>(lanes * size_t(screen_words(p.D)));
    float** const of_rows[] = {&scale, &norm, &rest, &squares, &lower, &highest, &second};
    for (float** of_row : of_rows) *of_row = carver.take<float>(lanes);
    scores = carver.take<float>(size_t(screen_rows(p.D)) * LANES);
    blocks = carver.take<float>(size_t(screen_rows(p.D)) / ROWS * LANES);
    candidates = carver.take<Candidates>(lanes);
    undecided = carver.take<int32_t>(lanes);
  }
};

// For the features that screening does not decide: exactly as without it.
template <class Word>
struct ExactWork {
  ExactScores<Word> scores;
  AssignWork<Word> assign;
  char* rows;
  int32_t* labels;

  ExactWork(const AssignClusters& p, Carver& carver) : scores(p, carver), assign(p, kExactRows, carver) {
    rows = carver.take<char>(size_t(kExactRows) * row_bytes(p));
    labels = carver.take<int32_t>(kExactRows);
  }
  static size_t row_bytes(const AssignClusters& p) {
    return size_t(p.D) * (p.dtype == DType::float32 ? sizeof(float) : sizeof(uint16_t));
  }
};

IFND_INLINE int64_t visited(const Visits& visits, int64_t place) { return visits.rows ? visits.rows[place] : place; }

static void start_screening(const AssignClusters& p, const Visits& visits, Range places, const PackedCentroids& packed,
                            const ScreenWork& work) {
  const int64_t count = places.end - places.begin;
  const float sums = kSumError * float(p.D + 8);
  alignas(64) int8_t row[kScreenDim + W];
  Quad quads[kScreenDim / 4];
  for (int64_t i = 0; i < round_up<LANES>(count); ++i) {
    memset(row, 0, sizeof row);
    Rounded r{0.0f, 0.0f, 0.0f, 0.0f};
    work.lower[i] = work.highest[i] = work.second[i] = -INFINITY;
    work.candidates[i].start(-1, i >= count);
    if (i < count) {
      const int64_t x = visited(visits, places.begin + i);
      r = round_row(p.features, p.dtype, x, packed.centre, p.D, row);
      if (visits.distances && visits.distances[x] < INFINITY) {
        // s = (|t|^2 - |x - c|^2) / 2 of the nearest so far, at least
        const float own = visits.distances[x], length = sqrtf(r.squares) + sqrtf(own) + *packed.centre_length;
        work.lower[i] = 0.5f * (r.squares - own) - 2.0f * sums * length * length - kFlushed * float(p.D);
        work.candidates[i].start(p.labels[x], !(work.lower[i] > -INFINITY));
      }
      work.candidates[i].too_many |= !(r.norm + r.rest + *packed.centre_length < kLargest);
    }
    work.scale[i] = r.scale, work.norm[i] = r.norm, work.rest[i] = r.rest, work.squares[i] = r.squares;
    memcpy(quads, row, sizeof(Quad) * size_t(packed.words));
    Quad* column = work.panels + (i - i % LANES) * packed.words + i % LANES;
    for (int d = 0; d < packed.words; ++d) column[ptrdiff_t(d) * LANES] = quads[d] ^ kUnsigned;
  }
}

// By instruction: from comparisons that share one, the compiler makes blends. b where either is NaN.
IFND_INLINE vfloat higher(vfloat a, vfloat b) { return vfloat(_mm512_maskz_max_ps(kAll, __m512(a), __m512(b))); }
IFND_INLINE vfloat lesser(vfloat a, vfloat b) { return vfloat(_mm512_maskz_min_ps(kAll, __m512(a), __m512(b))); }

// The two highest scores of each lane so far; not numbers count for nothing.
struct Highest {
  vfloat first, second;

  void add(vfloat s) {
    second = higher(lesser(s, first), second);
    first = higher(s, first);
  }
};

// Scores (ROWS, LANES) from products of ROWS centroids with a panel, and their highest.
IFND_INLINE void scale_products(const vint (*products)[VECTORS], const PackedCentroids& packed, int64_t first,
                                const float* scale, float* scores, float* block, Highest* highest) {
  const float *of_row = packed.scale + first, *bias = packed.bias + first;
#pragma GCC unroll 2
  for (int v = 0; v < VECTORS; ++v) {
    const vfloat of_lane = load(scale + v * W);
    vfloat most = splat(-INFINITY);
    Highest so_far = highest[v];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const vfloat s = __builtin_convertvector(products[m][v], vfloat) * splat(of_row[m]) * of_lane + splat(bias[m]);
      store(scores + m * LANES + v * W, s);
      so_far.add(s);
      most = higher(s, most);
    }
    store(block + v * W, most);
    highest[v] = so_far;
  }
}

// kScreenBlock centroids against a panel: scores, and the highest of every ROWS and of all. A function of its own: among
// a caller's values some of the sums would not stay in registers.
#ifdef IFND_TILES
static void score_block(const PackedCentroids& packed, int64_t first, const Quad* panel, const float* scale,
                        float* scores, float* block, Highest* highest) {
  alignas(64) int32_t sums[kScreenBlock * LANES];
  tile_block<2, 2>(packed.words, packed.rows + first * packed.words, packed.words, panel, LANES, sums, LANES, false);
  for (int at = 0; at < kScreenBlock; at += ROWS, scores += ROWS * LANES, block += LANES) {
    vint products[ROWS][VECTORS];
    memcpy(products, sums + at * LANES, sizeof products);
    scale_products(products, packed, first + at, scale, scores, block, highest);
  }
}
#else
static __attribute__((noinline)) void score_block(const PackedCentroids& packed, int64_t first, const Quad* panel,
                                                  const float* scale, float* scores, float* block, Highest* highest) {
  vint acc[ROWS][VECTORS];
  const Quad* rows = packed.rows + first * packed.words;
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m)
    for (int v = 0; v < VECTORS; ++v) acc[m][v] = splat(packed.offset[first + m]);
  for (int d = 0; d < packed.words; ++d) {
    __m512i x[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) x[v] = _mm512_loadu_si512(panel + d * LANES + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const __m512i c = _mm512_set1_epi32(int(rows[m * packed.words + d]));
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) acc[m][v] = vint(_mm512_dpbusd_epi32(__m512i(acc[m][v]), x[v], c));
    }
  }
  scale_products(acc, packed, first, scale, scores, block, highest);
}
#endif

// One panel, at row `at` of the group, against one tile of centroids: what it leaves of them.
static void screen_tile(const AssignClusters& p, const Visits& visits, const PackedCentroids& packed,
                        const ScreenWork& work, int64_t at, int64_t tile) {
  const int64_t first = tile * packed.step, end = min_of<int64_t>(first + packed.step, round_up<kScreenBlock>(p.C));
  const TileBound& bound = packed.bounds[tile];
  const float m = *packed.centre_length;
  Highest highest[VECTORS];
  for (Highest& h : highest) h = {splat(-INFINITY), splat(-INFINITY)};
  for (int64_t j = first; j < end; j += kScreenBlock)
    score_block(packed, j, work.panels + at * packed.words, work.scale + at, work.scores + (j - first) * LANES,
                work.blocks + (j - first) / ROWS * LANES, highest);
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t lanes = at + v * W;
    const vfloat norm = load(work.norm + lanes), rest = load(work.rest + lanes);
    const vfloat sums = splat(kSumError * float(p.D + 8)) * (norm + rest + splat(m));
    const vfloat error = rest * splat(bound.norm) + norm * splat(bound.rest) + sums * splat(bound.length) +
                         splat(bound.other);
    Highest so_far{load(work.highest + lanes), load(work.second + lanes)};
    so_far.add(highest[v].first + error);
    so_far.add(highest[v].second + error);
    store(work.highest + lanes, so_far.first), store(work.second + lanes, so_far.second);
    const vfloat lower = max(highest[v].first - error, load(work.lower + lanes));
    store(work.lower + lanes, lower);
    if (!true_lanes(highest[v].first + error >= lower)) continue;
    for (int64_t j = first; j < end; j += ROWS) {
      const float* scores = work.scores + (j - first) * LANES + v * W;
      if (!true_lanes(load(work.blocks + (j - first) / ROWS * LANES + v * W) + error >= lower)) continue;
      for (int64_t k = j; k < j + ROWS; ++k, scores += LANES) {
        const vfloat upper = load(scores) + error;
        uint32_t left = true_lanes(upper >= lower);
        if (!left) continue;
        float upper_of[W];
        store(upper_of, upper);
        for (; left; left &= left - 1) {
          const int lane = __builtin_ctz(left);
          work.candidates[lanes + lane].add(visits.order ? visits.order[k] : int32_t(k), upper_of[lane],
                                            work.lower[lanes + lane]);
        }
      }
    }
  }
}

// Less than the distance of every centroid but the label, of those that the row was compared with.
static float others_distance(const AssignClusters& p, const Visits& visits, const ScreenWork& work, int64_t i,
                             int64_t row, int place) {
  const Candidates& candidates = work.candidates[i];
  const bool top = candidates.highest[place] >= work.highest[i] && candidates.highest[place] < INFINITY;
  const float score = top ? work.second[i] : work.highest[i];
  const float sums = 4.0f * kSumError * float(p.D + 8);
  float squares = work.squares[i] - 2.0f * score;
  squares -= sums * (work.squares[i] + (score < 0.0f ? -score : score));
  if (visits.distances && candidates.centroid[place] != p.labels[row])
    squares = min_of(squares, visits.distances[row] * (1.0f - sums));
  return squares > 0.0f ? sqrtf(squares) * 0.999999f : 0.0f;
}

// Labels of n rows, their places counted from `first` on, by assign_with.
template <class Word>
static void assign_exactly(const AssignClusters& p, const float* half_norms, const Visits& visits,
                           const ExactWork<Word>& exact, int64_t first, const int32_t* places, int n) {
  const size_t bytes = exact.row_bytes(p);
  AssignClusters few = p;
  few.features = exact.rows, few.labels = exact.labels, few.N = n;
  for (int i = 0; i < n; ++i) {
    const size_t row = size_t(visited(visits, first + places[i]));
    memcpy(exact.rows + size_t(i) * bytes, static_cast<const char*>(p.features) + row * bytes, bytes);
  }
  assign_with(exact.assign, few, half_norms, {0, n});
  for (int i = 0; i < n; ++i) p.labels[visited(visits, first + places[i])] = exact.labels[i];
}

// Labels of the rows at `places`; returns how many of them had to be found without screening.
template <class Word>
static int64_t assign_screened(const AssignClusters& p, const float* half_norms, const Visits& visits,
                               const PackedCentroids& packed, const ScreenWork& work, const ExactWork<Word>& exact,
                               Range places) {
  const int64_t count = places.end - places.begin;
  start_screening(p, visits, places, packed, work);
  const int64_t all = (p.C + packed.step - 1) / packed.step;
  const auto tiles_of = [&](int64_t at) { return visits.tiles ? visits.tiles[places.begin + at] : all; };
  for (int64_t tile = 0; tile < tiles_of(0); ++tile)
    for (int64_t at = 0; at < count && tile < tiles_of(at); at += LANES)
      screen_tile(p, visits, packed, work, at, tile);

  float longest = 0.0f;
  for (int64_t tile = 0; tile < tiles_of(0); ++tile) longest = max(packed.bounds[tile].length, longest);
  int64_t undecided = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = visited(visits, places.begin + i);
    const float length = work.norm[i] + work.rest[i] + *packed.centre_length;
    const float distance = visits.distances && visits.distances[row] < INFINITY ? sqrtf(visits.distances[row]) : 0.0f;
    const float most = max(length + distance * 1.001f, longest);  // the nearest so far may be of a tile not visited
    const int place = decide(p, half_norms, row, length, most, work.lower[i], work.candidates[i], exact.scores);
    if (place < 0) {
      work.undecided[undecided++] = int32_t(i);
      if (visits.bounds) visits.bounds[row] = 0.0f;
      continue;
    }
    if (visits.bounds) {
      const float others = others_distance(p, visits, work, i, row, place);
      const int64_t tiles = tiles_of(i - i % LANES);
      visits.bounds[row] = tiles < all ? min_of(others, moved_closer(visits.bounds[row], visits.beyond[tiles])) : others;
    }
    p.labels[row] = work.candidates[i].centroid[place];
  }
  for (int64_t i = 0; i < undecided; i += kExactRows)
    assign_exactly(p, half_norms, visits, exact, places.begin, work.undecided + i,
                   int(min_of<int64_t>(kExactRows, undecided - i)));
  return undecided;
}

#endif

IFND_END
