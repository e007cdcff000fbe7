// Splits the loss over threads. Memory: a group of queries per thread, never anything of size B x K.
#include <algorithm>
#include <vector>

#include "api.h"
#include "memory.h"
#include "parallel.h"

namespace ifnd {
namespace {

constexpr int64_t kGroupBytes = 256 * 1024;  // of a thread's queries and sums: half of a small second-level cache
constexpr int64_t kMinKeys = 128;            // fewer are not worth a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The part `index` of [0, n) in `parts` parts as equal as whole units allow.
Range part(int64_t n, int64_t unit, int64_t parts, int64_t index) {
  const int64_t units = ceil_div(n, unit);
  return {std::min(n, units * index / parts * unit), std::min(n, units * (index + 1) / parts * unit)};
}

// `rows` in groups of equal size, a multiple of `lanes`, of about kGroupBytes at most.
std::vector<Range> groups_of(Range rows, int64_t lanes, int64_t bytes_per_row) {
  const int64_t n = rows.end - rows.begin;
  const int64_t most = std::max<int64_t>(1, kGroupBytes / bytes_per_row / lanes) * lanes;
  const int64_t count = ceil_div(n, most);
  std::vector<Range> groups;
  for (int64_t i = 0; i < count; ++i) {
    const Range r = part(n, lanes, count, i);
    groups.push_back({rows.begin + r.begin, rows.begin + r.end});
  }
  return groups;
}

int64_t widest(const std::vector<Range>& groups) {
  int64_t rows = 0;
  for (const Range& r : groups) rows = std::max(rows, r.end - r.begin);
  return rows;
}

// Of the query and its gradient: the levels' own sums are rarely touched.
int64_t bytes_per_row(const InfoNce& p) { return int64_t(sizeof(float)) * p.D * 2; }

// Each thread takes whole rows of its own, through all the keys.
void forward_by_rows(const InfoNceForward& p, const Kernels& k, int threads) {
  std::vector<std::vector<Range>> groups;
  int64_t rows = 0;
  for (int t = 0; t < threads; ++t) {
    groups.push_back(groups_of(part(p.B, k.lanes, threads, t), k.lanes, bytes_per_row(p)));
    rows = std::max(rows, widest(groups.back()));
  }
  const size_t bytes = k.forward_bytes(p, rows);
  Scratch scratch(bytes * size_t(threads));
  parallel_for(threads, threads, [&](int64_t t) {
    void* workspace = scratch.at(bytes * size_t(t));
    for (const Range& group : groups[size_t(t)]) {
      k.forward_pass(p, group, {0, p.K}, workspace);
      k.forward_finish(p, group.begin, group.end - group.begin, group, workspace, bytes, 1);
    }
  });
}

// Too few rows for the threads: a group of rows at a time, each thread takes a chunk of the keys.
void forward_by_keys(const InfoNceForward& p, const Kernels& k, int threads, int chunks) {
  const std::vector<Range> groups = groups_of({0, p.B}, k.lanes, bytes_per_row(p));
  const size_t bytes = k.forward_bytes(p, widest(groups));
  Scratch scratch(bytes * size_t(chunks));
  for (const Range& group : groups) {
    const int64_t rows = group.end - group.begin;
    parallel_for(threads, chunks, [&](int64_t c) {
      k.forward_pass(p, group, part(p.K, 8, chunks, c), scratch.at(bytes * size_t(c)));
    });
    parallel_for(threads, ceil_div(rows, k.lanes), [&](int64_t block) {
      const int64_t first = group.begin + block * k.lanes;
      k.forward_finish(p, group.begin, rows, {first, std::min(group.end, first + k.lanes)}, scratch.at(0), bytes, chunks);
    });
  }
}

}  // namespace

void info_nce_forward(const InfoNceForward& p, int threads) {
  const Kernels& k = kernels();
  const int64_t panels = ceil_div(p.B, k.lanes);
  const int chunks = int(std::clamp<int64_t>(p.K / kMinKeys, 1, threads));
  const int64_t most_rows = ceil_div(panels, threads) * k.lanes;  // of a thread, if they split the rows
  const bool rows_balance = 8 * most_rows * threads <= 9 * p.B;
  if (rows_balance || chunks < std::min<int64_t>(panels, threads))
    forward_by_rows(p, k, int(std::min<int64_t>(panels, threads)));
  else
    forward_by_keys(p, k, threads, chunks);
}

void info_nce_negatives_grad(const InfoNceNegativesGrad& p, int threads) {
  const Kernels& k = kernels();
  const std::vector<Range> groups = groups_of({0, p.B}, k.lanes, bytes_per_row(p));
  const int chunks = int(std::clamp<int64_t>(p.K / 8, 1, threads));
  const size_t bytes = k.pass_bytes(p);
  Scratch packed(k.group_bytes(p, widest(groups))), scratch(bytes * size_t(chunks));
  for (const Range& group : groups) {
    parallel_for(threads, ceil_div(group.end - group.begin, k.lanes),
                 [&](int64_t panel) { k.group_pack(p, group, int(panel), packed.at(0)); });
    parallel_for(threads, chunks, [&](int64_t c) {
      k.negatives_pass(p, group, part(p.K, 8, chunks, c), packed.at(0), scratch.at(bytes * size_t(c)),
                       group.begin == 0);
    });
  }
}

}  // namespace ifnd
