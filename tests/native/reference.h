// What the kernels should give, in float64 and by the definitions, and how far float32 may be off from that.
//
// A score is a sum of D products, added up in blocks of 256 and then over the blocks: by Cauchy-Schwarz it is off by
// at most score_error() |x| |y|, whatever their values. Everything else follows from that.
#pragma once

#include <algorithm>

#include "values.h"

namespace fuzz {

constexpr double kUnit = 0x1p-24;       // the unit roundoff of float32
constexpr double kSmallest = 1.2e-38;   // what dot instructions take for 0 is less
constexpr double kLowestTerm = 4.5e-38;  // exp.h: less than this of the largest term of a sum counts as 0

inline double score_error(int D) { return kUnit * (std::min(D, 256) + D / 256 + 6); }

// What a score may lose besides, where one of a product's factors, or the product, counts as 0: bfloat16 ones in dot
// instructions.
inline double score_lost(DType dtype, int D, double x, double y) {
  return kSmallest * (D + (dtype == DType::bfloat16 ? std::sqrt(double(D)) * (x + y) : 0.0));
}

inline double dot(const double* x, const double* y, int D) {
  double sum = 0.0;
  for (int d = 0; d < D; ++d) sum += x[d] * y[d];
  return sum;
}

struct InfoNceInput {
  Matrix query, positive, negatives;
  std::vector<int32_t> query_labels, negative_labels;
  std::vector<int64_t> query_ids, negative_ids;
  std::vector<float> loss_grad;
  ifnd::InfoNce p;  // its pointers are into these
};

struct Value {
  double value = 0.0, error = 0.0;
};

struct InfoNceResult {
  std::vector<Value> loss, positive_weight, log_normalizer, query_grad, negatives_grad;
  std::vector<int32_t> counts;
};

// Is key k query i's false negative in loss l?
inline bool false_negative(const InfoNceInput& in, int64_t i, int64_t k, int l) {
  const ifnd::InfoNce& p = in.p;
  if (!p.query_labels || !p.negative_labels || p.strategy == ifnd::Strategy::keep) return false;
  int matches = 0;
  for (int c = 0; c < p.label_columns; ++c) {
    const int32_t y = p.query_labels[i * p.label_columns + c], z = p.negative_labels[k * p.label_columns + c];
    const bool same = y >= 0 && y == z;
    if (p.combination == ifnd::Combination::mean && c == l) return same;
    matches += same;
  }
  return p.combination == ifnd::Combination::any ? matches > 0 : matches == p.label_columns;
}

inline bool same_image(const InfoNceInput& in, int64_t i, int64_t k) {
  return in.p.query_ids && in.p.negative_ids && in.p.query_ids[i] >= 0 && in.p.query_ids[i] == in.p.negative_ids[k];
}

// How far weights e^{s - lse} may be off, relatively, where scores are off by `error`.
inline double weight_error(double error, int64_t terms) { return std::expm1(2.0 * error + kUnit * double(terms + 64)); }

// One query's: the losses, and how they push and pull its scores.
struct QueryResult {
  std::vector<double> push, pull;  // per key: d loss / d s = push - pull
  double pushed = 0.0, pulled = 0.0;  // d loss / d s+ = pulled - pushed
  double score_error = 0.0, largest = 0.0;
};

inline QueryResult query_result(const InfoNceInput& in, int64_t i, InfoNceResult& out) {
  const ifnd::InfoNce& p = in.p;
  const bool attract = p.strategy == ifnd::Strategy::attract;
  QueryResult q;
  q.push.assign(size_t(p.K), 0.0), q.pull.assign(size_t(p.K), 0.0);
  std::vector<double> s(size_t(p.K), 0.0);
  for (int64_t k = 0; k < p.K; ++k) {
    s[size_t(k)] = dot(in.query.row(i), in.negatives.row(k), p.D) / p.temperature;
    q.largest = std::max(q.largest, std::fabs(s[size_t(k)]));
  }
  const double positive = dot(in.query.row(i), in.positive.row(i), p.D) / p.temperature;
  q.largest = std::max(q.largest, std::fabs(positive));
  const double x = in.query.norm[size_t(i)], y = in.negatives.longest();
  q.score_error = (score_error(p.D) * x * y + score_lost(p.dtype, p.D, x, y)) / p.temperature + 2.0 * kUnit * q.largest;
  Value loss;
  for (int l = 0; l < p.L; ++l) {
    double M = positive, rest = 0.0, attracted = positive;
    std::vector<char> in_sum(size_t(p.K), 0), detected(size_t(p.K), 0);
    int64_t n = 0;
    for (int64_t k = 0; k < p.K; ++k) {
      if (same_image(in, i, k)) continue;
      detected[size_t(k)] = false_negative(in, i, k, l);
      in_sum[size_t(k)] = attract || !detected[size_t(k)];
      n += detected[size_t(k)];
      if (detected[size_t(k)]) attracted += s[size_t(k)];
      if (in_sum[size_t(k)]) M = std::max(M, s[size_t(k)]);
    }
    for (int64_t k = 0; k < p.K; ++k)
      if (in_sum[size_t(k)]) rest += std::exp(s[size_t(k)] - M);
    const double Z = rest + std::exp(positive - M), lse = M + (M == positive ? std::log1p(rest) : std::log(Z));
    for (int64_t k = 0; k < p.K; ++k) {
      if (in_sum[size_t(k)]) q.push[size_t(k)] += std::exp(s[size_t(k)] - lse) / p.L;
      if (attract && detected[size_t(k)]) q.pull[size_t(k)] += 1.0 / (1.0 + double(n)) / p.L;
    }
    const double share = rest / Z, pulled = attract ? double(n) / (1.0 + double(n)) : 0.0;
    q.pushed += share / p.L, q.pulled += pulled / p.L;
    const double off = q.score_error + kUnit * double(p.K + 64);
    const double error = off < 1.0 ? share * std::expm1(off) : off;  // of lse
    out.log_normalizer[size_t(i * p.L + l)] = {lse, error + 2.0 * kUnit * std::fabs(lse)};
    out.counts[size_t(i * p.L + l)] = int32_t(n);
    // lse - s+ by its parts, which cancel nothing
    const double own = M - positive + (M == positive ? std::log1p(rest) : std::log(Z));
    loss.value += (attract ? own - (attracted - (1.0 + double(n)) * positive) / (1.0 + double(n)) : own) / p.L;
    loss.error += (error + pulled * q.score_error + 1e-13 * q.largest) / p.L;
  }
  loss.error += 4.0 * kUnit * std::fabs(loss.value) + 1e-44;
  out.loss[size_t(i)] = loss;
  const double relative = std::min(weight_error(q.score_error, p.K), 1.0);
  const double weight_off = weight_error(q.score_error, p.K) < 1.0 ? relative * q.pushed : 1.0;
  out.positive_weight[size_t(i)] = {q.pulled - q.pushed, weight_off + 4.0 * kUnit * (q.pushed + q.pulled) + 1e-44};
  return q;
}

// One element of a gradient: a sum of weights times x.
struct GradientSum {
  double value = 0.0, terms = 0.0, largest = 0.0;

