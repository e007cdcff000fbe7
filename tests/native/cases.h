// What all the fuzzer's cases share: what was called and what was wrong, and the sizes and settings that are drawn.
#pragma once

#include <algorithm>
#include <cstdio>
#include <set>

#include "reference.h"

namespace fuzz {

struct Tally {
  int64_t calls = 0, compared = 0, wrong = 0;
  int64_t of[6] = {};  // forward, negatives' gradient, assign, labels alone, reassign, cluster_sums
  std::set<int> widths;
};
inline Tally tally;

inline char description[512];  // of the case at hand
inline uint64_t case_seed;

inline void report_case() {
  std::fprintf(stderr, "in: fuzz --case %llu  (%s)\n", (unsigned long long)case_seed, description);
}

template <class... Arguments>
void wrong(const char* format, Arguments... arguments) {
  if (++tally.wrong > 20) return;
  std::fprintf(stderr, format, arguments...);
  std::fprintf(stderr, "\n");
  report_case();
}

inline void called(int entry) { ++tally.calls, ++tally.of[entry]; }

inline void check(const char* what, int64_t at, double got, const Value& right) {
  if (!(std::fabs(right.value) < 3.4e38)) return;
  ++tally.compared;
  if (!(std::fabs(got - right.value) <= right.error + 0x1p-149))
    wrong("%s[%lld] is %.9g, not %.9g, which may be off by %.3g", what, (long long)at, got, right.value, right.error);
}

inline void check_all(const char* what, const std::vector<float>& got, const std::vector<Value>& right) {
  for (size_t i = 0; i < right.size(); ++i) check(what, int64_t(i), got[i], right[i]);
}

// ---- sizes ----------------------------------------------------------------------------------------------------------

// Rows of a tile as tile.h has them; only to meet all of them, so that nothing depends on this being right.
inline int tile_rows(int D) { return std::min(128, D >= 1024 ? 16 : 16384 / ((D + 15) / 16 * 16) / 8 * 8); }

constexpr int kUsualDim = 2048;  // wider rows are cut up no otherwise

inline int width(Random& random, int64_t number) {
  if (number % 3 == 0) return 1 + int(number / 3 * 1543 % kUsualDim);  // all of them in turn
  static const std::vector<std::vector<int>> classes = [] {
    std::vector<std::vector<int>> by_rows(129);
    for (int D = 1; D <= kUsualDim; ++D) by_rows[size_t(tile_rows(D))].push_back(D);
    const auto none = std::remove_if(by_rows.begin(), by_rows.end(), [](const auto& c) { return c.empty(); });
    by_rows.erase(none, by_rows.end());
    return by_rows;
  }();
  const int64_t at = number - number / 3 - 1, count = int64_t(classes.size());
  const std::vector<int>& widths = classes[size_t(at % count)];
  const int residue = int(at / count % 16);
  for (int tries = 0; tries < 99; ++tries) {
    const int D = widths[size_t(random.below(int64_t(widths.size())))];
    if (D % 16 == residue) return D;
  }
  return widths[0];
}

// Products that a case may have: few enough for 100,000 cases, and at times enough for many groups and tiles.
inline int64_t budget(Random& random) {
  return random.chance(60) ? 12'000'000 : random.chance(8) ? 3'000'000 : 400'000;
}

inline Kind kind_of(Random& random) { return random.chance(3) ? Kind::unit : Kind(random.below(kKinds)); }

inline double temperature(Random& random) {
  const double usual[] = {0.2, 0.2, 0.07, 1.0, 1e-6, 1e6};
  return random.chance(4) ? std::pow(10.0, 12.0 * random.uniform() - 6.0) : random.one_of(usual);
}

template <class... Arguments>
void describe(const char* format, Arguments... arguments) {
  std::snprintf(description, sizeof description, format, arguments...);
}

}  // namespace fuzz
