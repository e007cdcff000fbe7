// Which instruction set's kernels run.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"

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

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpuid_bit(1, 0, 2, 29);  // F16C
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512() && cpuid_bit(7, 0, 2, 11); }
bool has_avx512bf16() { return has_avx512vnni() && cpuid_bit(7, 1, 0, 5); }
#endif

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
  const Candidate candidates[] = {  // best first
#ifdef IFND_X86
      {&avx512bf16::kernels, has_avx512bf16()},
      {&avx512vnni::kernels, has_avx512vnni()},
      {&avx512::kernels, has_avx512()},
      {&avx2::kernels, has_avx2()},
#endif
      {&portable::kernels, true},
  };
  const char* wanted = std::getenv("IFND_FAST_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (wanted && *wanted && std::strcmp(wanted, candidate.kernels->isa) != 0) continue;
    if (candidate.runs) return *candidate.kernels;
    if (wanted && *wanted)
      throw std::runtime_error(std::string("IFND_FAST_CPU_ISA=") + wanted + ": this CPU does not have it; unset it");
  }
  throw std::runtime_error(std::string("IFND_FAST_CPU_ISA must be portable, or on x86 also avx2, avx512, avx512vnni or avx512bf16, got '") +
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
      {"avx512vnni", has_avx512vnni()},
      {"avx512bf16", has_avx512bf16()},
      {"amx_tile", cpuid_bit(7, 0, 3, 24)},
      {"amx_bf16", cpuid_bit(7, 0, 3, 22)},
      {nullptr, false},
  };
#else
  static const Feature features[] = {{nullptr, false}};
#endif
  return features;
}

}  // namespace ifnd