  void add(double push, double pull, double x) {
    value += (push - pull) * x, terms += (push + pull) * std::fabs(x), largest = std::max(largest, std::fabs(x));
  }
};

// `dots`: weights are rounded to bfloat16.
inline InfoNceResult info_nce(const InfoNceInput& in, bool dots) {
  const ifnd::InfoNce& p = in.p;
  InfoNceResult out;
  out.loss.resize(size_t(p.B)), out.positive_weight.resize(size_t(p.B)), out.log_normalizer.resize(size_t(p.B * p.L));
  out.counts.resize(size_t(p.B * p.L)), out.query_grad.resize(size_t(p.B * p.D));
  out.negatives_grad.resize(size_t(p.K * p.D));
  const double K = double(p.K), lost = (K * kLowestTerm + (K + p.D) * kSmallest) / p.temperature + 1e-44 * (K + 1.0);
  const double per_row = double(p.B) * kLowestTerm + double(p.B + p.D) * kSmallest;
  for (int64_t i = 0; i < p.B; ++i) {
    const QueryResult q = query_result(in, i, out);
    const double off = weight_error(q.score_error, p.K) + (dots ? 0x1p-8 : 0.0) + kUnit * double(p.K + 64);
    std::vector<GradientSum> sums(size_t(p.D));
    for (int64_t k = 0; k < p.K; ++k)
      for (int d = 0; d < p.D; ++d) sums[size_t(d)].add(q.push[size_t(k)], q.pull[size_t(k)], in.negatives.row(k)[d]);
    for (int d = 0; d < p.D; ++d) {
      GradientSum& sum = sums[size_t(d)];
      sum.add(q.pulled, q.pushed, in.positive.row(i)[d]);  // of d loss / d s+ both signs are turned
      const double error = off < 1.0 ? off * sum.terms : 4.0 * sum.largest;
      out.query_grad[size_t(i * p.D + d)] = {sum.value / p.temperature,
                                             error / p.temperature + lost * (1.0 + sum.largest)};
    }
    // The normalizer is kept in float32, and so its own rounding comes on top.
    const double g = std::fabs(double(in.loss_grad[size_t(i)])), again = std::expm1(4.0 * kUnit * (q.largest + 64.0));
    const double all = off + again * (1.0 + off), signed_g = in.loss_grad[size_t(i)] / p.temperature;
    for (int64_t k = 0; k < p.K; ++k)
      for (int d = 0; d < p.D; ++d) {
        const double x = in.query.row(i)[d], push = q.push[size_t(k)], pull = q.pull[size_t(k)];
        Value& grad = out.negatives_grad[size_t(k * p.D + d)];
        grad.value += signed_g * (push - pull) * x;
        const double error = all < 1.0 ? all * (push + pull) + kLowestTerm : 3.0;
        grad.error += g / p.temperature * std::fabs(x) * (error + kUnit * double(p.B + 8) * (push + pull)) +
                      per_row * (g * (std::fabs(x) + 1.0) + 1.0) / p.temperature / double(p.B) +
                      kSmallest * (std::fabs(x) + 1.0);
      }
  }
  return out;
}

}  // namespace fuzz
