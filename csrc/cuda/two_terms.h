// float32 rows as two terms of float16, high + low: within about 2^-22 of a row's largest number.
//
// Each row has a power of 2 of its own, its `unit`, that brings its largest number between 2^14 and 2^15, within float16.
#pragma once

#include "arguments.h"
#include "number.h"

namespace ifnd::cuda {

constexpr int TERMS_WARPS = 8;

// One warp: one row.
__global__ void __launch_bounds__(32 * TERMS_WARPS) two_terms_kernel(TwoTermsArguments p) {
  const int row = blockIdx.x * TERMS_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= p.count) return;
  const float* x = p.rows + (long long)row * p.columns;
  float largest = 0;
  bool finite = true;
  for (int column = lane; column < p.columns; column += 32) {
    const float size = fabsf(x[column]);
    finite = finite && size < infinity();  // not so for NaN
    largest = fmaxf(largest, size);
  }
  finite = !__any_sync(0xffffffffu, !finite);
  const int exponent = __float_as_int(fmaxf(max_of_lanes(largest), 0x1p-100f)) >> 23;
  const float scale = __int_as_float((268 - exponent) << 23), unit = __int_as_float((exponent - 14) << 23);

  u16* terms = p.terms + (long long)row * 2 * p.D;
  float squares[3] = {};  // of the row, its high terms, and what these leave
  for (int column = lane; column < p.D; column += 32) {
    const float number = finite && column < p.columns ? x[column] * scale : 0.f;
    const u16 high = (u16)pack(Half(), number, 0.f);
    const float rounded = unpack(Half(), high), rest = number - rounded;
    terms[column] = high;
    terms[p.D + column] = (u16)pack(Half(), rest, 0.f);
    squares[0] += number * number, squares[1] += rounded * rounded, squares[2] += rest * rest;
  }
  for (int i = 0; p.lengths && i < 3; ++i) {
    const float length = sqrtf(sum_of_lanes(squares[i])) * unit;
    if (lane == 0) p.lengths[(long long)row * 3 + i] = length;
  }
  if (lane != 0) return;
  p.units[row] = finite ? unit : infinity() - infinity();
  // The largest of all, as positive floats are ordered as their bits are; most rows need not ask for it.
  int* largest_unit = (int*)p.summary;
  if (finite && __float_as_int(unit) > *(volatile int*)largest_unit) atomicMax(largest_unit, __float_as_int(unit));
  if (!finite) p.summary[1] = 1;
}

}  // namespace ifnd::cuda
