// Rows of any dtype in, tiles and panels of words (simd.h) out.
//   tile  (keys, D), and for the gradient the same with its words along the keys
//   panel (words of D, LANES): the transpose of up to LANES rows, missing rows zero
#pragma once

#include "carver.h"
#include "matmul.h"
#include "matmul_tiles.h"

IFND_BEGIN

constexpr int kMaxTileRows = 128;

// What tiles of rows, panels' words and products' columns are rounded up to. Products by tiles read whole ones.
template <class Word> constexpr int kWordStep = 1;
template <class Word> constexpr int kColumnStep = NARROW;
#ifdef IFND_TILES
constexpr int kRowStep = 2 * TILE;
template <> constexpr int kWordStep<Pair> = TILE;
template <> constexpr int kColumnStep<Pair> = TILE;
#else
constexpr int kRowStep = 8;
#endif

template <class Word>
IFND_INLINE int words(int terms) { return (terms + kTerms<Word> - 1) / kTerms<Word>; }
IFND_INLINE Multiple<16> padded(int n) { return round_up<16>(n); }
// 16 words more, so that rows of a power of two don't all fall into the same few cache sets.
IFND_INLINE Multiple<16> tile_stride(int n) { return padded(n + 16); }
// About 64 KB of float keys: they stay in the second-level cache beside a group of queries.
IFND_INLINE Multiple<kRowStep> tile_rows(int D) {
  constexpr int64_t least = kRowStep > 16 ? kRowStep : 16;
  const int64_t rows = min_of<int64_t>(kMaxTileRows, 16384 / padded(D));
  return round_down<kRowStep>(rows > least ? rows : least);
}
// Words of a panel's columns: zero beyond those of D.
template <class Word>
IFND_INLINE Multiple<kWordStep<Word>> panel_words(int D) { return round_up<kWordStep<Word>>(words<Word>(D)); }

IFND_INLINE float from_bfloat16(uint16_t x) { return bits<float>(uint32_t(x) << 16); }

IFND_INLINE float from_float16(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x & 0x7c00, rest = x & 0x7fff;
  const uint32_t normal = (rest << 13) + (exponent == 0x7c00 ? 0x70000000u : 0x38000000u);  // 255 - 31, 127 - 15
  const uint32_t subnormal = bits<uint32_t>(float(rest) * 5.96046448e-8f);                   // 2^-24
  return bits<float>(sign | (exponent == 0 ? subnormal : normal));
}

static inline void convert_row(const void* matrix, DType dtype, int64_t row, int D, float* out) {
  if (dtype == DType::float32) {
    memcpy(out, static_cast<const float*>(matrix) + row * D, sizeof(float) * size_t(D));
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(matrix) + row * D;
  int d = 0;
  if (dtype == DType::bfloat16) {
    for (; d < D; ++d) out[d] = from_bfloat16(in[d]);
    return;
  }
#ifdef __F16C__
  for (; d + 8 <= D; d += 8)
    _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + d))));
#endif
  for (; d < D; ++d) out[d] = from_float16(in[d]);
}

// A row's words, zero up to `columns` words.
static inline void pack_row(const void* matrix, DType dtype, int64_t row, int D, float* out, Multiple<W> columns) {
  convert_row(matrix, dtype, row, D, out);
  for (int d = D; d < columns; ++d) out[d] = 0.0f;
}

#ifdef IFND_PAIRS
static inline void pack_row(const void* matrix, DType dtype, int64_t row, int D, Pair* out,
                            Multiple<W> columns) {
  if (dtype == DType::bfloat16) {
    const size_t bytes = sizeof(uint16_t) * size_t(D);
    memcpy(out, static_cast<const uint16_t*>(matrix) + row * D, bytes);
    memset(reinterpret_cast<char*>(out) + bytes, 0, sizeof(Pair) * size_t(columns) - bytes);
    return;
  }
  float x[kMaxDim + 2 * W];
  pack_row(matrix, dtype, row, D, x, round_up<W>(2 * columns));
  for (int p = 0; p < columns; p += W) store(out + p, to_bfloat16(load(x + 2 * p), load(x + 2 * p + W)));
}
#endif

