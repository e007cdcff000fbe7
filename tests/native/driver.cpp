// Runs every CPU kernel on arrays of exactly their size, for the sanitizers (test_sanitizers.py builds it), and
// prints the largest error of the kernels' exp in units in the last place.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "api.h"

namespace {

std::mt19937 generator(0);

template <class T>
std::vector<T> integers(size_t n, int low, int high) {
  std::uniform_int_distribution<int> draw(low, high);
  std::vector<T> out(n);
  for (T& x : out) x = T(draw(generator));
  out.shrink_to_fit();
  return out;
}

// Values in [-1, 1) of any dtype, as raw bytes.
std::vector<char> values(int64_t n, ifnd::DType dtype) {
  std::uniform_real_distribution<float> draw(-1.0f, 1.0f);
  std::vector<char> out(size_t(n) * (dtype == ifnd::DType::float32 ? 4 : 2));
  for (int64_t i = 0; i < n; ++i) {
    const float x = draw(generator);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    // The upper half of a float is a bfloat16; as a float16 the same bits are finite as well: |x| < 1 < 2.
    if (dtype == ifnd::DType::float32) memcpy(&out[size_t(i) * 4], &bits, 4);
    else out[size_t(i) * 2] = char(bits >> 16 & 0xff), out[size_t(i) * 2 + 1] = char(bits >> 24);
  }
  return out;
}

void info_nce(int64_t B, int64_t K, int D, int L, ifnd::DType dtype, ifnd::Strategy strategy,
              ifnd::Combination combination, int threads) {
  const auto query = values(B * D, dtype), positive = values(B * D, dtype), negatives = values(K * D, dtype);
  const auto query_labels = integers<int32_t>(size_t(B * L), -1, 3), negative_labels = integers<int32_t>(size_t(K * L), -1, 3);
  const auto query_ids = integers<int64_t>(size_t(B), 0, 20), negative_ids = integers<int64_t>(size_t(K), 0, 20);
  std::vector<float> loss(B), query_grad(B * D), weight(B), normalizer(B * L), loss_grad(B, 1.0f), grad(K * D);
  std::vector<int32_t> counts(B * L);
  ifnd::InfoNceForward f{};
  f.query = query.data(), f.positive = positive.data(), f.negatives = negatives.data();
  f.query_labels = query_labels.data(), f.negative_labels = negative_labels.data();
  f.query_ids = query_ids.data(), f.negative_ids = negative_ids.data();
  f.B = B, f.K = K, f.D = D, f.label_columns = L, f.dtype = dtype, f.temperature = 0.2, f.strategy = strategy;
  f.combination = combination, f.L = combination == ifnd::Combination::mean ? L : 1;
  f.loss = loss.data(), f.query_grad = query_grad.data(), f.positive_weight = weight.data();
  f.log_normalizer = normalizer.data(), f.false_negative_counts = counts.data();
  ifnd::info_nce_forward(f, threads);
  ifnd::InfoNceNegativesGrad g{};
  static_cast<ifnd::InfoNce&>(g) = f;
  g.loss_grad = loss_grad.data(), g.log_normalizer = normalizer.data();
  g.false_negative_counts = counts.data(), g.negatives_grad = grad.data();
  ifnd::info_nce_negatives_grad(g, threads);
}

void assign(int64_t N, int64_t C, int D, ifnd::DType dtype, ifnd::Metric metric, bool with_confidence, int threads) {
  const auto features = values(N * D, dtype), centroids = values(C * D, dtype);
  std::vector<int32_t> labels(N);
  std::vector<float> confidence(N);
  ifnd::assign_clusters({features.data(), centroids.data(), N, C, D, dtype, metric, 0.2, labels.data(),
                         with_confidence ? confidence.data() : nullptr},
                        threads);
}

void cluster_sums(int64_t N, int64_t C, int D, ifnd::DType dtype, int threads) {
  const auto features = values(N * D, dtype), centroids = values(C * D, ifnd::DType::float32);
  const auto labels = integers<int32_t>(size_t(N), 0, int(C) - 1);
  std::vector<double> sums(C * D);
  std::vector<int64_t> counts(C);
  std::vector<float> distances(N);
  ifnd::cluster_sums({features.data(), labels.data(), reinterpret_cast<const float*>(centroids.data()), N, C, D, dtype,
                      sums.data(), counts.data(), distances.data()},
                     threads);
}

double exp_error() {
  std::vector<float> x, y;
  for (double at = -86.0; at < 88.0; at += 174.0 / 1e6) x.push_back(float(at));
  y.resize(x.size());
  ifnd::kernels().exp(x.data(), y.data(), int64_t(x.size()));
  double worst = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double right = std::exp(double(x[i]));
    const double unit = std::ldexp(1.0, std::ilogb(right) - 23);
    worst = std::fmax(worst, std::fabs(y[i] - right) / unit);
  }
  return worst;
}

}  // namespace

int main() {
  for (int dtype = 0; dtype < 3; ++dtype)
    for (int threads = 1; threads < 4; ++threads) {
      for (int strategy = 0; strategy < 3; ++strategy)
        for (const auto [B, K, D, L] : {std::array<int, 4>{1, 1, 1, 1}, {3, 0, 5, 2}, {37, 301, 33, 3}, {2, 700, 17, 16},
                                        {70, 50, 129, 2}, {5, 40, 2048, 2}})
          for (int combination = 0; combination < 3; ++combination)
            info_nce(B, K, D, L, ifnd::DType(dtype), ifnd::Strategy(strategy), ifnd::Combination(combination), threads);
      for (const auto [N, C, D] : {std::array<int, 3>{1, 1, 1}, {37, 301, 33}, {300, 7, 129}, {5, 70, 2048}}) {
        cluster_sums(N, C, D, ifnd::DType(dtype), threads);
        for (const auto metric : {ifnd::Metric::inner_product, ifnd::Metric::l2})
          for (const bool with_confidence : {true, false})
            assign(N, C, D, ifnd::DType(dtype), metric, with_confidence, threads);
      }
    }
  std::printf("%s exp %.3f\n", ifnd::kernels().isa, exp_error());
}
