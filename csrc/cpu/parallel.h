// Tasks over threads, by OpenMP.
#pragma once

#include <cstdint>

namespace ifnd {

// False in a child forked from a process that had threads: see parallel.cpp.
bool threads_allowed();

// body(task) for every task in [0, tasks), on at most `threads` threads. Which thread runs a task, and
// how many there really are, changes nothing that a task computes. Bodies don't throw.
template <class Body>
void parallel_for(int threads, int64_t tasks, const Body& body) {
  if (threads <= 1 || tasks <= 1 || !threads_allowed()) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  const int team = static_cast<int>(tasks < threads ? tasks : threads);
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace ifnd
