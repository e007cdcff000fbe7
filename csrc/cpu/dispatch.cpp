// Which instruction set's kernels run.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"
#include "choice.h"

#ifdef IFND_X86
#include <cpuid.h>
#endif

namespace ifnd {
namespace {

#ifdef IFND_X86
bool cpuid_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1);
}

Cpu this_cpu() {  // __builtin_cpu_supports also asks whether the operating system saves the registers
  Cpu cpu{};
  cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 2, 29);  // F16C
  cpu.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  cpu.avx512vnni = cpuid_bit(7, 0, 2, 11), cpu.avx512bf16 = cpuid_bit(7, 1, 0, 5);
  cpu.intel = __builtin_cpu_is("intel");
  return cpu;
}
#else
Cpu this_cpu() { return {}; }
#endif

struct Candidate {
  Isa isa;
  const Kernels* kernels;
};

const Kernels& choose() {
  const Candidate candidates[] = {  // best first
#ifdef IFND_X86
      {Isa::avx512bf16, &avx512bf16::kernels},
      {Isa::avx512vnni, &avx512vnni::kernels},
      {Isa::avx512, &avx512::kernels},
      {Isa::avx2, &avx2::kernels},
#endif
      {Isa::portable, &portable::kernels},
  };
  const Cpu cpu = this_cpu();
  const char* wanted = std::getenv("IFND_FAST_CPU_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  for (const Candidate& candidate : candidates) {
    if (wanted ? std::strcmp(wanted, candidate.kernels->isa) != 0 : !by_default(candidate.isa, cpu)) continue;
    if (runs(candidate.isa, cpu)) return *candidate.kernels;
    if (wanted)
      throw std::runtime_error(std::string("IFND_FAST_CPU_ISA=") + wanted + ": this CPU does not have it; unset it");
  }
  throw std::runtime_error(
      std::string("IFND_FAST_CPU_ISA must be portable, or on x86 also avx2, avx512, avx512vnni or avx512bf16, got '") +
      wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Feature* cpu_features() {
#ifdef IFND_X86
  static const Feature features[] = {
      {"avx2", bool(__builtin_cpu_supports("avx2"))},
      {"fma", bool(__builtin_cpu_supports("fma"))},
      {"f16c", cpuid_bit(1, 0, 2, 29)},
      {"avx512f", bool(__builtin_cpu_supports("avx512f"))},
      {"avx512bw", bool(__builtin_cpu_supports("avx512bw"))},
      {"avx512dq", bool(__builtin_cpu_supports("avx512dq"))},
      {"avx512vl", bool(__builtin_cpu_supports("avx512vl"))},
      {"avx512vnni", runs(Isa::avx512vnni, this_cpu())},
      {"avx512bf16", runs(Isa::avx512bf16, this_cpu())},
      {"amx_tile", cpuid_bit(7, 0, 3, 24)},
      {"amx_bf16", cpuid_bit(7, 0, 3, 22)},
      {"amx_int8", cpuid_bit(7, 0, 3, 25)},
      {nullptr, false},
  };
#else
  static const Feature features[] = {{nullptr, false}};
#endif
  return features;
}

}  // namespace ifnd
