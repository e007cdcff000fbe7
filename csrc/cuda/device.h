// The GPUs that this process sees.
#pragma once

#include <cstddef>
#include <string>

namespace ifnd::cuda {

struct Device {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory;  // bytes
};

// 0 where there is no driver or no device.
int device_count();

// Throws std::out_of_range for a number that device_count() does not allow, std::runtime_error with CUDA's
// message where the query fails.
Device device(int index);

}  // namespace ifnd::cuda
