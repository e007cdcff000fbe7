// Which keys of a tile are a query's false negatives (per level), and which show its own image.
//
// Matches are few, so each key is first tested against a whole panel of queries: the minimum over the levels of
// (query label ^ key label) is 0 in the lanes where some level matched. Only those lanes are looked at one by one.
#pragma once

#include "simd.h"
#include "tile.h"

IFND_BEGIN

// Unknown labels and ids, all negative ones, are other numbers for a query than for a key, and so match nothing.
constexpr int kUnknownQuery = -2, kUnknownKey = -1;

struct PanelLabels {
  float ceiling[LANES];  // of scores
  int32_t label[kMaxLevels][LANES];
  int32_t id_low[LANES];
  int64_t id[LANES];
};

struct TileLabels {
  int32_t label[kMaxLevels][kMaxTileRows];
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
      for (int l = 0; l < p.label_columns; ++l) {
        const int32_t y = lane < rows ? p.query_labels[i * p.label_columns + l] : -1;
        out.label[l][lane] = y < 0 ? kUnknownQuery : y;
      }
    const int64_t id = uses_ids(p) && lane < rows ? p.query_ids[i] : -1;
    out.id[lane] = id < 0 ? kUnknownQuery : id;
    out.id_low[lane] = int32_t(out.id[lane]);
    if (p.ceiling) out.ceiling[lane] = lane < rows ? float(p.ceiling[i] / p.temperature) : INFINITY;
  }
}

static inline void pack_labels(const InfoNce& p, int64_t first, int keys, TileLabels& out) {
  for (int k = 0; k < keys; ++k) {
    if (uses_labels(p))
      for (int l = 0; l < p.label_columns; ++l) {
        const int32_t y = p.negative_labels[(first + k) * p.label_columns + l];
        out.label[l][k] = y < 0 ? kUnknownKey : y;
      }
    const int64_t id = uses_ids(p) ? p.negative_ids[first + k] : -1;
    out.id[k] = id < 0 ? kUnknownKey : id;
    out.id_low[k] = int32_t(out.id[k]);
  }
}

// Keys that one query has something in common with, in order.
struct MarkedKeys {
  int n;
  uint16_t key[kMaxTileRows];
  uint16_t levels[kMaxTileRows];  // bit l: in F_l, of the L losses; 0: of the query's own image, whatever its labels
  float score[kMaxTileRows];
};
static_assert(kMaxLevels <= 16, "levels are the bits of an uint16_t");

// Fills marked[lane] for the panel's first `lanes` lanes; returns which of them have any (as bits).
static uint32_t find_marked(const InfoNce& p, const PanelLabels& panel, int64_t lanes, const TileLabels& tile, int keys,
                            const float* scores, MarkedKeys* marked) {
  const int levels = uses_labels(p) ? p.label_columns : 0;
  const uint32_t present = lanes >= LANES ? ~uint32_t(0) >> (32 - LANES) : (uint32_t(1) << lanes) - 1;
  const bool ids = uses_ids(p);
  uint32_t found = 0;
  for (int k = 0; k < keys; ++k) {
    uint32_t candidates = 0;
    for (int v = 0; v < LANES; v += W) {
      vuint least = splat(~uint32_t(0));
      const auto compare = [&](const int32_t* queries, int32_t key) {
        const vuint difference = bits<vuint>(load(queries + v) ^ splat(key));
        least = least < difference ? least : difference;
      };
      for (int l = 0; l < levels; ++l) compare(panel.label[l], tile.label[l][k]);
      if (ids) compare(panel.id_low, tile.id_low[k]);
      candidates |= true_lanes(bits<vint>(least == vuint{})) << v;
    }
    for (candidates &= present; candidates; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      const bool same_image = ids && panel.id[lane] == tile.id[k];
      uint32_t mask = 0;
      for (int l = 0; l < levels; ++l) mask |= uint32_t(panel.label[l][lane] == tile.label[l][k]) << l;
      if (p.combination == Combination::any) mask = mask != 0;
      if (p.combination == Combination::all) mask = levels > 0 && mask + 1 == uint32_t(1) << levels;
      if (!same_image && mask == 0) continue;  // only the low halves of the ids, or not all levels, agreed
      MarkedKeys& mine = marked[lane];
      if (!(found >> lane & 1)) mine.n = 0;
      found |= uint32_t(1) << lane;
      mine.key[mine.n] = uint16_t(k);
      mine.levels[mine.n] = uint16_t(same_image ? 0 : mask);
      mine.score[mine.n++] = scores[ptrdiff_t(k) * LANES + lane];
    }
  }
  return found;
}

// Scores (keys, LANES) above the queries' ceilings become -inf.
static inline void exclude_above(const PanelLabels& panel, int keys, float* scores) {
  for (int v = 0; v < LANES; v += W) {
    const vfloat ceiling = load(panel.ceiling + v);
    for (float* s = scores + v; s < scores + ptrdiff_t(keys) * LANES; s += LANES)
      store(s, load(s) > ceiling ? splat(-INFINITY) : load(s));
  }
}

IFND_END
