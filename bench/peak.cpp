// The most multiply-adds a core can do: nothing but registers. Sums, not stores, so that nothing else can limit it.
#include <cstdint>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr int kSums = kBytes == 64 ? 24 : 12;  // more than latency times units, fewer than registers

namespace {
// `step` is applied to every one of the sums, n times; returns something of them all.
template <class Step>
float repeat(int64_t n, const Step& step) {
  Vector sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = Vector{} + 1e-3f * float(i);
  for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
  Vector total{};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) total += sums[i];
  return total[0];
}
}  // namespace

// Both return how many floating point operations they did: 0 where the compiler's target has no such instruction.
extern "C" double float32_products(int64_t n, float* sink) {
  Vector x = Vector{} + 0.999f, y = Vector{} + 1e-4f;
  asm volatile("" : "+m"(x), "+m"(y));
  *sink = repeat(n, [=](Vector sum) { return sum * x + y; });
  return double(n) * kSums * 2 * (kBytes / 4);
}

extern "C" double bfloat16_products(int64_t n, float* sink) {
#ifdef __AVX512BF16__
  __m512i x = _mm512_set1_epi16(0x3f80), y = _mm512_set1_epi16(0x3a80);
  asm volatile("" : "+m"(x), "+m"(y));
  *sink = repeat(n, [=](Vector sum) { return Vector(_mm512_dpbf16_ps(__m512(sum), __m512bh(x), __m512bh(y))); });
  return double(n) * kSums * 4 * (kBytes / 4);
#else
  (void)n, *sink = 0.0f;
  return 0.0;
#endif
}
