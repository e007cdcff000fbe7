// Intel's AMX: eight tiles of 16 rows of 64 bytes, and the products that are added to one of them,
//     tile_dot_bfloat16<C, A, B>   C (16, 16) floats += A (16, 16 pairs) B (16 pairs, 16)
//     tile_dot_int8<C, A, B>       C (16, 16) int32 += A (16, 16 quads) B (16 quads, 16), signed
// Rows of tiles lie `stride` bytes apart in memory.
//
// By assembler: the intrinsics of GCC 12 don't say what memory they read and write, so that stores could be moved past
// a load of a tile. Tests have the emulated unit of tests/native in its place.
#pragma once

#include "simd.h"

IFND_BEGIN

#ifdef IFND_TILES

constexpr int TILE = 16;  // rows of a tile, and words of its rows

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

IFND_END

#ifdef IFND_EMULATED_TILES
#include "emulated_tiles.h"
#else

IFND_BEGIN

IFND_INLINE void configure_tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
IFND_INLINE void release_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
IFND_INLINE void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
IFND_INLINE void tile_load(const void* rows, ptrdiff_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(T) : "memory");
}
template <int T>
IFND_INLINE void tile_store(void* rows, ptrdiff_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
IFND_INLINE void tile_dot_bfloat16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
IFND_INLINE void tile_dot_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

IFND_END
#endif

IFND_BEGIN

// While one lives, the thread has all eight tiles at their full size. A thread never keeps them when it returns from a
// kernel: every switch to another would have 8 KB more to save.
class Tiles {
 public:
  Tiles() {
    TileConfig config{};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.row_bytes[t] = 64, config.rows[t] = TILE;
    configure_tiles(config);
  }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

#else

struct Tiles {
  Tiles() {}
  ~Tiles() {}
};

#endif

IFND_END
