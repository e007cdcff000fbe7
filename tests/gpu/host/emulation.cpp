#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/cuda/device.h"

namespace ifnd::cuda {

constexpr int SHARED_BYTES = 227 * 1024;
alignas(16) unsigned char shared_memory[SHARED_BYTES + 64];

namespace emulation {

Thread* current;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024;

struct Warp {
  unsigned char inputs[32 * LANE_BYTES], outputs[32 * LANE_BYTES];
  const char* tag = nullptr;
  int arrived = 0;
  unsigned turn = 0;
};

// Where a fiber, or the scheduler, goes on.
struct Place {
  ucontext_t first;  // entered at once, on the fiber's own stack
  jmp_buf later;
  bool entered = true;
};

// swapcontext, without its system calls for the mask of signals, which took most of the time. The address sanitizer
// knows stacks by swapcontext alone.
void go_on(Place& from, Place& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.first, &to.first);
#else
  if (_setjmp(from.later)) return;
  if (to.entered) _longjmp(to.later, 1);
  to.entered = true;
  setcontext(&to.first);
#endif
}

struct Fiber {
  Place place;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  Thread thread;
  const unsigned* waits_for = nullptr;  // a turn that must differ from `seen`
  unsigned seen = 0;
  bool done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
Fiber* running;
Place scheduler;
const std::function<void()>* body;
std::string fault;
int in_block, at_barrier;
unsigned barrier_turn;
bool any_at_barrier, any_at_last_barrier;

void wait(const unsigned& turn) {
  running->waits_for = &turn;
  running->seen = turn;
  go_on(running->place, scheduler);
  if (!fault.empty()) throw std::runtime_error(fault);
}

void start() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    fault = error.what();
  }
  running->done = true;
  go_on(running->place, scheduler);
}

void run_block(int threads, dim3 block, std::mt19937& random) {
  warps.assign((threads + 31) / 32, Warp());
  while ((int)fibers.size() < threads) fibers.emplace_back(new Fiber);
  in_block = threads, at_barrier = 0, any_at_barrier = false;
  std::vector<Fiber*> order;
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *fibers[i];
    f.thread = {dim3(i, 0, 0), block, dim3(threads), i % 32};
    f.done = false, f.waits_for = nullptr;
    f.place.entered = false;
    ucontext_t& context = f.place.first;
    getcontext(&context);
    context.uc_stack.ss_sp = f.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
    order.push_back(&f);
  }
  // Warps in random order, a lane after another: a warp runs ahead of the others until it must wait for them.
  std::vector<int> warp_order(warps.size());
  for (size_t w = 0; w < warps.size(); ++w) warp_order[w] = int(w);
  while (true) {
    std::shuffle(warp_order.begin(), warp_order.end(), random);
    bool any = false, all_done = true;
    for (int w : warp_order)
      for (bool again = true; again;) {
        again = false;
        for (int i = 32 * w; i < std::min(threads, 32 * w + 32); ++i) {
          Fiber* f = order[i];
          if (f->done) continue;
          all_done = false;
          if (f->waits_for && *f->waits_for == f->seen && fault.empty()) continue;
          f->waits_for = nullptr;
          running = f;
          current = &f->thread;
          go_on(scheduler, f->place);
          any = again = true;
        }
      }
    if (all_done) return;
    if (!any) fault = "deadlock: threads wait for others that never come";
  }
}

}  // namespace

bool barrier_or(bool x) {
  any_at_barrier |= x;
  barrier();
  return any_at_last_barrier;  // the next cannot be passed before all have read this
}

void barrier() {
  if (++at_barrier == in_block) {
    at_barrier = 0;
    any_at_last_barrier = any_at_barrier;
    any_at_barrier = false;
    ++barrier_turn;
  } else {
    wait(barrier_turn);
  }
}

