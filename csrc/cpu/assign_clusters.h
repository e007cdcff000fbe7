// What assignment (assign_clusters.cpp) and Lloyd's step (reassign.cpp) share.
#pragma once

#include "api.h"
#include "memory.h"

namespace ifnd {

// Half the squared norm of every centroid.
void half_norms_of(const AssignClusters&, int threads, float* half_norms);

// Labels, and what else is wanted, of the rows at n places; returns for how many of them screening was in vain.
int64_t assign_places(const AssignClusters&, const float* half_norms, const Visits&, int64_t n, int threads);

}  // namespace ifnd
