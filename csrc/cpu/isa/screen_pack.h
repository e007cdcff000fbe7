// Rows and centroids in 8 bits, for screen.h, which has the derivation: t', |t'| and |dt| of a row, and what bounds the
// errors of the scores of a tile of centroids.
#pragma once

#include "tile.h"

IFND_BEGIN

constexpr int kScreenDim = 2048;  // its arrays are cleared for each row, so that they are no longer than they need be

// Whether screening is possible and worth its while: short rows and few centroids leave too much besides the products.
IFND_INLINE bool screens(const AssignClusters& p) {
  return kInteger8Dots && !p.confidence && p.D >= 32 && p.D <= kScreenDim && p.C >= 64;
}

// What the product of a block takes: rows of centroids, and words up to a multiple; and what is added to a feature's
// four integers, for instructions that multiply unsigned by signed ones.
#ifdef IFND_TILES
constexpr int kScreenBlock = 2 * TILE, kScreenWords = TILE;
constexpr uint32_t kUnsigned = 0;
#else
constexpr int kScreenBlock = ROWS, kScreenWords = 1;
constexpr uint32_t kUnsigned = 0x80808080u;
#endif
IFND_INLINE Multiple<kScreenWords> screen_words(int D) { return round_up<kScreenWords>((D + 3) / 4); }

// Half as many as of floats: a tile and its scores stay in the first-level cache. Whole blocks, as blocks that
// began anywhere else would run past the tile, and the last one past the centroids' and the scores' memory.
IFND_INLINE Multiple<kScreenBlock> screen_rows(int D) { return round_up<kScreenBlock>(tile_rows(D) / 2); }

#ifdef __AVX512VNNI__

typedef uint32_t Quad;  // four 8-bit integers

constexpr uint16_t kAll = 0xffff;      // lanes: without a mask GCC 12 warns of its own headers
constexpr float kSumError = 2.4e-7f;   // 2^-22
// More than the root of kScreenDim squares below the smallest normal number, which may count as 0. What bfloat16's dot
// instructions lose of factors that small is less than kSumError of a row that is longer by it.
constexpr float kShort = 1e-18f;
constexpr float kFlushed = 4.8e-38f;   // of one of a sum's terms, which may count as 0 below 2^-126, and so may the sum
constexpr float kLargest = 1e18f;      // rows as long as this may overflow in float32: nothing is ruled out for them

// A row rounded to 8 bits: its scale, the norms of what it became and of what was lost, rounded up, and its own
// squared length.
struct Rounded {
  float scale, norm, rest, squares;
};

static Rounded round_row(const void* matrix, DType dtype, int64_t row, const float* centre, int D, int8_t* out) {
  alignas(64) float t[kScreenDim + W];
  const Multiple<W> columns = round_up<W>(D);
  pack_row(matrix, dtype, row, D, t, columns);
  vfloat largest = {};
  for (int d = 0; d < columns; d += W) {
    const vfloat difference = load(t + d) - load(centre + d);
    store(t + d, difference);
    largest = max(max(difference, -difference), largest);
  }
  float most = 0.0f, lane[W];
  store(lane, largest);
  for (int i = 0; i < W; ++i) most = max(lane[i], most);
  Rounded r{most / 127.0f, 0.0f, 0.0f, 0.0f};
  const float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
  vfloat norm = {}, rest = {}, squares = {};
  for (int d = 0; d < columns; d += W) {
    const vfloat x = load(t + d);
    const __m512i whole = _mm512_maskz_cvtps_epi32(kAll, __m512(x * splat(inverse)));
    const vfloat rounded = __builtin_convertvector(vint(whole), vfloat) * splat(r.scale), lost = x - rounded;
    norm += rounded * rounded, rest += lost * lost, squares += x * x;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + d), _mm512_maskz_cvtepi32_epi8(kAll, whole));
  }
  const float up = 1.0f + 1.2e-7f * float(D);
  r.norm = sqrtf(sum(norm)) * up + kShort, r.rest = sqrtf(sum(rest)) * up + kShort, r.squares = sum(squares);
  return r;
}

// What bounds the scores of one tile of centroids: C, dC, C + |m|, and what does not depend on x.
struct TileBound {
  float norm, rest, length, other;
};

// The centroids in 8 bits, in the order in which they are visited; up to a whole block with scores of -infinity.
struct PackedCentroids {
  Multiple<kScreenWords> words;
  Multiple<kScreenBlock> step;  // centroids of a tile
  Quad* rows;
  float *scale, *bias;  // score = scale * (the feature's scale) * product + bias
  int32_t* offset;      // takes back that a feature's integers are stored 128 higher
  TileBound* bounds;
  float* centre;         // m
  float* centre_length;  // |m|

