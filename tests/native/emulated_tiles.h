// The tile unit in C++, as Intel's manual (volume 2, TDPBF16PS, TDPBSSD, LDTILECFG) describes it: what the hardware
// would fault on ends the program with a message. Included by csrc/cpu/isa/tile_unit.h in place of the instructions.
#pragma once

#include <cstdio>
#include <cstdlib>

#ifndef __FMA__
#error "the emulated tiles need AVX2 and FMA"
#endif

IFND_BEGIN

struct EmulatedTiles {
  TileConfig config;
  uint8_t tile[8][TILE][64];
};
static thread_local EmulatedTiles emulated{};

static inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

static inline void configure_tiles(const TileConfig& config) {
  demand(emulated.config.palette == 0, "configured again: an earlier kernel did not release them");
  demand(config.palette == 1, "palette 1 is the only one with tiles");
  demand(config.start_row == 0, "start_row is for restarts");
  for (uint8_t zero : config.reserved) demand(zero == 0, "reserved bytes are not 0");
  for (int t = 0; t < 16; ++t) {
    demand(config.rows[t] <= TILE && config.row_bytes[t] <= 64, "a tile has at most 16 rows of 64 bytes");
    demand((config.rows[t] == 0) == (config.row_bytes[t] == 0), "rows without bytes, or bytes without rows");
    demand(t < 8 || config.rows[t] == 0, "there are 8 tiles");
  }
  emulated = EmulatedTiles{};
  emulated.config = config;
}

static inline void release_tiles() { emulated = EmulatedTiles{}; }

// The tile's rows and their bytes; it must be configured.
static inline int tile_height(int t) {
  demand(emulated.config.palette != 0, "not configured");
  demand(emulated.config.rows[t] > 0, "this tile is not configured");
  return emulated.config.rows[t];
}
static inline int tile_width(int t) { return tile_height(t) > 0 ? emulated.config.row_bytes[t] : 0; }

template <int T>
static void tile_zero() {
  tile_height(T);
  memset(emulated.tile[T], 0, sizeof emulated.tile[T]);
}

template <int T>
static void tile_load(const void* rows, ptrdiff_t stride) {
  const int height = tile_height(T), width = tile_width(T);
  memset(emulated.tile[T], 0, sizeof emulated.tile[T]);
  for (int i = 0; i < height; ++i) memcpy(emulated.tile[T][i], static_cast<const char*>(rows) + i * stride, size_t(width));
}

template <int T>
static void tile_store(void* rows, ptrdiff_t stride) {
  const int height = tile_height(T), width = tile_width(T);
  for (int i = 0; i < height; ++i) memcpy(static_cast<char*>(rows) + i * stride, emulated.tile[T][i], size_t(width));
}

static inline void demand_product(int c, int a, int b) {
  demand(c != a && a != b && c != b, "a product needs three different tiles");
  demand(tile_width(c) % 4 == 0 && tile_width(a) % 4 == 0 && tile_width(b) % 4 == 0, "rows are not whole words");
  demand(tile_height(c) == tile_height(a), "C and A have other numbers of rows");
  demand(tile_width(c) == tile_width(b), "C and B have rows of other lengths");
  demand(tile_width(a) == 4 * tile_height(b), "A's words are not B's rows");
}

// Denormal numbers are 0, read or written, and rounding is to nearest even, whatever the thread's own settings.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { set(0x9fc0); }
  ~FlushDenormals() { set(before_); }

 private:
  static void set(unsigned csr) {
    __asm__ volatile("" ::: "memory");  // operands are loaded after it, results stored before it
    _mm_setcsr(csr);
    __asm__ volatile("" ::: "memory");
  }
  unsigned before_;
};

// For every word of a row of A: both its halves, times those of B's row.
template <int C, int A, int B>
static void tile_dot_bfloat16() {
  demand_product(C, A, B);
  const int rows = tile_height(C), depth = tile_height(B);
  const FlushDenormals flush;
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  for (int half = 0; half < 64; half += 32) {
    alignas(32) float first[TILE][8], second[TILE][8];  // of B's pairs
    for (int k = 0; k < depth; ++k) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(emulated.tile[B][k] + half));
      _mm256_store_ps(first[k], _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)));
      _mm256_store_ps(second[k], _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)));
    }
    for (int m = 0; m < rows; ++m) {
      __m256 sums[2] = {};
      for (int k = 0; k < depth; ++k) {
        uint32_t pair;
        memcpy(&pair, emulated.tile[A][m] + 4 * k, sizeof pair);
        sums[0] = _mm256_fmadd_ps(_mm256_set1_ps(bits<float>(pair << 16)), _mm256_load_ps(first[k]), sums[0]);
        sums[1] = _mm256_fmadd_ps(_mm256_set1_ps(bits<float>(pair & 0xffff0000u)), _mm256_load_ps(second[k]), sums[1]);
      }
      float* out = reinterpret_cast<float*>(emulated.tile[C][m] + half);
      _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), _mm256_add_ps(sums[0], sums[1])));
    }
  }
}

template <int C, int A, int B>
static void tile_dot_int8() {
  demand_product(C, A, B);
  const int rows = tile_height(C), depth = tile_height(B);
  for (int half = 0; half < 64; half += 32)
    for (int m = 0; m < rows; ++m) {
      __m256i* out = reinterpret_cast<__m256i*>(emulated.tile[C][m] + half);
      __m256i sum = _mm256_loadu_si256(out);
      for (int k = 0; k < depth; ++k) {
        int32_t quad;
        memcpy(&quad, emulated.tile[A][m] + 4 * k, sizeof quad);
        const __m256i a = _mm256_set1_epi32(quad);
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(emulated.tile[B][k] + half));
        // Bytes 0 and 2, then 1 and 3, as 16 bits.
        const auto low = [](__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); };
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low(a), low(b)));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8)));
      }
      _mm256_storeu_si256(out, sum);
    }
}

IFND_END
