// Random calls of every entry point of the CPU kernels, checked against float64 (reference.h) under the sanitizers.
//
//     fuzz [--seed S] [--calls N]     N calls or a few more; a line of counts, or what was wrong and its seed
//     fuzz --case SEED                that case alone
//
// A case is made of its seed alone: its entry point, sizes, dtype, values, labels, ids, threads. Widths D go through
// every number of rows that a tile can have with every residue of 16, and in between through all of 1 to 2048.
// IFND_FAST_CPU_ISA chooses the instruction set, of which a process has one: tests/native/README.md runs them all.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "api.h"
#include "cases.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace fuzz {
namespace {

// ---- info_nce -------------------------------------------------------------------------------------------------------

std::vector<int32_t> labels(Random& random, int64_t n, int clusters) {
  std::vector<int32_t> out(size_t(n), 0);
  const int32_t extremes[] = {-1, -2, INT32_MIN, INT32_MAX};
  for (int32_t& y : out) y = random.chance(6) ? random.one_of(extremes) : int32_t(random.below(clusters));
  return out;
}

std::vector<int64_t> ids(Random& random, int64_t n, int64_t images) {
  std::vector<int64_t> out(size_t(n), 0);
  const int64_t extremes[] = {-1, -2, INT64_MIN, INT64_MAX, int64_t(1) << 32, 0xffffffff, 0xfffffffe};
  for (int64_t& id : out)  // many have equal low halves
    id = random.chance(6) ? random.one_of(extremes) : random.below(images) + (random.below(2) << 33);
  return out;
}

template <class T>
const T* data_or_null(Random& random, const std::vector<T>& values) {
  return random.chance(8) ? nullptr : values.data();
}

InfoNceInput info_nce_input(Random& random, int D, Kind kind) {
  InfoNceInput in;
  ifnd::InfoNce& p = in.p;
  p = {};
  const int64_t room = std::max<int64_t>(4, budget(random) / D / 4);
  p.D = D, p.B = random.size(std::min<int64_t>(room, 300));
  p.K = random.chance(40) ? 0 : random.size(std::max<int64_t>(1, std::min<int64_t>(1500, room / p.B)));
  p.label_columns = random.chance(12) ? ifnd::kMaxLevels : int(random.size(4));
  p.dtype = DType(random.below(3)), p.strategy = ifnd::Strategy(random.below(3));
  p.combination = ifnd::Combination(random.below(3));
  p.L = p.combination == ifnd::Combination::mean ? p.label_columns : 1;
  p.temperature = temperature(random);
  in.query = draw(random, kind, p.dtype, p.B, D), in.positive = draw(random, kind, p.dtype, p.B, D);
  in.negatives = draw(random, kind, p.dtype, p.K, D);
  const int clusters = int(random.size(1000));
  in.query_labels = labels(random, p.B * p.label_columns, clusters);
  in.negative_labels = labels(random, p.K * p.label_columns, clusters);
  in.query_ids = ids(random, p.B, p.K + 1), in.negative_ids = ids(random, p.K, p.K + 1);
  p.query = in.query.bytes.data(), p.negatives = in.negatives.bytes.data();
  p.query_labels = data_or_null(random, in.query_labels), p.negative_labels = data_or_null(random, in.negative_labels);
  p.query_ids = data_or_null(random, in.query_ids), p.negative_ids = data_or_null(random, in.negative_ids);
  const double upstream[] = {1.0, 1.0, 1.0, 1e-30, 1e-6, 1e6, 1e25}, largest = random.one_of(upstream);
  for (int64_t i = 0; i < p.B; ++i) in.loss_grad.push_back(random.chance(5) ? 0.0f : float(largest * random.normal()));
  return in;
}

void fuzz_info_nce(Random& random, int D) {
  const Kind kind = kind_of(random);
  InfoNceInput in = info_nce_input(random, D, kind);
  const ifnd::InfoNce& p = in.p;
  const int threads = int(1 + random.below(4));
  const bool with_grad = !random.chance(6);
  describe("info_nce B %lld K %lld D %d columns %d dtype %d strategy %d combination %d temperature %g %s threads %d",
           (long long)p.B, (long long)p.K, D, p.label_columns, int(p.dtype), int(p.strategy), int(p.combination),
           p.temperature, name(kind), threads);
  std::vector<float> loss(size_t(p.B), NAN), grad(size_t(p.B * D), NAN), weight(size_t(p.B), NAN);
  std::vector<float> normalizer(size_t(p.B * p.L), NAN), negatives_grad(size_t(p.K * D), NAN);
  std::vector<int32_t> counts(size_t(p.B * p.L), -7);
  ifnd::InfoNceForward f{};
  static_cast<ifnd::InfoNce&>(f) = p;
  f.positive = in.positive.bytes.data(), f.loss = loss.data(), f.query_grad = with_grad ? grad.data() : nullptr;
  f.positive_weight = weight.data(), f.log_normalizer = normalizer.data(), f.false_negative_counts = counts.data();
  ifnd::info_nce_forward(f, threads);
  called(0);
  ifnd::InfoNceNegativesGrad g{};
  static_cast<ifnd::InfoNce&>(g) = p;
  g.loss_grad = in.loss_grad.data(), g.log_normalizer = normalizer.data(), g.false_negative_counts = counts.data();
  g.negatives_grad = negatives_grad.data();
  ifnd::info_nce_negatives_grad(g, threads);
  called(1);
  if (!in.query.finite || !in.positive.finite || !in.negatives.finite) return;  // it did not crash
  const std::string isa = ifnd::kernels().isa;
  const bool dots = p.dtype == DType::bfloat16 && (isa == "avx512bf16" || isa == "amx");
  const InfoNceResult right = info_nce(in, dots);
  if (counts != right.counts) wrong("counts differ");
  check_all("loss", loss, right.loss), check_all("positive_weight", weight, right.positive_weight);
  check_all("log_normalizer", normalizer, right.log_normalizer);
  if (with_grad) check_all("query_grad", grad, right.query_grad);
  check_all("negatives_grad", negatives_grad, right.negatives_grad);
}

// ---- assignment -----------------------------------------------------------------------------------------------------

struct Centroids {
  const Matrix& c;
  DType dtype;
  std::vector<double> half_norm;  // 0 for the inner product
  bool exact;                     // small whole numbers: float32 rounds nothing

