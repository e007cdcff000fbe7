// The emulated tiles (emulated_tiles.h) against loops over single numbers; with an argument, a fault that has to end it.
#define IFND_ISA emulated
#define IFND_VECTOR_BYTES 64
#define IFND_EMULATED_TILES
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>

#include "isa/matmul_tiles.h"
#include "values.h"

namespace {

using namespace ifnd::emulated;

fuzz::Random generator{1};

template <class T, int N>  // a tile's bytes as N numbers a row
struct Values {
  T at[TILE][N];

  template <class Draw>
  explicit Values(const Draw& draw) {
    for (auto& row : at)
      for (T& x : row) x = draw();
  }
};

// C (rows, columns), A (rows, words), B (words, columns), in tiles 0, 1 and 2.
TileConfig shapes(int rows, int words, int columns) {
  TileConfig config{};
  config.palette = 1;
  const int heights[] = {rows, rows, words}, widths[] = {columns, words, columns};
  for (int t = 0; t < 3; ++t) config.rows[t] = uint8_t(heights[t]), config.row_bytes[t] = uint16_t(4 * widths[t]);
  return config;
}

float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
float widened(uint16_t x) { return flushed(bits<float>(uint32_t(x) << 16)); }

// Numbers about 2^exponent, a little more or less.
auto about(int exponent) {
  return [=] { return std::ldexp(float(generator.normal()), exponent + int(generator.below(5)) - 2); };
}
auto about16(int exponent) {
  return [=] { return uint16_t(bits<uint32_t>(about(exponent)()) >> 16); };
}

int wrong = 0;

template <class T>
void check(const char* what, int m, int n, T got, T right) {
  if (std::memcmp(&got, &right, sizeof got) == 0) return;
  if (++wrong < 9) std::printf("%s[%d][%d] is %g, not %g\n", what, m, n, double(got), double(right));
}

template <class T, int N, class Product>
void product_of(const char* what, const Values<float, 16>& c, const Values<T, N>& a, const Values<T, N>& b,
                const Product& product) {
  using Sum = decltype(product(0, 0, 0, 0.0f));
  const int rows = 1 + int(generator.below(TILE)), words = 1 + int(generator.below(TILE));
  const int columns = 1 + int(generator.below(TILE));
  Values<float, 24> out([] { return -7.0f; });  // rows farther apart than a tile is wide
  const TileConfig config = shapes(rows, words, columns);
  configure_tiles(config);
  tile_load<0>(&c, 64), tile_load<1>(&a, 64), tile_load<2>(&b, 64);
  if (N == 32) tile_dot_bfloat16<0, 1, 2>(); else tile_dot_int8<0, 1, 2>();
  tile_store<0>(&out, sizeof out.at[0]);
  release_tiles();
  for (int m = 0; m < TILE; ++m)
    for (int n = 0; n < 24; ++n) {
      if (m < rows && n < columns)
        check(what, m, n, bits<Sum>(out.at[m][n]), product(words, m, n, c.at[m][n]));
      else
        check("untouched", m, n, out.at[m][n], -7.0f);
    }
}

void products() {
  // Usual ones, denormal factors, denormal products, denormal sums.
  const int exponents[][3] = {{0, 0, 0}, {-127, 100, -27}, {-60, -66, -127}, {-60, -64, -125}};
  const auto& exponent = exponents[generator.below(4)];
  const Values<float, 16> c(about(exponent[2]));
  const Values<uint16_t, 32> a(about16(exponent[0])), b(about16(exponent[1]));
  product_of("bfloat16", c, a, b, [&](int words, int m, int n, float before) {
    float sums[2] = {};
    for (int k = 0; k < words; ++k)
      for (int i = 0; i < 2; ++i)
        sums[i] = flushed(std::fma(widened(a.at[m][2 * k + i]), widened(b.at[k][2 * n + i]), sums[i]));
    return flushed(flushed(before) + flushed(sums[0] + sums[1]));
  });
  const auto byte = [] { return int8_t(generator.chance(3) ? -128 : generator.bits()); };
  const Values<int8_t, 64> d(byte), e(byte);
  product_of("int8", c, d, e, [&](int words, int m, int n, float before) {
    uint32_t sum = bits<uint32_t>(before);
    for (int k = 0; k < 4 * words; ++k) sum += uint32_t(int(d.at[m][k]) * e.at[k / 4][4 * n + k % 4]);
    return int32_t(sum);
  });
}

void transposes() {
  const Values<uint32_t, 16> before([] { return uint32_t(generator.bits()); });
  vuint rows[TILE];
  for (int i = 0; i < TILE; ++i) rows[i] = load(before.at[i]);
  transpose(rows);
  for (int i = 0; i < TILE; ++i)
    for (int j = 0; j < TILE; ++j) check("transpose", i, j, uint32_t(rows[i][j]), before.at[j][i]);
}

void fault(const std::string& what) {
  TileConfig config = shapes(16, 16, 16);
  if (what == "palette") config.palette = 2;
  if (what == "size") config.rows[1] = 17;
  if (what == "ninth") config.rows[8] = config.row_bytes[8] = 16;
  if (what == "reserved") config.reserved[3] = 1;
  if (what == "rows") config.rows[1] = 15;
  if (what == "columns") config.row_bytes[2] = 60;
  if (what == "depth") config.row_bytes[1] = 60;
  if (what != "unconfigured") configure_tiles(config);
  if (what == "twice") configure_tiles(config);
  if (what == "released") release_tiles();
  if (what == "other") tile_zero<3>();
  if (what == "same") tile_dot_bfloat16<0, 1, 1>();
  tile_dot_bfloat16<0, 1, 2>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) fault(argv[1]);
  const unsigned settings = _mm_getcsr();
  for (int i = 0; i < 300; ++i) products();
  transposes();
  if (_mm_getcsr() >> 6 != settings >> 6) ++wrong, std::puts("the thread's own rounding changed");
  std::printf("wrong %d\n", wrong);
  return wrong > 0;
}
