// The table of single-threaded kernels that each instruction set provides. The drivers (info_nce.cpp,
// assign_clusters.cpp) split the work, own the memory and call through it.
#pragma once

#include "problem.h"

namespace ifnd {

struct Kernels {
  const char* isa;
  int lanes;  // queries (or features) that one panel holds: work is split in multiples of it

  // Forward: bytes of workspace for `rows` queries; one pass over `keys` for the queries `rows`, into a
  // workspace; the results of `rows` from `chunks` such workspaces, `stride` bytes apart, all started at
  // query `first_row`, in order.
  size_t (*forward_bytes)(const InfoNceForward&, int64_t rows);
  void (*forward_pass)(const InfoNceForward&, Range rows, Range keys, void* workspace);
  void (*forward_finish)(const InfoNceForward&, int64_t first_row, int64_t group_rows, Range rows,
                         void* workspaces, size_t stride, int chunks);

  // Gradient of the negatives: a group of packed queries, shared by the threads; then one pass over `keys`
  // for that group with a workspace of the thread's own. `first`: overwrite the gradient, else add to it.
  size_t (*group_bytes)(const InfoNceNegativesGrad&, int64_t rows);
  size_t (*pass_bytes)(const InfoNceNegativesGrad&);
  void (*group_pack)(const InfoNceNegativesGrad&, Range rows, int panel, void* group);
  void (*negatives_pass)(const InfoNceNegativesGrad&, Range rows, Range keys, const void* group,
                         void* workspace, bool first);

  // Assignment: half the squared norms of the centroids `range`; bytes of workspace for `rows` features;
  // labels and confidence of the rows at `places` (the rows of those numbers, where `visits` has none). half_norms is
  // null for the inner product. Where packed_bytes is not 0, a faster, less precise pass can first rule out most
  // centroids, given these packed, tile -1 before all others; returns the number of rows for which that was in vain.
  void (*half_norms)(const AssignClusters&, Range centroids, float* half_norms);
  size_t (*assign_bytes)(const AssignClusters&, int64_t rows);
  size_t (*packed_bytes)(const AssignClusters&);
  int64_t (*tile_centroids)(int D);  // of a packed tile
  int64_t (*packed_tiles)(const AssignClusters&);
  void (*pack_centroids)(const AssignClusters&, const float* half_norms, const int32_t* order, int64_t tile,
                         void* packed);
  int64_t (*assign_rows)(const AssignClusters&, const float* half_norms, const Visits&, const void* packed,
                         Range places, void* workspace);

  // Reassignment: how far centroids have moved, at most; squared distances of rows to their label's centroid, and how
  // many tiles of centroids they have to be compared with, `beyond` as in Visits, `longest` the longest centroid.
  void (*drifts)(const Reassign&, Range centroids, float* drifts);
  void (*tiles_to_visit)(const Reassign&, const float* beyond, int64_t tiles, float longest, Range rows,
                         float* distances, int32_t* tiles_of_rows);

  void (*sum_cluster)(const ClusterSums&, int64_t cluster, const int64_t* rows, int64_t n);

  void (*exp)(const float* x, float* y, int64_t n);  // the kernels' own exp, for its test
};

namespace portable { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512vnni { extern const Kernels kernels; }
namespace avx512bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }

}  // namespace ifnd
