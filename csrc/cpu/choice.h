// Which instruction sets' kernels a CPU runs, and which it gets: apart from asking the CPU (dispatch.cpp), so that it is
// tested with the facts of any. It is by those facts alone and not by timing, which could choose otherwise in the next
// process, whose results would then have other bits.
#pragma once

namespace ifnd {

struct Cpu {
  bool avx2, avx512, avx512vnni, avx512bf16;  // avx2: with FMA and F16C; avx512: with its parts bw, dq and vl
  bool amx;  // its tiles, and their products of bfloat16 and of 8-bit integers
  bool intel;
};

enum class Isa { amx, avx512bf16, avx512vnni, avx512, avx2, portable };  // the best first

inline bool runs(Isa isa, const Cpu& cpu) {
  switch (isa) {
    case Isa::amx: return runs(Isa::avx512bf16, cpu) && cpu.amx;
    case Isa::avx512bf16: return runs(Isa::avx512vnni, cpu) && cpu.avx512bf16;
    case Isa::avx512vnni: return runs(Isa::avx512, cpu) && cpu.avx512vnni;
    case Isa::avx512: return runs(Isa::avx2, cpu) && cpu.avx512;
    case Isa::avx2: return cpu.avx2;
    case Isa::portable: return true;
  }
  return false;
}

// Where it runs and nobody asks for another. On Intel's cores dot products of bfloat16 have half the rate of float32's
// multiply-add (214 against 427 GFLOP/s were measured), on AMD's twice. Kernels for AMX have never run on such a CPU.
inline bool by_default(Isa isa, const Cpu& cpu) {
  return isa == Isa::avx512bf16 ? !cpu.intel : isa != Isa::amx;
}

}  // namespace ifnd
