// What csrc/cuda uses of CUDA, on a CPU: blocks run one after another, each thread of a block is a fiber that runs until
// it must wait for others. For tests only.
//
// The order in which waiting threads go on is random, so that a barrier left out shows; shared memory is filled with NaN
// before each block, and writing past what was asked for is an error. Fragment layouts are those of the PTX ISA's chapter
// "Matrix Fragments".
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace ifnd::cuda {

typedef unsigned short u16;
typedef unsigned int u32;
struct Half {};
struct Bfloat16 {};

// What shared_memory of a kernel is; 227 KB is the most of any card.
alignas(16) extern unsigned char shared_memory[];

namespace emulation {

struct Thread {
  dim3 index, block, threads;
  int lane;
};
extern Thread* current;

void barrier();
bool barrier_or(bool x);
// Every lane of the warp brings `bytes` of input; once all have, `all` computes the outputs of the 32 lanes from them.
// `tag` names the operation: lanes that meet at different ones have diverged, an error.
void together(const char* tag, const void* input, size_t input_bytes, void* output, size_t output_bytes,
              void (*all)(const unsigned char* inputs, unsigned char* outputs));
constexpr size_t LANE_BYTES = 128;  // between lanes' inputs and outputs

void run(const char* name, dim3 blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

template <class T>
T* lane_of(unsigned char* all, int lane) {
  return reinterpret_cast<T*>(all + lane * LANE_BYTES);
}
template <class T>
const T* lane_of(const unsigned char* all, int lane) {
  return reinterpret_cast<const T*>(all + lane * LANE_BYTES);
}

}  // namespace emulation

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, void*,
            Parameters... parameters) {
  emulation::run(name, blocks, threads, shared_bytes, [&] { kernel(parameters...); });
}

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::current->threads)

inline void __syncthreads() { emulation::barrier(); }
inline int __syncthreads_or(int x) { return emulation::barrier_or(x); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int partner) {
  struct Input { T x; int partner; } input{x, partner};
  if (mask != 0xffffffffu) throw std::logic_error("a shuffle of a part of a warp");
  T y;
  emulation::together("shfl_xor", &input, sizeof input, &y, sizeof y, [](const unsigned char* in, unsigned char* out) {
    for (int lane = 0; lane < 32; ++lane)
      *emulation::lane_of<T>(out, lane) =
          emulation::lane_of<Input>(in, lane ^ emulation::lane_of<Input>(in, lane)->partner)->x;
  });
  return y;
}

inline bool __any_sync(unsigned mask, bool x) {
  if (mask != 0xffffffffu) throw std::logic_error("a vote of a part of a warp");
  bool any;
  emulation::together("any", &x, sizeof x, &any, sizeof any, [](const unsigned char* in, unsigned char* out) {
    bool some = false;
    for (int lane = 0; lane < 32; ++lane) some |= *emulation::lane_of<bool>(in, lane);
    for (int lane = 0; lane < 32; ++lane) *emulation::lane_of<bool>(out, lane) = some;
  });
  return any;
}
inline void __syncwarp() { __any_sync(0xffffffffu, true); }

inline int atomicAdd(int* x, int y) { return *x += y, *x - y; }
inline int atomicMax(int* x, int y) { const int before = *x; return *x = y > before ? y : before, before; }
inline float __int_as_float(int x) { float y; std::memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; std::memcpy(&y, &x, 4); return y; }
inline int recomputed(int x) { return x; }
inline float infinity() { return INFINITY; }
inline float exp2_fast(float x) { return std::exp2(x); }

u32 pack(Half, float low, float high);
u32 pack(Bfloat16, float low, float high);
float unpack(Half, u16 x);
float unpack(Bfloat16, u16 x);

void mma_m8n8k4(float (&d)[8], const u32* a, const u32* b);
void mma_m8n8k4_rows(float (&d)[8], const u32* a, const u32* b);
void mma_m16n8k8(float* d, const u32* a, u32 b);
void mma_m16n8k16(Half, float* d, const u32* a, const u32* b);
void mma_m16n8k16(Bfloat16, float* d, const u32* a, const u32* b);
void ldmatrix_x2_trans(u32 (&d)[2], const u16* row);

}  // namespace ifnd::cuda
