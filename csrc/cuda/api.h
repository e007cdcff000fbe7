// The host functions of the kernels: they launch on `stream`, which belongs to the current device, and return at once.
// They throw std::runtime_error where a launch fails.
#pragma once

#include "assign.h"
#include "launch.h"

namespace ifnd::cuda {

void assign_clusters(const AssignArguments& p, bool bfloat16, Assign mode, Stream stream);

}  // namespace ifnd::cuda
