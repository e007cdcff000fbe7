// Prints the instruction set that a CPU with the given facts (names of choice.h's) gets.
#include "choice.h"

#include <cstdio>
#include <cstring>

int main(int argc, char** argv) {
  const auto has = [&](const char* fact) {
    bool found = false;
    for (int i = 1; i < argc; ++i) found |= !std::strcmp(argv[i], fact);
    return found;
  };
  const ifnd::Cpu cpu{has("avx2"), has("avx512"), has("avx512vnni"), has("avx512bf16"), has("amx"), has("intel")};
  const char* const names[] = {"amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "portable"};
  for (int isa = 0; isa < 6; ++isa)
    if (runs(ifnd::Isa(isa), cpu) && by_default(ifnd::Isa(isa), cpu)) return std::puts(names[isa]) < 0;
  return 1;
}
