// What the bindings (or a C++ caller) see.
#pragma once

#include "kernels.h"

namespace ifnd {

// The kernels in use: those that choice.h gives this CPU, or the ones that IFND_FAST_CPU_ISA names.
// Throws std::runtime_error for a value that is unknown, or that this CPU or build lacks.
const Kernels& kernels();

struct Feature {
  const char* name;
  bool present;
};
// Ends with a null name; empty where the CPU is not x86.
const Feature* cpu_features();

void info_nce_forward(const InfoNceForward&, int threads);
void info_nce_negatives_grad(const InfoNceNegativesGrad&, int threads);
void assign_clusters(const AssignClusters&, int threads);
// The number of rows for which screening was in vain; -1, and nothing done, where there is none.
int64_t reassign(const Reassign&, int threads);
bool cluster_sums(const ClusterSums&, int threads);  // false: a label is not in [0, C)

}  // namespace ifnd