void together(const char* tag, const void* input, size_t input_bytes, void* output, size_t output_bytes,
              void (*all)(const unsigned char*, unsigned char*)) {
  if (input_bytes > LANE_BYTES || output_bytes > LANE_BYTES) throw std::logic_error("LANE_BYTES is too small");
  const int lane = current->lane;
  Warp& warp = warps[current->index.x / 32];
  if (warp.arrived && std::strcmp(warp.tag, tag) != 0)
    throw std::runtime_error(std::string("lanes diverged: one at ") + tag + ", another at " + warp.tag);
  warp.tag = tag;
  std::memcpy(warp.inputs + lane * LANE_BYTES, input, input_bytes);
  if (++warp.arrived == 32) {
    all(warp.inputs, warp.outputs);
    warp.arrived = 0;
    ++warp.turn;
  } else {
    wait(warp.turn);
  }
  std::memcpy(output, warp.outputs + lane * LANE_BYTES, output_bytes);
}

void run(const char* name, dim3 blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > SHARED_BYTES) throw std::runtime_error(std::string(name) + ": too much shared memory");
  std::mt19937 random(threads + blocks.x);
  body = &kernel;
  fault.clear();
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        std::memset(shared_memory, 0xff, sizeof shared_memory);
        run_block(threads, dim3(x, y, z), random);
        const unsigned char* past = shared_memory + shared_bytes;  // all as it was: like the first, and each like the next
        const size_t count = sizeof shared_memory - shared_bytes;
        if (fault.empty() && (*past != 0xff || std::memcmp(past, past + 1, count - 1) != 0))
          fault = "it writes past its " + std::to_string(shared_bytes) + " bytes of shared memory";
        if (!fault.empty()) throw std::runtime_error(std::string(name) + ": " + fault);
      }
}

}  // namespace emulation

// ---- 16-bit numbers -------------------------------------------------------------------------------------------------

