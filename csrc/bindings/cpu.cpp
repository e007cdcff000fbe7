// The module ifnd_fast._cpu: addresses and sizes in, nothing out. The callers (ifnd_fast/ops) check tensors; here
// only what would make the kernels read out of bounds whatever the tensors are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cmath>

#include "../cpu/api.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(bool right, const char* message) {
  if (!right) throw nb::value_error(message);
}

void check_common(int64_t D, int dtype, double temperature, int threads) {
  check(D >= 1 && D <= ifnd::kMaxDim, "D must be 1 to 16384");
  check(dtype >= 0 && dtype <= 2, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  check(temperature > 0 && temperature < HUGE_VAL, "temperature must be a finite number above 0");
  check(threads >= 1 && threads <= 4096, "threads must be 1 to 4096");
}

template <class Problem>
Problem info_nce_problem(Address query, Address negatives, Address query_labels, Address negative_labels,
                         Address query_ids, Address negative_ids, int64_t B, int64_t K, int64_t D, int64_t L,
                         int dtype, double temperature, int strategy, int combination, Address ceiling, int threads) {
  check_common(D, dtype, temperature, threads);
  check(B >= 1 && K >= 0, "B must be 1 or more and K 0 or more");
  check(L >= 1 && L <= ifnd::kMaxLevels, "L must be 1 to 16");
  check(strategy >= 0 && strategy <= 2, "strategy must be 0 (eliminate), 1 (attract) or 2 (keep)");
  check(combination >= 0 && combination <= 2, "combination must be 0 (mean), 1 (any) or 2 (all)");
  Problem p{};
  p.query = pointer<const void>(query);
  p.negatives = pointer<const void>(negatives);
  p.query_labels = pointer<const int32_t>(query_labels);
  p.negative_labels = pointer<const int32_t>(negative_labels);
  p.query_ids = pointer<const int64_t>(query_ids);
  p.negative_ids = pointer<const int64_t>(negative_ids);
  p.ceiling = pointer<const float>(ceiling);
  p.B = B, p.K = K, p.D = int(D), p.label_columns = int(L);
  p.dtype = ifnd::DType(dtype);
  p.temperature = temperature;
  p.strategy = ifnd::Strategy(strategy);
  p.combination = ifnd::Combination(combination);
  p.L = p.combination == ifnd::Combination::mean ? int(L) : 1;
  return p;
}

void info_nce_forward(Address query, Address positive, Address negatives, Address query_labels,
                      Address negative_labels, Address query_ids, Address negative_ids, int64_t B, int64_t K,
                      int64_t D, int64_t L, int dtype, double temperature, int strategy, int combination,
                      Address loss, Address query_grad, Address positive_weight, Address log_normalizer,
                      Address false_negative_counts, int threads, Address ceiling, Address log_hard) {
  auto p = info_nce_problem<ifnd::InfoNceForward>(query, negatives, query_labels, negative_labels, query_ids,
                                                  negative_ids, B, K, D, L, dtype, temperature, strategy, combination,
                                                  ceiling, threads);
  p.positive = pointer<const void>(positive);
  p.log_hard = pointer<const float>(log_hard);
  p.loss = pointer<float>(loss);
  p.query_grad = pointer<float>(query_grad);
  p.positive_weight = pointer<float>(positive_weight);
  p.log_normalizer = pointer<float>(log_normalizer);
  p.false_negative_counts = pointer<int32_t>(false_negative_counts);
  nb::gil_scoped_release release;
  ifnd::info_nce_forward(p, threads);
}

void info_nce_negatives_grad(Address query, Address negatives, Address query_labels, Address negative_labels,
                             Address query_ids, Address negative_ids, int64_t B, int64_t K, int64_t D, int64_t L,
                             int dtype, double temperature, int strategy, int combination,
                             Address loss_grad, Address log_normalizer, Address false_negative_counts, Address negatives_grad,
                             int threads, Address ceiling) {
  auto p = info_nce_problem<ifnd::InfoNceNegativesGrad>(query, negatives, query_labels, negative_labels,
                                                        query_ids, negative_ids, B, K, D, L, dtype, temperature,
                                                        strategy, combination, ceiling, threads);
  p.loss_grad = pointer<const float>(loss_grad);
  p.log_normalizer = pointer<const float>(log_normalizer);
  p.false_negative_counts = pointer<const int32_t>(false_negative_counts);
  p.negatives_grad = pointer<float>(negatives_grad);
  nb::gil_scoped_release release;
  ifnd::info_nce_negatives_grad(p, threads);
}

void assign_clusters(Address features, Address centroids, int64_t N, int64_t C, int64_t D, int dtype, int metric,
                     double temperature, Address labels, Address confidence, int threads) {
  check_common(D, dtype, temperature, threads);
  check(N >= 1 && C >= 1 && C <= INT32_MAX, "N must be 1 or more and C 1 to 2^31 - 1");
  check(metric == 0 || metric == 1, "metric must be 0 (inner product) or 1 (l2)");
  const ifnd::AssignClusters p{pointer<const void>(features), pointer<const void>(centroids), N, C, int(D),
                               ifnd::DType(dtype), ifnd::Metric(metric), temperature, pointer<int32_t>(labels),
                               pointer<float>(confidence)};
  nb::gil_scoped_release release;
  ifnd::assign_clusters(p, threads);
}

int64_t reassign(Address features, Address previous, Address centroids, int64_t N, int64_t C, int64_t D, Address labels,
                 Address bounds, int threads) {
  check_common(D, 0, 1.0, threads);
  check(N >= 1 && N <= INT32_MAX && C >= 1 && C <= INT32_MAX, "N and C must be 1 to 2^31 - 1");
  const ifnd::AssignClusters now{pointer<const void>(features), pointer<const void>(centroids), N, C, int(D),
                                 ifnd::DType::float32, ifnd::Metric::l2, 1.0, pointer<int32_t>(labels), nullptr};
  nb::gil_scoped_release release;
  return ifnd::reassign({now, pointer<const float>(previous), pointer<float>(bounds)}, threads);
}

void cluster_sums(Address features, Address labels, Address centroids, int64_t N, int64_t C, int64_t D, int dtype,
                  Address sums, Address counts, Address distances, int threads) {
  check_common(D, dtype, 1.0, threads);
  check(N >= 1 && C >= 1 && C <= INT32_MAX, "N must be 1 or more and C 1 to 2^31 - 1");
  const ifnd::ClusterSums p{pointer<const void>(features), pointer<const int32_t>(labels),
                            pointer<const float>(centroids), N, C, int(D), ifnd::DType(dtype), pointer<double>(sums),
                            pointer<int64_t>(counts), pointer<float>(distances)};
  bool labels_in_range;
  {
    nb::gil_scoped_release release;
    labels_in_range = ifnd::cluster_sums(p, threads);
  }
  check(labels_in_range, "labels must be 0 to C - 1");
}

nb::dict features() {
  nb::dict out;
  for (const ifnd::Feature* f = ifnd::cpu_features(); f->name; ++f) out[f->name] = f->present;
  return out;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "IFND's kernels for the CPU. Arrays are addresses of row-major contiguous memory, 0 = absent.";
  m.def("isa", [] { return std::string(ifnd::kernels().isa); }, "The instruction set in use.");
  m.def("features", &features, "What this CPU has.");
  m.def("info_nce_forward", &info_nce_forward, "query"_a, "positive"_a, "negatives"_a, "query_labels"_a,
        "negative_labels"_a, "query_ids"_a, "negative_ids"_a, "B"_a, "K"_a, "D"_a, "L"_a, "dtype"_a,
        "temperature"_a, "strategy"_a, "combination"_a, "loss"_a, "query_grad"_a, "positive_weight"_a, "log_normalizer"_a,
        "false_negative_counts"_a, "threads"_a, "ceiling"_a = 0, "log_hard"_a = 0);
  m.def("info_nce_negatives_grad", &info_nce_negatives_grad, "query"_a, "negatives"_a, "query_labels"_a,
        "negative_labels"_a, "query_ids"_a, "negative_ids"_a, "B"_a, "K"_a, "D"_a, "L"_a, "dtype"_a,
        "temperature"_a, "strategy"_a, "combination"_a, "loss_grad"_a, "log_normalizer"_a, "false_negative_counts"_a,
        "negatives_grad"_a, "threads"_a, "ceiling"_a = 0);
  m.def("assign_clusters", &assign_clusters, "features"_a, "centroids"_a, "N"_a, "C"_a, "D"_a, "dtype"_a,
        "metric"_a, "temperature"_a, "labels"_a, "confidence"_a, "threads"_a);
  m.def("reassign", &reassign, "features"_a, "previous"_a, "centroids"_a, "N"_a, "C"_a, "D"_a, "labels"_a, "bounds"_a,
        "threads"_a, "How many rows had to be compared by the slower kernel with all centroids; -1: no kernel for this.");
  m.def("cluster_sums", &cluster_sums, "features"_a, "labels"_a, "centroids"_a, "N"_a, "C"_a, "D"_a, "dtype"_a,
        "sums"_a, "counts"_a, "distances"_a, "threads"_a);
}
