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
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
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
  cpu.amx = cpuid_bit(7, 0, 3, 24) && cpuid_bit(7, 0, 3, 22) && cpuid_bit(7, 0, 3, 25);
  cpu.intel = __builtin_cpu_is("intel");
  return cpu;
}
#else
Cpu this_cpu() { return {}; }
#endif

// Linux lets a process use the tiles when it has asked for them.
bool tiles_permitted() {
#if defined(__linux__) && defined(IFND_X86)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// Why kernels can't run here; null where they can.
const char* refusal(Isa isa, const Cpu& cpu) {
#ifdef IFND_EMULATED_TILES
  if (isa == Isa::amx) return nullptr;
#endif
  if (!runs(isa, cpu)) return "this CPU does not have it";
  if (isa == Isa::amx && !tiles_permitted()) return "the operating system does not let this process use its tiles";
  return nullptr;
}

struct Candidate {
  Isa isa;
  const Kernels* kernels;
};

const Kernels& choose() {
  const Candidate candidates[] = {  // best first
#ifdef IFND_X86
#ifdef IFND_AMX
      {Isa::amx, &amx::kernels},
#endif
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
    const char* reason = refusal(candidate.isa, cpu);
    if (!reason) return *candidate.kernels;
    if (wanted) throw std::runtime_error(std::string("IFND_FAST_CPU_ISA=") + wanted + ": " + reason + "; unset it");
  }
  throw std::runtime_error(std::string("IFND_FAST_CPU_ISA must be portable, or on x86 also avx2, avx512, avx512vnni, "
                                       "avx512bf16 or, where the compiler knew it, amx, got '") + wanted + "'");
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
