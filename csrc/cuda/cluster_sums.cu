#include "cluster_sums.h"

#include "api.h"
#include "launch.h"

namespace ifnd::cuda {

void cluster_sums(const ClusterSumsArguments& p, Stream stream) {
  constexpr int threads = 32 * SUMS_WARPS;
  launch("cluster_sums_kernel", cluster_sums_kernel, dim3(p.C, (p.D + SUMS_COLUMNS - 1) / SUMS_COLUMNS, p.parts), threads,
         threads * int(sizeof(double)), stream, p);
  launch("distances_kernel", distances_kernel, dim3((p.N + SUMS_WARPS - 1) / SUMS_WARPS), threads, 0, stream, p);
}

}  // namespace ifnd::cuda
