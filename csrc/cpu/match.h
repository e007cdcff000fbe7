// Which keys of a tile are a query's false negatives (per level), and which show its own image.
//
// Matches are few, so a whole panel of queries is first tested against a whole tile of keys with two vector
// operations per level and key: the minimum of (query label ^ key label) is 0 where some key matched. Only
// the lanes touched are then looked at key by key.
#pragma once

#include "simd.h"
#include "tile.h"

IFND_BEGIN

constexpr int32_t kSameImage = 1 << 30;  // in a mask whose low bits are the levels at which the key is in F_l

struct PanelLabels {
  int32_t label[kMaxLevels][LANES];  // -2: none, equal to no key's
  int32_t id_low[LANES];
  int64_t id[LANES];
};

struct TileLabels {
  int32_t label[kMaxLevels][kMaxTileRows];  // -1: none
  int32_t id_low[kMaxTileRows];
  int64_t id[kMaxTileRows];
};

IFND_INLINE bool uses_labels(const InfoNce& p) {
  return p.query_labels && p.negative_labels && p.strategy != Strategy::keep;
}
IFND_INLINE bool uses_ids(const InfoNce& p) { return p.query_ids && p.negative_ids; }

static inline void pack_labels(const InfoNce& p, int64_t first, int64_t rows, PanelLabels& out) {
  for (int lane = 0; lane < LANES; ++lane) {
    const int64_t i = first + lane;
    if (uses_labels(p))
      for (int l = 0; l < p.L; ++l) {
        const int32_t y = lane < rows ? p.query_labels[i * p.L + l] : -1;
        out.label[l][lane] = y < 0 ? -2 : y;
      }
    out.id[lane] = uses_ids(p) && lane < rows ? p.query_ids[i] : 0;
    out.id_low[lane] = int32_t(out.id[lane]);
  }
}

static inline void pack_labels(const InfoNce& p, int64_t first, int keys, TileLabels& out) {
  for (int k = 0; k < keys; ++k) {
    if (uses_labels(p))
      for (int l = 0; l < p.L; ++l) {
        const int32_t y = p.negative_labels[(first + k) * p.L + l];
        out.label[l][k] = y < 0 ? -1 : y;
      }
    out.id[k] = uses_ids(p) ? p.negative_ids[first + k] : 0;
    out.id_low[k] = int32_t(out.id[k]);
  }
}

// touched[lane] != 0: some key of the tile has a label, or the low half of an id, in common with the lane.
static inline void touched_lanes(const InfoNce& p, const PanelLabels& panel, const TileLabels& tile, int keys,
                                 int32_t* touched) {
  for (int v = 0; v < LANES; v += W) {
    vuint least = bits<vuint>(splat(int32_t(-1)));
    const auto compare = [&](const int32_t* queries, const int32_t* key) {
      const vint q = load(queries + v);
      for (int k = 0; k < keys; ++k) {
        const vuint difference = bits<vuint>(q ^ splat(key[k]));
        least = least < difference ? least : difference;
      }
    };
    if (uses_labels(p))
      for (int l = 0; l < p.L; ++l) compare(panel.label[l], tile.label[l]);
    if (uses_ids(p)) compare(panel.id_low, tile.id_low);
    store(touched + v, bits<vint>(least == vuint{}));
  }
}

// One lane's masks: bit l for a key in F_l, kSameImage alone for one of its own image, 0 for a plain negative.
static inline void lane_masks(const InfoNce& p, const PanelLabels& panel, int lane, const TileLabels& tile, int keys,
                              int32_t* mask) {
  memset(mask, 0, sizeof(int32_t) * size_t(keys));
  if (uses_labels(p))
    for (int l = 0; l < p.L; ++l) {
      const int32_t y = panel.label[l][lane];
      for (int k = 0; k < keys; ++k) mask[k] |= int32_t(tile.label[l][k] == y) << l;
    }
  if (uses_ids(p)) {
    const int64_t id = panel.id[lane];
    for (int k = 0; k < keys; ++k) mask[k] = tile.id[k] == id ? kSameImage : mask[k];
  }
}

IFND_END
