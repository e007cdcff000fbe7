// e^x for x <= 88 by x = n ln2 + r, |r| <= ln2/2:  e^x = 2^n (1 + r + r^2 P(r)), P of degree 4.
//
// The polynomial is within 1.1e-8 of e^r (interpolated at Chebyshev nodes); with rounding, at most 1.1 units in the
// last place in all (tests/native/test_sanitizers.py measures it). Below -86 the result is 0: off by 4.5e-38 at most,
// where the largest term of the sums here is 1. NaN gives NaN.
#pragma once

#include "simd.h"

IFND_BEGIN

IFND_INLINE vfloat exp(vfloat x) {
  const vfloat shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  vfloat shifted = x * splat(1.44269504f) + shift;
  vfloat n = shifted - shift;
  vfloat r = x - n * splat(0.693145752f);  // ln2 in two parts, the first exact in 15 bits
  r = r - n * splat(1.42860677e-6f);
  vfloat p = splat(1.39261836e-3f);
  p = p * r + splat(8.36317905e-3f);
  p = p * r + splat(4.16665546e-2f);
  p = p * r + splat(1.66665770e-1f);
  p = p * r + splat(0.5f);
  p = p * (r * r) + r;
  p = p + splat(1.0f);
  vuint exponent = (bits<vuint>(shifted) + 127u) << 23;  // the shift drops 12582912's own bits
  vfloat y = p * bits<vfloat>(exponent);
  return x < splat(-86.0f) ? splat(0.0f) : y;
}

IFND_INLINE float exp(float x) {
  float lane[W];
  store(lane, exp(splat(x)));
  return lane[0];
}

IFND_END
