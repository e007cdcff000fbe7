// Kernel launches on the caller's stream, each of them checked.
#pragma once

#ifdef IFND_ON_HOST
#include "emulation.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace ifnd::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Throws std::runtime_error, naming the kernel, where it can't be launched.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, int shared_bytes, cudaStream_t stream,
            Parameters... parameters) {
  if (blocks.x == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024)  // more must be asked for
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  void* arguments[] = {&parameters...};
  check(cudaLaunchKernel(function, blocks, dim3(threads), arguments, shared_bytes, stream), name);
}

}  // namespace ifnd::cuda
#endif