namespace {

u16 round_bfloat16(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
u16 round_half(float x) {
  const _Float16 h = (_Float16)x;
  u16 bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

}  // namespace

u32 pack(Half, float low, float high) { return round_half(low) | u32(round_half(high)) << 16; }
u32 pack(Bfloat16, float low, float high) { return round_bfloat16(low) | u32(round_bfloat16(high)) << 16; }
float unpack(Half, u16 x) {
  _Float16 h;
  std::memcpy(&h, &x, 2);
  return float(h);
}
float unpack(Bfloat16, u16 x) { return __int_as_float(int(u32(x) << 16)); }

// ---- tensor cores ---------------------------------------------------------------------------------------------------

namespace {

struct Operands {
  float d[8];
  u32 a[4], b[2];
};

template <class T>
float number(const u32* words, int i) {
  return unpack(T(), u16(words[i / 2] >> 16 * (i % 2)));
}

int exponent(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return int(bits >> 52 & 0x7ff) - 1023;
}

double power_of_2(int exponent) {
  const std::uint64_t bits = std::uint64_t(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// x without what is smaller than 2^unit.
double cut(double x, int unit) { return std::trunc(x * power_of_2(-unit)) * power_of_2(unit); }

// c and exact products, TERMS at a time, as tensor cores add them up (Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical
// behavior of NVIDIA tensor cores"): aligned to the largest of them, cut off EXTRA bits past its 24, and the sum to 24.
template <int TERMS, int EXTRA>
float add_products(float c, const double* products, int count) {
  for (int first = 0; first < count; first += TERMS) {
    double largest = std::fabs(double(c)), exact = c;
    for (int i = first; i < first + TERMS; ++i) largest = std::max(largest, std::fabs(products[i])), exact += products[i];
    if (!std::isfinite(exact) || largest == 0) {
      c = float(exact);
      continue;
    }
    const int unit = exponent(largest) - 23 - EXTRA;
    double sum = cut(c, unit);
    for (int i = first; i < first + TERMS; ++i) sum += cut(products[i], unit);
    c = sum == 0 ? 0.f : float(cut(sum, exponent(sum) - 23));
  }
  return c;
}

// Four (8, 8) += (8, 4) (4, 8); B by columns or by rows.
template <bool B_ROWS>
void quad_products(const unsigned char* inputs, unsigned char* outputs) {
  for (int quad = 0; quad < 4; ++quad) {
    float A[8][4], B[4][8];
    const auto lane_of = [&](int i) { return 4 * quad + i % 4 + 16 * (i / 4); };
    for (int i = 0; i < 8; ++i) {
      const Operands& in = *emulation::lane_of<Operands>(inputs, lane_of(i));
      for (int j = 0; j < 4; ++j) {
        A[i][j] = number<Half>(in.a, j);
        if (B_ROWS)
          B[i % 4][4 * (i / 4) + j] = number<Half>(in.b, j);
        else
          B[j][i] = number<Half>(in.b, j);
      }
    }
    for (int i = 0; i < 8; ++i) {
      const int lane = lane_of(i);
      const float* d = emulation::lane_of<Operands>(inputs, lane)->d;
      for (int j = 0; j < 8; ++j) {
        const int row = (lane & 1) + (j & 2) + (lane < 16 ? 0 : 4), column = (j & 4) + (lane & 2) + (j & 1);
        double products[4];
        for (int k = 0; k < 4; ++k) products[k] = double(A[row][k]) * B[k][column];
        emulation::lane_of<float>(outputs, lane)[j] = add_products<4, 0>(d[j], products, 4);
      }
    }
  }
}

// (16, 8) += (16, K) (K, 8), TERMS products at a time.
template <class T, int K, int TERMS>
void product(const unsigned char* inputs, unsigned char* outputs) {
  float A[16][K], B[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Operands& in = *emulation::lane_of<Operands>(inputs, lane);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < K / 2; ++i)
      A[group + (i / 2 % 2 ? 8 : 0)][2 * member + i % 2 + (i < 4 ? 0 : 8)] = number<T>(in.a, i);
    for (int i = 0; i < K / 4; ++i) B[2 * member + i % 2 + (i < 2 ? 0 : 8)][group] = number<T>(in.b, i);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
      double products[K];
      for (int k = 0; k < K; ++k) products[k] = double(A[row][k]) * B[k][column];
      const float before = emulation::lane_of<Operands>(inputs, lane)->d[i];
      emulation::lane_of<float>(outputs, lane)[i] = add_products<TERMS, 1>(before, products, K);
    }
}

template <int D, int A, int B>
void mma(const char* tag, float* d, const u32* a, const u32* b, void (*all)(const unsigned char*, unsigned char*)) {
  Operands in{};
  std::copy(d, d + D, in.d), std::copy(a, a + A, in.a), std::copy(b, b + B, in.b);
  emulation::together(tag, &in, sizeof in, d, D * sizeof(float), all);
}

}  // namespace

void mma_m8n8k4(float (&d)[8], const u32* a, const u32* b) { mma<8, 2, 2>("m8n8k4", d, a, b, quad_products<false>); }
void mma_m8n8k4_rows(float (&d)[8], const u32* a, const u32* b) {
  mma<8, 2, 2>("m8n8k4.row.row", d, a, b, quad_products<true>);
}
void mma_m16n8k8(float* d, const u32* a, u32 b) { mma<4, 2, 1>("m16n8k8", d, a, &b, product<Half, 8, 4>); }
void mma_m16n8k16(Half, float* d, const u32* a, const u32* b) {
  mma<4, 4, 2>("m16n8k16.f16", d, a, b, product<Half, 16, 8>);
}
void mma_m16n8k16(Bfloat16, float* d, const u32* a, const u32* b) {
  mma<4, 4, 2>("m16n8k16.bf16", d, a, b, product<Bfloat16, 16, 8>);
}

void ldmatrix_x2_trans(u32 (&d)[2], const u16* row) {
  emulation::together("ldmatrix", &row, sizeof row, d, sizeof d, [](const unsigned char* in, unsigned char* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 2; ++matrix) {
        const auto at = [&](int r) { return (*emulation::lane_of<const u16*>(in, 8 * matrix + r))[lane / 4]; };
        emulation::lane_of<u32>(out, lane)[matrix] = at(2 * (lane % 4)) | u32(at(2 * (lane % 4) + 1)) << 16;
      }
  });
}

// ---- the device -----------------------------------------------------------------------------------------------------

int device_count() { return 1; }
Device device(int) { return {"a CPU that emulates a GPU", 0, 0, 2, size_t(1) << 30}; }

}  // namespace ifnd::cuda
