// The emulated GPU itself: what must go wrong does, and tensor cores multiply matrices whose fragments are given here in
// another form than in emulation.cpp: as strides of the bits of lane and register (column-major matrices).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "emulation.h"

namespace ifnd::cuda {

namespace {

int failures = 0;
void check(bool right, const char* what) {
  std::printf("%s: %s\n", right ? "ok" : "WRONG", what);
  failures += !right;
}

float seen[256];

void exchange(bool with_barrier) {
  float* numbers = (float*)shared_memory;
  numbers[threadIdx.x] = float(threadIdx.x);
  if (with_barrier) __syncthreads();
  seen[threadIdx.x] = numbers[255 - threadIdx.x];
}
void diverge(int) { threadIdx.x % 32 < 7 ? __shfl_xor_sync(0xffffffffu, 1, 1) : (int)__any_sync(0xffffffffu, true); }
void half_at_the_barrier(int) {
  if (threadIdx.x < 32) __syncthreads();
}
void write_past(int bytes) { shared_memory[bytes] = 1; }
void vote(int who) {
  const bool any = __syncthreads_or((int)threadIdx.x == who), none = __syncthreads_or(false);
  seen[threadIdx.x] = any && !none;
}

template <class Argument>
std::string fault_of(void (*kernel)(Argument), Argument argument, int threads, int bytes) {
  try {
    launch("k", kernel, dim3(1), threads, bytes, nullptr, argument);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Place in a column-major matrix: each bit of `number` times its stride.
int place(int number, const std::vector<int>& strides) {
  int at = 0;
  for (size_t bit = 0; bit < strides.size(); ++bit) at += (number >> bit & 1) * strides[bit];
  return at;
}

struct Layout {
  std::vector<int> lane, value;  // strides by bit
  int at(int l, int v) const { return place(l, lane) + place(v, value); }
};

// Of M x N x K, held by `lanes` lanes; lane i of group g is `lane_of(g, i)`.
struct Product {
  int M, N, K, lanes, groups;
  Layout a, b, d;  // (M, K), (N, K), (M, N)
  int (*lane_of)(int, int);
  void (*mma)(float*, const u32*, const u32*);
};
const Product* product;
std::vector<float> A, B, D;  // (groups, ...)

void multiply(int) {
  const Product& p = *product;
  float d[8] = {};
  u32 a[4] = {}, b[4] = {};
  int group = 0, i = 0;
  for (int g = 0; g < p.groups; ++g)
    for (int j = 0; j < p.lanes; ++j)
      if (p.lane_of(g, j) == (int)threadIdx.x) group = g, i = j;
  const auto fill = [&](u32* words, const Layout& layout, const std::vector<float>& matrix, int count, int size) {
    for (int v = 0; v < count; v += 2)
      words[v / 2] = pack(Half(), matrix[group * size + layout.at(i, v)], matrix[group * size + layout.at(i, v + 1)]);
  };
  fill(a, p.a, A, 1 << p.a.value.size(), p.M * p.K);
  fill(b, p.b, B, 1 << p.b.value.size(), p.N * p.K);
  p.mma(d, a, b);
  for (int v = 0; v < 1 << p.d.value.size(); ++v) D[group * p.M * p.N + p.d.at(i, v)] = d[v];
}

bool right(const Product& p) {
  product = &p;
  A.resize(p.groups * p.M * p.K), B.resize(p.groups * p.N * p.K), D.assign(p.groups * p.M * p.N, NAN);
  for (float& x : A) x = float(std::rand() % 9 - 4);
  for (float& x : B) x = float(std::rand() % 9 - 4);
  launch("multiply", multiply, dim3(1), 32, 0, nullptr, 0);
  for (int g = 0; g < p.groups; ++g)
    for (int m = 0; m < p.M; ++m)
      for (int n = 0; n < p.N; ++n) {
        float sum = 0;
        for (int k = 0; k < p.K; ++k) sum += A[g * p.M * p.K + m + k * p.M] * B[g * p.N * p.K + n + k * p.N];
        if (D[g * p.M * p.N + m + n * p.M] != sum) return false;
      }
  return true;
}

// Of the first row by the first column, these numbers and zeros.
float first_sum(const Product& p, const std::vector<float>& row, const std::vector<float>& column) {
  product = &p;
  A.assign(p.groups * p.M * p.K, 0), B.assign(p.groups * p.N * p.K, 0), D.assign(p.groups * p.M * p.N, NAN);
  for (size_t k = 0; k < row.size(); ++k) A[k * p.M] = row[k], B[k * p.N] = column[k];
  launch("multiply", multiply, dim3(1), 32, 0, nullptr, 0);
  return D[0];
}

int quad_lane(int group, int i) { return 4 * group + i % 4 + 16 * (i / 4); }
int same_lane(int, int i) { return i; }

u16 rows_of_16[16 * 8];
void transpose(int) {
  u32 d[2];
  ldmatrix_x2_trans(d, rows_of_16 + 8 * (threadIdx.x % 16));
  bool same = true;
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i)
      same &= u16(d[half] >> 16 * i) == (8 * half + 2 * (threadIdx.x % 4) + i) * 8 + threadIdx.x / 4;
  seen[threadIdx.x] = same;
}

}  // namespace

void all() {
  launch("exchange", exchange, dim3(3), 256, 1024, nullptr, true);
  bool same = true;
  for (int i = 0; i < 256; ++i) same &= seen[i] == float(255 - i);
  check(same, "threads exchange numbers across a barrier");
  launch("exchange", exchange, dim3(3), 256, 1024, nullptr, false);
  bool missed = false;
  for (float x : seen) missed |= std::isnan(x);
  check(missed, "without the barrier some are not there yet");
  check(fault_of(diverge, 0, 32, 0).find("diverged") != std::string::npos, "lanes that diverge");
  check(fault_of(half_at_the_barrier, 0, 64, 0).find("deadlock") != std::string::npos, "a barrier that some never reach");
  check(fault_of(write_past, 100, 32, 100).find("past its 100 bytes") != std::string::npos, "writing past shared memory");
  check(fault_of(write_past, 99, 32, 100).empty(), "writing at its end");
  check(fault_of(vote, 77, 256, 0).empty() && seen[0] == 1 && seen[255] == 1, "a vote of the block");

  const Product volta{8, 8, 4, 8, 4, {{1, 2, 4}, {8, 16}}, {{1, 2, 4}, {8, 16}}, {{1, 16, 4}, {8, 2, 32}}, quad_lane,
                      [](float* d, const u32* a, const u32* b) { mma_m8n8k4(*(float(*)[8])d, a, b); }};
  check(right(volta), "m8n8k4");
  Product by_rows = volta;
  by_rows.b = {{8, 16, 4}, {1, 2}};
  by_rows.mma = [](float* d, const u32* a, const u32* b) { mma_m8n8k4_rows(*(float(*)[8])d, a, b); };
  check(right(by_rows), "m8n8k4, B by rows");
  const Product turing{16, 8, 8, 32, 1, {{32, 64, 1, 2, 4}, {16, 8}}, {{16, 32, 1, 2, 4}, {8}},
                       {{32, 64, 1, 2, 4}, {16, 8}}, same_lane,
                       [](float* d, const u32* a, const u32* b) { mma_m16n8k8(d, a, b[0]); }};
  check(right(turing), "m16n8k8");
  const Product ampere{16, 8, 16, 32, 1, {{32, 64, 1, 2, 4}, {16, 8, 128}}, {{16, 32, 1, 2, 4}, {8, 64}},
                       {{32, 64, 1, 2, 4}, {16, 8}}, same_lane,
                       [](float* d, const u32* a, const u32* b) { mma_m16n8k16(Half(), d, a, b); }};
  check(right(ampere), "m16n8k16");

  for (const Product& p : {volta, by_rows, turing, ampere}) {
    const bool spare_bit = p.lanes == 32;  // from Turing on
    check(first_sum(p, {1, 0x1p-12f, 0x1p-12f}, {1, 0x1p-12f, 0x1p-12f}) == (spare_bit ? 1 + 0x1p-23f : 1),
          "halves of the last place add up where there is a bit to spare");
    check(first_sum(p, {1, 0x1p-12f}, {1, 0x1.8p-11f}) == 1 + 0x1p-23f, "a sum is cut off, not rounded");
    check(first_sum(p, {-1, -0x1p-12f}, {1, 0x1.8p-11f}) == -1 - 0x1p-23f, "towards 0");
  }

  for (int i = 0; i < 16 * 8; ++i) rows_of_16[i] = u16(i);
  launch("transpose", transpose, dim3(1), 32, 0, nullptr, 0);
  same = true;
  for (int i = 0; i < 32; ++i) same &= seen[i] == 1;
  check(same, "ldmatrix.trans");
  check(pack(Half(), 1.f + 0x1p-11f, 65504.f) == 0x7bff3c00, "float16 rounds to nearest, ties to even");
  check(pack(Bfloat16(), 1.f + 0x1.8p-8f, 1.f + 0x1p-8f) == 0x3f803f81, "bfloat16 likewise");
}

}  // namespace ifnd::cuda

int main() {
  ifnd::cuda::all();
  return ifnd::cuda::failures != 0;
}
