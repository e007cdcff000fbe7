// What the kernels are told. Pointers are to the device's memory.
#pragma once

namespace ifnd::cuda {

typedef unsigned short u16;  // a float16 or bfloat16

constexpr int MAX_LEVELS = 16;

enum class Numbers { FLOAT16, BFLOAT16, TWO_TERMS };  // of operands; the last are float32, two terms of float16 each

struct TwoTermsArguments {
  const float* rows;  // (count, columns)
  u16* terms;         // (count, 2 * D): high and low terms, each filled up to D, which divides by 8
  float* units;       // (count,): how many times its terms a row is; NaN where it has a number that is not finite
  float* lengths;     // (count, 3): of the row, its high terms, and what these leave; or null
  float* summary;     // the largest unit, and 1 where one is NaN; zeros before
  int count, columns, D;
};

enum class Assign { LABELS, CONFIDENCE, SCREEN };

struct AssignArguments {
  const u16 *features, *centroids;  // rows of D numbers of one or two terms; D divides by 8
  const float* half_norms;          // h, or null for 0
  const float *feature_units, *centroid_units;  // of two terms
  const int* rows;                  // LABELS: the rows to do, *row_count of them, or null for all N
  const int* row_count;
  const float* margins;  // SCREEN, (N,)
  int* labels;
  float* confidence;  // CONFIDENCE
  int *near_rows, *near_count;  // SCREEN: the rows to do again
  const float *exact_features, *exact_centroids;  // assign_exactly: (N, columns), (C, columns)
  const float* centroid_summary;                  // that of TwoTermsArguments
  int N, C, D, columns;
  float scale;
};

enum class Pass { DENSE, MARKED_SUMS, MARKED_GRAD, NEGATIVES };

struct Side {  // of the matrix of pairs: queries or negatives
  const u16* features;  // (count, D), or (count, 2 * D)
  const float *units, *largest_unit;  // of two terms: (count,), and (1,)
  const int* labels;    // (count, L)
  const long long* ids;
  int count;
};

struct InfoNceArguments {
  Side rows, columns;        // queries and negatives; for NEGATIVES the other way round
  int D, L, split_columns, tiles;  // a split is a multiple of a tile; `tiles` in all
  int grad_columns;  // D, less what fills rows up to pieces of 16 bytes
  int n_losses;  // L, or 1 whose false negatives are those of any level, or of all
  float scale, shift;  // log2(e) / tau; weights are multiplied by 2^shift, else small ones lose digits in 16 bits
  bool attract, all_levels, with_grad;
  float *split_max, *split_sum;               // (splits, B): of products; of exponentials
  float* split_grad;                          // (splits, B, grad_columns)
  unsigned char* flags;                       // (groups of 32 queries, tiles), or null where none is visited again
  float *level_max, *level_sum;               // (splits, B, n_losses), or where false negatives attract products' sums
  int* level_count;                           // (splits, B, n_losses)
  const float *split_factor, *log_normalizer;  // (splits, B), (B, n_losses)
  const int* false_negative_counts;            // (B, n_losses)
  const float* loss_grad;                      // NEGATIVES: (B,)
  float* negatives_grad;                       // NEGATIVES: (K, grad_columns)
};

struct NormaliseArguments {
  const void *query, *positive;  // (B, D), of the kind that `number` reads
  const float *split_max, *split_sum, *level_max, *level_sum, *split_grad;
  const int* level_count;
  float *loss, *log_normalizer, *positive_weight, *split_factor, *query_grad;
  int* false_negative_counts;
  int B, D, n_losses, splits, kind;  // kind: 0 float32, 1 bfloat16, 2 float16
  float scale, inverse_temperature;
  bool attract;
  bool has_marked_pass;  // flagged tiles were visited again: there are level sums, and split_grad carries its factor
};

struct ClusterSumsArguments {
  const void* features;     // (N, D), of the kind that `number` reads
  const float* centroids;   // (C, D)
  const int* labels;        // (N,)
  const long long* order;   // (N,): rows by cluster
  const long long* begins;  // (C + 1,): a cluster's first place in `order`
  double* sums;             // (parts, C, D)
  float* distances;         // (N,)
  int N, C, D, parts, kind;
};

}  // namespace ifnd::cuda