template <class Word>
static void pack_panel(const void* matrix, DType dtype, int64_t first, int64_t rows, int D, Word* panel) {
  Word row[kMaxDim + W];
  const int64_t P = panel_words<Word>(D);
  for (int lane = 0; lane < LANES; ++lane) {
    if (lane < rows)
      pack_row(matrix, dtype, first + lane, D, row, round_up<W>(P));
    else
      memset(row, 0, sizeof(Word) * size_t(P));
    for (int p = 0; p < P; ++p) panel[ptrdiff_t(p) * LANES + lane] = row[p];
  }
}

// Rows whose words lie along the rows: float rows as they are; a row of pairs out of every two rows, a missing one zero.
static inline void pack_zipped(const void* matrix, DType dtype, int64_t first, int64_t rows, int D, int stride,
                               float* out) {
  for (int64_t i = 0; i < rows; ++i) pack_row(matrix, dtype, first + i, D, out + i * stride, padded(D));
}

#ifdef IFND_PAIRS
// W bfloat16 of a row of pairs from column d on, as floats.
IFND_INLINE vuint widened(const Pair* row, int d) {
  typedef uint16_t Halves __attribute__((vector_size(IFND_VECTOR_BYTES / 2)));
  Halves halves;
  memcpy(&halves, row + d / 2, sizeof halves);
  return __builtin_convertvector(halves, vuint) << 16;
}

IFND_INLINE void zip(const Pair* even, const Pair* odd, Multiple<W> columns, Pair* out) {
  for (int d = 0; d < columns; d += W) store(out + d, widened(even, d) >> 16 | widened(odd, d));
}

static inline void pack_zipped(const void* matrix, DType dtype, int64_t first, int64_t rows, int D, int stride,
                               Pair* out) {
  const Multiple<16> columns = padded(words<Pair>(D));
  Pair even[kMaxDim / 2], odd[kMaxDim / 2];
  for (int64_t i = 0; i < rows; i += 2) {
    pack_row(matrix, dtype, first + i, D, even, columns);
    if (i + 1 < rows)
      pack_row(matrix, dtype, first + i + 1, D, odd, columns);
    else
      memset(odd, 0, sizeof(Pair) * size_t(columns));
    zip(even, odd, padded(D), out + i / 2 * stride);
  }
}
#endif

// Of a panel whose first `lanes` are wanted, those that a product computes.
template <class Word>
IFND_INLINE Multiple<kColumnStep<Word>> product_lanes(int64_t lanes) {
  return round_up<kColumnStep<Word>>(min_of<int64_t>(LANES, lanes));
}

// Of each lane of scores (rows, LANES); NaN is passed over. In several chains, so that no step waits for the one before.
IFND_INLINE vfloat highest_of(const float* scores, int rows) {
  constexpr int N = 4;
  vfloat highest[N];
  for (vfloat& h : highest) h = splat(-INFINITY);
  int k = 0;
  for (; k + N <= rows; k += N)
    for (int i = 0; i < N; ++i) highest[i] = max(load(scores + ptrdiff_t(k + i) * LANES), highest[i]);
  for (; k < rows; ++k) highest[0] = max(load(scores + ptrdiff_t(k) * LANES), highest[0]);
  return max(max(highest[0], highest[1]), max(highest[2], highest[3]));
}

// Keys with their words along D, for scores.
template <class Word>
struct Tile {
  int D, stride;
  Word* rows;

  Tile(Carver& carver, int dim) : D(dim), stride(int(tile_stride(words<Word>(dim)))) {
    rows = carver.take<Word>(size_t(tile_rows(dim)) * size_t(stride));
  }

  Word* row(int key) const { return rows + ptrdiff_t(key) * stride; }

  void pack(const void* matrix, DType dtype, int64_t first, int keys) const {
    for (int k = 0; k < keys; ++k) pack_row(matrix, dtype, first + k, D, row(k), padded(words<Word>(D)));
  }