  Centroids(const Matrix& centroids, DType type, ifnd::Metric metric, bool whole)
      : c(centroids), dtype(type), exact(whole) {
    for (int64_t j = 0; j < c.rows; ++j)
      half_norm.push_back(metric == ifnd::Metric::l2 ? 0.5 * dot(c.row(j), c.row(j), c.D) : 0.0);
  }
  double score(const double* x, int64_t j) const { return dot(x, c.row(j), c.D) - half_norm[size_t(j)]; }
};

// The label of one row, and its confidence where it has been asked for.
void check_row(const Centroids& centroids, const Matrix& x, int64_t i, double temperature, int32_t label,
               const float* confidence) {
  const int64_t C = centroids.c.rows;
  std::vector<double> s(size_t(C), 0.0);
  int64_t best = -1;
  bool any_nan = false;
  double most_half_norm = 0.0;
  for (int64_t j = 0; j < C; ++j) {
    s[size_t(j)] = centroids.score(x.row(i), j);
    any_nan |= s[size_t(j)] != s[size_t(j)];
    most_half_norm = std::max(most_half_norm, centroids.half_norm[size_t(j)]);
    if (s[size_t(j)] == s[size_t(j)] && (best < 0 || s[size_t(j)] > s[size_t(best)])) best = j;
  }
  if (label < -1 || label >= C) return wrong("label[%lld] is %d", (long long)i, label);
  const bool finite = best >= 0 && std::fabs(s[size_t(best)]) < INFINITY;
  if (!finite || centroids.exact) {
    if (label != best) wrong("label[%lld] is %d, not %lld", (long long)i, label, (long long)best);
    if (!finite && confidence && *confidence == *confidence)
      wrong("confidence[%lld] is %g, not NaN", (long long)i, *confidence);
    if (!finite) return;
  }
  double longest = 0.0;  // of the centroids that are finite
  for (double norm : centroids.c.norm)
    if (norm < INFINITY && norm > longest) longest = norm;
  if (!(most_half_norm < INFINITY)) most_half_norm = 0.5 * longest * longest;
  const double length = x.norm[size_t(i)];
  const double error = score_error(x.D) * (length * longest + most_half_norm) +
                       score_lost(centroids.dtype, x.D, length, longest);
  const double short_by = label < 0 ? INFINITY : s[size_t(best)] - s[size_t(label)];
  if (!(short_by <= 2.0 * error))
    return wrong("label[%lld] is %d, whose score is below that of %lld by %.3g: %.3g is rounding", (long long)i, label,
                 (long long)best, short_by, 2.0 * error);
  for (int64_t j = 0; j < label; ++j)
    if (!memcmp(centroids.c.row(j), centroids.c.row(label), sizeof(double) * size_t(x.D)))
      return wrong("label[%lld] is %d, but %lld is equal to it", (long long)i, label, (long long)j);
  if (!confidence) return;
  if (any_nan) {
    if (*confidence == *confidence) wrong("confidence[%lld] is %g, not NaN", (long long)i, *confidence);
    return;
  }
  double sum = 0.0;
  for (double score : s) sum += std::exp((score - s[size_t(best)]) / temperature);
  const double off = std::expm1(std::min(4.0 * error / temperature + kUnit * double(C + 64), 700.0));
  check("confidence", i, *confidence, {1.0 / sum, std::min(1.0 + 1e-6, off / sum + 1e-37)});
}

struct Assignment {
  ifnd::AssignClusters p;
  Matrix x, c;
  Kind kinds[2];

