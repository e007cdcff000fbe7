#include "device.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace ifnd::cuda {

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver and no device are answers here: leave no error behind for the next call
    return 0;
  }
  return count;
}

Device device(int index) {
  const int count = device_count();
  if (index < 0 || index >= count)
    throw std::out_of_range("no device " + std::to_string(index) +
                            ": CUDA sees " + std::to_string(count));
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
  return {properties.name, properties.major, properties.minor, properties.multiProcessorCount,
          properties.totalGlobalMem};
}

}  // namespace ifnd::cuda
