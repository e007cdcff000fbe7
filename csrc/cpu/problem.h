// What the callers hand over: plain descriptions of one call, shared by every instruction set's kernels.
// Matrices are row-major and contiguous; a null pointer is an absent argument.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ifnd {

enum class DType : int { float32, bfloat16, float16 };
enum class Strategy : int { eliminate, attract, keep };
// What a key has to have in common with a query to be its false negative: the label of level l, in the loss of that
// level; or of any or of all levels, in one loss.
enum class Combination : int { mean, any, all };
enum class Metric : int { inner_product, l2 };

constexpr int kMaxDim = 16384;
constexpr int kMaxLevels = 16;

struct Range {
  int64_t begin, end;
};

struct InfoNce {
  const void* query;      // (B, D)
  const void* negatives;  // (K, D)
  const int32_t* query_labels;     // (B, label_columns), negative: no label
  const int32_t* negative_labels;  // (K, label_columns)
  const int64_t* query_ids;        // (B,), negative: unknown
  const int64_t* negative_ids;     // (K,)
  const float* ceiling;            // (B,) or null: a key with q.n above it is in no sum
  int64_t B, K;
  int D, label_columns, L;  // L losses: label_columns, or 1 where the levels are combined
  DType dtype;
  double temperature;
  Strategy strategy;
  Combination combination;
};

struct InfoNceForward : InfoNce {
  const void* positive;            // (B, D)
  const float* log_hard;           // (B,) or null: of exponentials that join the query's sums at every level
  float* loss;                     // (B,)
  float* query_grad;               // (B, D) or null
  float* positive_weight;          // (B,)
  float* log_normalizer;           // (B, L)
  int32_t* false_negative_counts;  // (B, L)
};

struct InfoNceNegativesGrad : InfoNce {
  const float* loss_grad;                // (B,)
  const float* log_normalizer;           // (B, L)
  const int32_t* false_negative_counts;  // (B, L)
  float* negatives_grad;                 // (K, D)
};

struct AssignClusters {
  const void* features;   // (N, D)
  const void* centroids;  // (C, D)
  int64_t N, C;
  int D;
  DType dtype;
  Metric metric;
  double temperature;
  int32_t* labels;    // (N,), -1 where no centroid has a similarity that is a number
  float* confidence;  // (N,) or null
};

// Lloyd's step: labels of the nearest centroids by l2, from those of centroids that have moved since. `bounds` keeps less
// than each row's distance to every centroid but its own, from one call to the next.
struct Reassign {
  AssignClusters now;     // labels: in (outside 0..C-1: none yet) and out
  const float* previous;  // (C, D), what the labels and bounds are of; null: there are none yet
  float* bounds;          // (N,), in and out
};

// Which rows are compared with which centroids, where that is not all with all; null where it is.
struct Visits {
  const int32_t* order;    // (C,) centroids as they are visited, in tiles
  const int32_t* rows;     // rows as they are visited
  const int32_t* tiles;    // how many tiles each of them is compared with: descending
  const float* distances;  // (N,) squared, to the label so far
  const float* beyond;     // (tiles + 1,) how far, at most, centroids from that tile on have moved
  float* bounds;           // (N,) as above, to be updated
};

struct ClusterSums {
  const void* features;     // (N, D)
  const int32_t* labels;    // (N,)
  const float* centroids;   // (C, D)
  int64_t N, C;
  int D;
  DType dtype;
  double* sums;      // (C, D)
  int64_t* counts;   // (C,)
  float* distances;  // (N,), squared, to the row's own centroid
};

}  // namespace ifnd
