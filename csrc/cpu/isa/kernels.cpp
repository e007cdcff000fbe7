#include "exp.h"
#include "info_nce_forward.h"
#include "info_nce_negatives.h"
#include "nearest.h"
#include "reassign.h"
#include "assign.h"
#include "cluster_sums.h"

IFND_BEGIN

static void exp_array(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = exp(x[i]);
}

#define IFND_STRING(x) #x
#define IFND_NAME(x) IFND_STRING(x)

const Kernels kernels = {
    IFND_NAME(IFND_ISA), LANES,      forward_bytes, forward_pass, forward_finish, group_bytes,  pass_bytes,
    group_pack,     negatives_pass,  half_norms,    assign_bytes, packed_bytes,   tile_centroids, packed_tiles,
    pack_centroids, assign_rows,     drifts,        tiles_to_visit, sum_cluster,  exp_array,
};

IFND_END