  PackedCentroids(const AssignClusters& p, Carver& carver) : words(screen_words(p.D)), step(screen_rows(p.D)) {
    const size_t lanes = size_t(round_up<kScreenBlock>(p.C));
    rows = carver.take<Quad>(lanes * size_t(words) + W);
    scale = carver.take<float>(lanes);
    bias = carver.take<float>(lanes);
    offset = carver.take<int32_t>(lanes);
    bounds = carver.take<TileBound>(size_t(p.C / step) + 1);
    centre = carver.take<float>(kScreenDim + W);
    centre_length = carver.take<float>(1);
  }
};

// Row i as floats: where it is, or converted into `buffer`.
IFND_INLINE const float* as_floats(const AssignClusters& p, const void* matrix, int64_t i, float* buffer) {
  if (p.dtype == DType::float32) return static_cast<const float*>(matrix) + i * p.D;
  convert_row(matrix, p.dtype, i, p.D, buffer);
  return buffer;
}

static void find_centre(const AssignClusters& p, const PackedCentroids& packed) {
  double mean[kScreenDim] = {}, squares = 0.0, length = 0.0;
  float buffer[kScreenDim];
  for (int64_t j = 0; j < p.C; ++j) {
    const float* c = as_floats(p, p.centroids, j, buffer);
    for (int d = 0; d < p.D; ++d) mean[d] += c[d], squares += double(c[d]) * c[d];
  }
  for (int d = 0; d < p.D; ++d) mean[d] /= double(p.C), length += mean[d] * mean[d];
  const bool far = 2.0 * length > squares / double(p.C) && length < 1e36;
  for (int d = 0; d < round_up<W>(p.D); ++d) packed.centre[d] = far && d < p.D ? float(mean[d]) : 0.0f;
  *packed.centre_length = far ? float(sqrt(length)) * 1.000001f : 0.0f;
}

// Tile number `tile`; half_norms, of centroids in their own order, is null for the inner product.
static void pack_screened(const AssignClusters& p, const float* half_norms, const int32_t* order, int64_t tile,
                          const PackedCentroids& packed) {
  const int64_t first = tile * packed.step, end = min_of<int64_t>(first + packed.step, round_up<kScreenBlock>(p.C));
  const float m = *packed.centre_length, sums = kSumError * float(p.D + 8);
  TileBound bound{0.0f, 0.0f, 0.0f, 0.0f};
  float largest = 0.0f;
  for (int64_t k = first; k < end; ++k) {
    alignas(64) int8_t row[kScreenDim + W] = {};
    Quad* out = packed.rows + k * packed.words;
    packed.offset[k] = 0, packed.scale[k] = 0.0f, packed.bias[k] = -INFINITY;
    if (k < p.C) {
      const int64_t j = order ? order[k] : k;
      const Rounded r = round_row(p.centroids, p.dtype, j, packed.centre, p.D, row);
      int32_t total = 0;
      for (int d = 0; d < p.D; ++d) total += row[d];
      packed.scale[k] = r.scale, packed.offset[k] = -128 * total;
      float bias = 0.0f;
      if (half_norms) {
        bias = m > 0.0f ? -0.5f * r.squares : -half_norms[j];
      } else if (m > 0.0f) {
        float buffer[kScreenDim];
        const float* c = as_floats(p, p.centroids, j, buffer);
        for (int d = 0; d < p.D; ++d) bias += packed.centre[d] * (c[d] - packed.centre[d]);
      }
      packed.bias[k] = bias;
      if (r.norm + r.rest + m < kLargest) {
        bound.norm = max(r.norm + r.rest, bound.norm);
        bound.rest = max(r.rest, bound.rest);
        if (half_norms) largest = max(half_norms[j], largest);
      } else {  // too long, or not a number: neither it nor any other of the tile is ruled out
        packed.scale[k] = 0.0f, packed.bias[k] = INFINITY;
        bound.norm = bound.rest = INFINITY;
      }
    }
    memcpy(out, row, sizeof(Quad) * size_t(packed.words));
  }
  bound.length = bound.norm + m;
  // About the mean, halves of squared lengths are not those that decide, but off from them by as much.
  const float moved = m > 0.0f ? sums * bound.length * bound.length : 0.0f;
  bound.other = kSumError * largest + kFlushed * float(p.D) + moved;
  packed.bounds[tile] = bound;
}

#endif

IFND_END
