// Rows of any dtype in, float32 tiles and panels out.
//   tile  (rows, D) row-major, zero-padded to padded(D) columns, rows tile_stride(D) floats apart
//   panel (D, LANES) the transpose of up to LANES rows, missing rows zero
#pragma once

#include "simd.h"

IFND_BEGIN

constexpr int kMaxTileRows = 128;

IFND_INLINE int padded(int D) { return int(round_up(D, 16)); }
// 16 floats more, so that rows of a power of two don't all fall into the same few cache sets.
IFND_INLINE int tile_stride(int D) { return padded(D) + 16; }
// About 64 KB of keys: they stay in the second-level cache beside a group of queries.
IFND_INLINE int tile_rows(int D) { return min_of(kMaxTileRows, D >= 1024 ? 16 : int(16384 / padded(D) / 8 * 8)); }

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
  if (dtype == DType::bfloat16)
    for (int d = 0; d < D; ++d) out[d] = from_bfloat16(in[d]);
  else
    for (int d = 0; d < D; ++d) out[d] = from_float16(in[d]);
}

static inline void pack_tile(const void* matrix, DType dtype, int64_t first, int rows, int D, float* tile) {
  for (int i = 0; i < rows; ++i) {
    float* row = tile + ptrdiff_t(i) * tile_stride(D);
    convert_row(matrix, dtype, first + i, D, row);
    for (int d = D; d < padded(D); ++d) row[d] = 0.0f;
  }
}

static inline void pack_panel(const void* matrix, DType dtype, int64_t first, int64_t rows, int D, float* panel) {
  float row[kMaxDim];
  for (int lane = 0; lane < LANES; ++lane) {
    if (lane < rows)
      convert_row(matrix, dtype, first + lane, D, row);
    else
      memset(row, 0, sizeof(float) * size_t(D));
    for (int d = 0; d < D; ++d) panel[ptrdiff_t(d) * LANES + lane] = row[d];
  }
}

// One after the other out of a block of memory, each aligned for any vector. On a null block it only counts.
struct Carver {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(size_t count) {
    T* p = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + used);
    used += size_t(round_up(int64_t(count * sizeof(T)), 64));
    return p;
  }
};

IFND_END
