// simd.h's pairs of bfloat16 for emulated tiles on a CPU without AVX512-BF16.
#pragma once

IFND_BEGIN

// Rounded to nearest even; denormal numbers give 0.
IFND_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t b = bits<uint32_t>(x);
  if (x != x) return uint16_t(b >> 16 | 0x40);
  if ((b & 0x7f800000u) == 0) return uint16_t(b >> 16 & 0x8000);
  return uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

IFND_INLINE vuint to_bfloat16(vfloat first, vfloat second) {
  float x[2 * W];
  uint16_t out[2 * W];
  store(x, first), store(x + W, second);
  for (int i = 0; i < 2 * W; ++i) out[i] = to_bfloat16(x[i]);
  vuint pairs;
  memcpy(&pairs, out, sizeof pairs);
  return pairs;
}

IFND_INLINE vuint to_pairs(vfloat first, vfloat second) {
  float x[2 * W];
  uint32_t out[W];
  store(x, first), store(x + W, second);
  for (int i = 0; i < W; ++i) out[i] = to_bfloat16(x[i]) | uint32_t(to_bfloat16(x[W + i])) << 16;
  return load(out);
}

IFND_END
