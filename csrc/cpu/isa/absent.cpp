// In the place of kernels.cpp, for an instruction set that a test's program does without.
#include "../kernels.h"

#define IFND_STRING(x) #x
#define IFND_NAME(x) IFND_STRING(x)

namespace ifnd::IFND_ISA {
const Kernels kernels = {IFND_NAME(IFND_ISA)};
}  // namespace ifnd::IFND_ISA
