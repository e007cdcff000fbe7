// Numbers of any dtype; sums and maxima over a warp.
#pragma once

#include "ptx.h"

namespace ifnd::cuda {

// Number i of a matrix: 0 float32, 1 bfloat16, 2 float16.
__device__ __forceinline__ float number(const void* x, long long i, int kind) {
  if (kind == 0) return ((const float*)x)[i];
  return kind == 1 ? unpack(Bfloat16(), ((const u16*)x)[i]) : unpack(Half(), ((const u16*)x)[i]);
}

template <class N>
__device__ __forceinline__ N sum_of_lanes(N x) {
  for (int partner = 16; partner; partner /= 2) x += __shfl_xor_sync(0xffffffffu, x, partner);
  return x;
}

__device__ __forceinline__ float max_of_lanes(float x) {
  for (int partner = 16; partner; partner /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, partner));
  return x;
}

}  // namespace ifnd::cuda