  // scores (keys, LANES) = alpha * rows panel; only the first `lanes` lanes need be right.
  void scores(int keys, int64_t lanes, float alpha, const Word* panel, float* scores) const {
    multiply<false>(keys, product_lanes<Word>(lanes), words<Word>(D), alpha, rows, stride, panel, LANES, scores, LANES,
                    false);
  }
};

// Keys for the gradient as well: their weighted sum over keys has its words along the keys.
template <class Word>
struct KeyTile;

template <>
struct KeyTile<float> : Tile<float> {
  using Tile::Tile;

  // grad (D, LANES) += keys^T weights (keys, LANES)
  void add_weighted(int keys, int64_t lanes, const float* weights, float* grad) const {
    multiply<true>(D, product_lanes<float>(lanes), keys, 1.0f, rows, stride, weights, LANES, grad, LANES, true);
  }
  vfloat column(int key, int d) const { return load(row(key) + d); }
};

#ifdef IFND_TILES
template <>
struct KeyTile<Pair> : Tile<Pair> {
  static constexpr int kStride = kMaxTileRows / 2 + 16;  // as in tile_stride
  Pair* columns;  // (D, words of keys)

  KeyTile(Carver& carver, int dim) : Tile(carver, dim) {
    columns = carver.take<Pair>(size_t(padded(dim)) * size_t(kStride));
  }

  void pack(const void* matrix, DType dtype, int64_t first, int keys) const {
    Tile::pack(matrix, dtype, first, keys);
    for (int k = 0; k < keys; k += 2 * TILE)
      for (int d = 0; d < D; d += TILE) {
        vuint block[TILE];
        for (int i = 0; i < TILE; ++i) {
          const int even = k + 2 * i, odd = even + 1;
          block[i] = (even < keys ? widened(row(even), d) >> 16 : vuint{}) | (odd < keys ? widened(row(odd), d) : vuint{});
        }
        transpose(block);
        for (int i = 0; i < TILE; ++i) store(columns + ptrdiff_t(d + i) * kStride + k / 2, block[i]);
      }
  }

  // The weights' rows up to a whole tile become zero, as the keys' have.
  void add_weighted(int keys, int64_t lanes, Pair* weights, float* grad) const {
    const int64_t used = words<Pair>(keys), whole = round_up<TILE>(used);
    memset(weights + used * LANES, 0, sizeof(Pair) * size_t((whole - used) * LANES));
    multiply<false>(D, product_lanes<Pair>(lanes), int(used), 1.0f, columns, kStride, weights, LANES, grad, LANES, true);
  }
  vfloat column(int key, int d) const { return bits<vfloat>(widened(row(key), d)); }
};
#elif defined(IFND_PAIRS)
template <>
struct KeyTile<Pair> : Tile<Pair> {
  Pair* zipped;  // (words of keys, D)
  int zipped_stride;

  KeyTile(Carver& carver, int dim) : Tile(carver, dim), zipped_stride(int(tile_stride(dim))) {
    const Multiple<kTerms<Pair>> keys = tile_rows(dim);
    zipped = carver.take<Pair>(size_t(keys / kTerms<Pair>) * size_t(zipped_stride));
  }

  void pack(const void* matrix, DType dtype, int64_t first, int keys) const {
    Tile::pack(matrix, dtype, first, keys);
    if (keys % 2) memset(row(keys), 0, sizeof(Pair) * size_t(stride));
    for (int k = 0; k < keys; k += 2) zip(row(k), row(k + 1), padded(D), zipped + ptrdiff_t(k / 2) * zipped_stride);
  }

  void add_weighted(int keys, int64_t lanes, const Pair* weights, float* grad) const {
    multiply<true>(D, product_lanes<Pair>(lanes), words<Pair>(keys), 1.0f, zipped, zipped_stride, weights, LANES, grad, LANES,
                   true);
  }
  vfloat column(int key, int d) const { return bits<vfloat>(widened(row(key), d)); }
};
#endif

// function(Word{}) with the words that inputs of this dtype are multiplied as.
template <class Function>
static auto by_word(DType dtype, const Function& function) {
#ifdef IFND_PAIRS
  if (dtype == DType::bfloat16) return function(Pair{});
#endif
  (void)dtype;
  return function(float{});
}

IFND_END
