// The host functions of the kernels: they launch on `stream`, which belongs to the current device, and return at once.
// They throw std::runtime_error where a launch fails.
#pragma once

#include "arguments.h"

struct CUstream_st;

namespace ifnd::cuda {

using Stream = ::CUstream_st*;  // a cudaStream_t

void two_terms(const TwoTermsArguments& p, Stream stream);
void assign_clusters(const AssignArguments& p, Numbers numbers, Assign mode, Stream stream);
void assign_exactly(const AssignArguments& p, Stream stream);

// Blocks of `warps` warps (1 to MAX_LOSS_WARPS), each for 32 rows a warp and one of the `splits` of the columns.
void info_nce(const InfoNceArguments& p, Numbers numbers, Pass pass, int warps, int splits, Stream stream);
void info_nce_normalise(const NormaliseArguments& p, Stream stream);
void info_nce_add_splits(const NormaliseArguments& p, Stream stream);
void cluster_sums(const ClusterSumsArguments& p, Stream stream);

}  // namespace ifnd::cuda
