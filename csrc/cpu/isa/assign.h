// Assignment as the table of kernels has it (kernels.h): screened where that is possible, else by floats.
#pragma once

#include "nearest.h"
#include "screen.h"
#include "screen_pack.h"

IFND_BEGIN

// Bytes of packed centroids; 0 where there is no screening.
static size_t packed_bytes(const AssignClusters& p) {
  Carver carver{};
#ifdef __AVX512VNNI__
  if (screens(p)) PackedCentroids(p, carver);
#endif
  (void)p;
  return carver.used;
}

static int64_t tile_centroids(int D) { return screen_rows(D); }
static int64_t packed_tiles(const AssignClusters& p) { return (p.C + screen_rows(p.D) - 1) / screen_rows(p.D); }

// Tile `tile` of the packed centroids; -1: what has to be done before any.
static void pack_centroids(const AssignClusters& p, const float* half_norms, const int32_t* order, int64_t tile,
                           void* packed) {
#ifdef __AVX512VNNI__
  Carver carver{static_cast<char*>(packed)};
  if (tile < 0)
    find_centre(p, PackedCentroids(p, carver));
  else
    pack_screened(p, half_norms, order, tile, PackedCentroids(p, carver));
#endif
  (void)p, (void)half_norms, (void)order, (void)tile, (void)packed;
}

static size_t assign_bytes(const AssignClusters& p, int64_t rows) {
  Carver carver{};
  by_word(p.dtype, [&](auto word) {
    AssignWork<decltype(word)>(p, rows, carver);
#ifdef __AVX512VNNI__
    if (screens(p)) ExactWork<decltype(word)>(p, carver);
#endif
  });
#ifdef __AVX512VNNI__
  if (screens(p)) ScreenWork(p, rows, carver);  // all, one after the other: a little too much
#endif
  return carver.used;
}

static int64_t assign_rows(const AssignClusters& p, const float* half_norms, const Visits& visits, const void* packed,
                           Range places, void* workspace) {
  const int64_t count = places.end - places.begin;
  const Tiles tiles;
  Carver carver{static_cast<char*>(workspace)};
#ifdef __AVX512VNNI__
  if (packed) {
    Carver counted{static_cast<char*>(const_cast<void*>(packed))};
    const PackedCentroids centroids(p, counted);
    const ScreenWork work(p, count, carver);
    return by_word(p.dtype, [&](auto word) {
      return assign_screened(p, half_norms, visits, centroids, work, ExactWork<decltype(word)>(p, carver), places);
    });
  }
#endif
  (void)packed, (void)visits;
  by_word(p.dtype, [&](auto word) { assign_with(AssignWork<decltype(word)>(p, count, carver), p, half_norms, places); });
  return 0;
}

IFND_END