  Assignment(Random& random, int D, DType dtype, bool screened) {
    p = {};
    p.D = D, p.dtype = dtype;
    const int64_t room = std::max<int64_t>(4, budget(random) / D), least = screened ? 64 : 0;
    p.C = least + random.size(std::max<int64_t>(1, std::min<int64_t>(1000, room / 8) - least));
    p.N = random.size(std::max<int64_t>(1, std::min<int64_t>(1500, room / p.C)));
    p.metric = ifnd::Metric(random.below(2)), p.temperature = temperature(random);
    kinds[0] = random.chance(6) ? Kind::permuted : kind_of(random);
    kinds[1] = random.chance(2) ? kinds[0] : kind_of(random);
    if (kinds[1] == Kind::not_finite || kinds[0] == Kind::not_finite)  // 0 times infinity depends on what counts as 0
      for (Kind& kind : kinds) kind = kind == Kind::subnormal ? Kind::not_finite : kind;
    x = draw(random, kinds[0], p.dtype, p.N, D), c = draw(random, kinds[1], p.dtype, p.C, D);
    p.features = x.bytes.data(), p.centroids = c.bytes.data();
  }
  bool whole() const { return kinds[0] == Kind::grid && kinds[1] == Kind::grid; }
};

void fuzz_assign(Random& random, int D) {
  Assignment in(random, D, DType(random.below(3)), !random.chance(3));
  ifnd::AssignClusters& p = in.p;
  const int threads = int(1 + random.below(4));
  describe("assign N %lld C %lld D %d dtype %d metric %d temperature %g %s %s threads %d", (long long)p.N,
           (long long)p.C, D, int(p.dtype), int(p.metric), p.temperature, name(in.kinds[0]), name(in.kinds[1]), threads);
  std::vector<int32_t> found(size_t(p.N), -7), alone(size_t(p.N), -7);
  std::vector<float> confidence(size_t(p.N), -7.0f);
  p.labels = found.data(), p.confidence = confidence.data();
  ifnd::assign_clusters(p, threads);
  called(2);
  p.labels = alone.data(), p.confidence = nullptr;
  ifnd::assign_clusters(p, threads);
  called(3);
  for (int64_t i = 0; i < p.N; ++i)
    if (found[size_t(i)] != alone[size_t(i)])
      wrong("label[%lld] is %d, but without confidence %d", (long long)i, found[size_t(i)], alone[size_t(i)]);
  const Centroids centroids(in.c, p.dtype, p.metric, in.whole());
  for (int64_t i = 0; i < p.N; ++i)
    check_row(centroids, in.x, i, p.temperature, found[size_t(i)], &confidence[size_t(i)]);
}

// Some centroids move, a little or far.
void move(Random& random, Matrix& c) {
  const int64_t in = random.size(c.rows);
  const double step = std::pow(10.0, -4.0 * random.uniform());
  float* bytes = reinterpret_cast<float*>(c.bytes.data());
  for (int64_t j = 0; j < c.rows; ++j)
    if (random.chance(int(in)))
      for (int d = 0; d < c.D; ++d) {
        float& x = bytes[j * c.D + d];
        x += float(step * c.norm[size_t(j)] / std::sqrt(double(c.D)) * random.normal());
        c.value[size_t(j * c.D + d)] = x;
      }
}

void check_bounds(const Assignment& in, const std::vector<float>& bounds) {
  for (int64_t i = 0; i < in.p.N; ++i)
    for (int64_t j = 0; j < in.p.C; ++j) {
      if (j == in.p.labels[i]) continue;
      double squares = 0.0;
      for (int d = 0; d < in.p.D; ++d) {
        const double difference = in.x.row(i)[d] - in.c.row(j)[d];
        squares += difference * difference;
      }
      if (double(bounds[size_t(i)]) > std::sqrt(squares))
        return wrong("bound[%lld] is %.9g, but centroid %lld is at %.9g", (long long)i, double(bounds[size_t(i)]),
                     (long long)j, std::sqrt(squares));
    }
}

void fuzz_reassign(Random& random, int D) {
  Assignment in(random, D, DType::float32, true);
  in.p.metric = ifnd::Metric::l2, in.p.temperature = 1.0;
  const int threads = int(1 + random.below(4)), steps = int(1 + random.below(4));
  describe("reassign N %lld C %lld D %d %s %s threads %d steps %d", (long long)in.p.N, (long long)in.p.C, D,
           name(in.kinds[0]), name(in.kinds[1]), threads, steps);
  std::vector<int32_t> kept(size_t(in.p.N), -7), right(size_t(in.p.N), -7);
  std::vector<float> bounds(size_t(in.p.N), NAN);
  std::vector<char> previous;
  for (int step = 0; step < steps; ++step) {
    in.p.centroids = in.c.bytes.data(), in.p.labels = kept.data();
    const std::vector<int32_t> before = kept;
    const int64_t done = ifnd::reassign(
        {in.p, step == 0 ? nullptr : reinterpret_cast<const float*>(previous.data()), bounds.data()}, threads);
    called(4);
    if (done < 0) {
      if (kept != before) wrong("labels changed, though there is no kernel");
      return;
    }
    in.p.labels = right.data();
    ifnd::assign_clusters(in.p, threads);
    called(3);
    for (int64_t i = 0; i < in.p.N; ++i)
      if (kept[size_t(i)] != right[size_t(i)])
        wrong("step %d: label[%lld] is %d, assign gives %d", step, (long long)i, kept[size_t(i)], right[size_t(i)]);
    in.p.labels = kept.data();
    if (in.p.N * in.p.C * D < 1'000'000) check_bounds(in, bounds);
    if (random.chance(4)) {  // labels that are none
      const int32_t none[] = {-1, INT32_MIN, int32_t(in.p.C), INT32_MAX};
      for (int64_t n = random.size(in.p.N); n > 0; --n) kept[size_t(random.below(in.p.N))] = random.one_of(none);
    }
    previous = in.c.bytes;
    move(random, in.c);
  }
}

// ---- cluster_sums ---------------------------------------------------------------------------------------------------

void fuzz_cluster_sums(Random& random, int D) {
  const int64_t room = std::max<int64_t>(4, budget(random) / D), N = random.size(std::min<int64_t>(room, 3000));
  const int64_t C = random.size(std::min<int64_t>(room, 800));
  const DType dtype = DType(random.below(3));
  const Kind kind = kind_of(random);
  const Matrix x = draw(random, kind, dtype, N, D), c = draw(random, kind_of(random), DType::float32, C, D);
  const int threads = int(1 + random.below(4));
  std::vector<int32_t> labels(size_t(N), 0);
  for (int32_t& y : labels) y = int32_t(random.below(C));
  const bool refused = random.chance(5);
  const int32_t outside[] = {-1, INT32_MIN, int32_t(C), INT32_MAX};
  if (refused) labels[size_t(random.below(N))] = random.one_of(outside);
  describe("cluster_sums N %lld C %lld D %d dtype %d %s threads %d", (long long)N, (long long)C, D, int(dtype),
           name(kind), threads);
  std::vector<double> sums(size_t(C * D), -7.0), right(size_t(C * D), 0.0);
  std::vector<int64_t> counts(size_t(C), -7), right_counts(size_t(C), 0);
  std::vector<float> distances(size_t(N), -7.0f);
  const ifnd::ClusterSums p{x.bytes.data(), labels.data(), c.floats(), N, C, D, dtype,
                            sums.data(), counts.data(), distances.data()};
  const bool done = ifnd::cluster_sums(p, threads);
  called(5);
  if (done == refused) return wrong("labels out of range: %d, and it says %d", int(refused), int(done));
  if (refused) return;
  for (int64_t i = 0; i < N; ++i) {
    double squares = 0.0;
    ++right_counts[size_t(labels[size_t(i)])];
    for (int d = 0; d < D; ++d) {
      right[size_t(labels[size_t(i)] * int64_t(D) + d)] += x.row(i)[d];
      const double difference = x.row(i)[d] - c.row(labels[size_t(i)])[d];
      squares += difference * difference;
    }
    check("distance", i, distances[size_t(i)], {squares, squares * kUnit * (D + 16) + D * kSmallest});
  }
  if (counts != right_counts) wrong("counts differ");
  for (size_t i = 0; i < sums.size(); ++i)
    if (sums[i] != right[i] && !(sums[i] != sums[i] && right[i] != right[i]))
      wrong("sums[%lld] is %.17g, not %.17g", (long long)i, sums[i], right[i]);
}

// ---- all of them ----------------------------------------------------------------------------------------------------

// The seed holds the case's number, which its width depends on, in its low half.
void run_case(uint64_t seed) {
  case_seed = seed;
  Random random{seed};
  const int D = width(random, int64_t(seed & 0xffffffff));
  tally.widths.insert(D);
  switch (random.below(5)) {
    case 0: return fuzz_assign(random, D);
    case 1: return fuzz_reassign(random, D);
    case 2: return fuzz_cluster_sums(random, D);
    default: return fuzz_info_nce(random, D);
  }
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
  using fuzz::tally;
  uint64_t seed = 1, only = 0;
  int64_t calls = 1000;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    if (option == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 0);
    if (option == "--calls") calls = std::strtoll(argv[i + 1], nullptr, 0);
    if (option == "--case") only = std::strtoull(argv[i + 1], nullptr, 0);
  }
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_set_death_callback(fuzz::report_case);
#endif
  if (only)
    fuzz::run_case(only);
  else
    for (uint64_t number = 0; tally.calls < calls && tally.wrong <= 20; ++number) fuzz::run_case(seed << 32 | number);
  std::printf("%s calls %lld values %lld widths %zu wrong %lld: forward %lld negatives %lld assign %lld labels %lld "
              "reassign %lld sums %lld\n",
              ifnd::kernels().isa, (long long)tally.calls, (long long)tally.compared, tally.widths.size(),
              (long long)tally.wrong, (long long)tally.of[0], (long long)tally.of[1], (long long)tally.of[2],
              (long long)tally.of[3], (long long)tally.of[4], (long long)tally.of[5]);
  return tally.wrong > 0;
}
