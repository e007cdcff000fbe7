// Numbers for the fuzzer: all drawn from one seed, the same on every machine.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "problem.h"

namespace fuzz {

using ifnd::DType;

// SplitMix64.
struct Random {
  uint64_t state;

  uint64_t bits() {
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  bool chance(int in) { return below(in) == 0; }
  double uniform() { return double(bits() >> 11) * 0x1p-53; }
  double normal() {  // near enough
    double sum = -3.0;
    for (int i = 0; i < 6; ++i) sum += uniform();
    return sum * 1.4142;
  }
  // 1 to `most`, small ones as likely as large ones, and often beside a multiple of what vectors and panels hold.
  int64_t size(int64_t most) {
    int64_t n = int64_t(std::exp(uniform() * std::log(double(most) + 1.0)));
    if (chance(3)) n = (n + 7) / 8 * 8 + below(3) - 1;
    return n < 1 ? 1 : n > most ? most : n;
  }
  template <class T, size_t N>
  T one_of(const T (&choices)[N]) { return choices[below(int64_t(N))]; }
};

enum class Kind { unit, plain, tiny, large, subnormal, zeros, grid, duplicates, lengths, far, permuted, not_finite };
constexpr int kKinds = 12;

inline const char* name(Kind kind) {
  static const char* const names[kKinds] = {"unit", "plain",      "tiny",    "large", "subnormal", "zeros",
                                            "grid", "duplicates", "lengths", "far",   "permuted",  "not_finite"};
  return names[int(kind)];
}

// Rows of any dtype as the kernels take them, in memory of exactly their size, and as what they stand for.
struct Matrix {
  std::vector<char> bytes;
  std::vector<double> value;  // (rows, D)
  std::vector<double> norm;   // of each row
  int64_t rows = 0;
  int D = 0;
  bool finite = true;

  const double* row(int64_t i) const { return value.data() + i * D; }
  double longest() const {
    double most = 0.0;
    for (double x : norm) most = x > most ? x : most;
    return most;
  }
  const float* floats() const { return reinterpret_cast<const float*>(bytes.data()); }
};

inline float rounded(float x, DType dtype, char* out) {
  if (dtype == DType::float32) {
    memcpy(out, &x, 4);
    return x;
  }
  if (dtype == DType::float16) {
    const _Float16 half = _Float16(x);
    memcpy(out, &half, 2);
    return float(half);
  }
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t upper = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest even
  const uint16_t half = uint16_t(upper);
  memcpy(out, &half, 2);
  bits = upper << 16;
  memcpy(&x, &bits, 4);
  return x;
}

inline double element(Random& random, Kind kind, DType dtype) {
  const double subnormal = dtype == DType::float16 ? 3e-6 : 1e-40;
  switch (kind) {
    case Kind::tiny: return 1e-7 * random.normal();
    case Kind::large: return 1e4 * random.normal();
    case Kind::subnormal: return subnormal * random.normal();
    case Kind::grid: return double(random.below(5) - 2);
    case Kind::far: return 5.0 + random.normal();
    default: return random.normal();
  }
}

inline void draw_row(Random& random, Kind kind, DType dtype, int D, double* row) {
  double squares = 0.0;
  for (int d = 0; d < D; ++d) row[d] = element(random, kind, dtype), squares += row[d] * row[d];
  double factor = 1.0;
  if (kind == Kind::unit && squares > 0.0) factor = 1.0 / std::sqrt(squares);
  if (kind == Kind::lengths) factor = std::pow(10.0, 10.0 * random.uniform() - 6.0);
  if (kind == Kind::zeros && random.chance(2)) factor = 0.0;
  for (int d = 0; d < D; ++d) row[d] *= factor;
  if (kind == Kind::not_finite && random.chance(3)) {
    const double bad[] = {INFINITY, -INFINITY, NAN};
    for (int64_t n = random.size(D); n > 0; --n) row[random.below(D)] = random.one_of(bad);
  }
}

// Some rows have the first one's elements in other orders, half of the others are constant: which of the former has the
// largest product with one of these is decided by rounding.
inline void draw_permuted(Random& random, DType dtype, Matrix& m, int64_t i) {
  double* row = m.value.data() + i * m.D;
  if (i > 0 && random.chance(int(m.rows / 8) + 1)) {
    memcpy(row, m.row(0), sizeof(double) * size_t(m.D));
    for (int64_t d = m.D - 1; d > 0; --d) std::swap(row[d], row[random.below(d + 1)]);
    return;
  }
  draw_row(random, Kind::plain, dtype, m.D, row);
  if (i == 0)
    for (int d = 0; d < m.D; ++d) row[d] = std::ldexp(std::fabs(row[d]), -int(random.below(12)));
  else if (random.chance(2))
    std::fill(row, row + m.D, std::fabs(row[0]) / 64.0);
}

inline Matrix draw(Random& random, Kind kind, DType dtype, int64_t rows, int D) {
  Matrix m;
  const size_t size = dtype == DType::float32 ? 4 : 2;
  m.rows = rows, m.D = D;
  const size_t elements = size_t(rows) * size_t(D);
  m.bytes.resize(elements * size), m.value.resize(elements), m.norm.resize(size_t(rows));
  for (int64_t i = 0; i < rows; ++i) {
    double* row = m.value.data() + i * D;
    if (kind == Kind::duplicates && i > 0 && !random.chance(4))
      memcpy(row, m.row(random.below(i)), sizeof(double) * size_t(D));
    else if (kind == Kind::permuted)
      draw_permuted(random, dtype, m, i);
    else
      draw_row(random, kind, dtype, D, row);
    double squares = 0.0;
    for (int d = 0; d < D; ++d) {
      row[d] = rounded(float(row[d]), dtype, &m.bytes[(size_t(i) * size_t(D) + size_t(d)) * size]);
      squares += row[d] * row[d];
    }
    m.norm[size_t(i)] = std::sqrt(squares);
    m.finite &= squares < INFINITY;
  }
  return m;
}

}  // namespace fuzz
