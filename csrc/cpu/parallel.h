// Tasks over threads, by OpenMP.
#pragma once

#include <cstdint>

// GNU's OpenMP is not built for the thread sanitizer, which therefore has to be told where a region begins and ends.
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define IFND_SYNC_BEFORE(place) __tsan_release(place)
#define IFND_SYNC_AFTER(place) __tsan_acquire(place)
#else
#define IFND_SYNC_BEFORE(place) (void)(place)
#define IFND_SYNC_AFTER(place) (void)(place)
#endif

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
  char begin, end;
  IFND_SYNC_BEFORE(&begin);
#pragma omp parallel for num_threads(team) schedule(static, 1)
  for (int64_t task = 0; task < tasks; ++task) {
    IFND_SYNC_AFTER(&begin);
    body(task);
    IFND_SYNC_BEFORE(&end);
  }
  IFND_SYNC_AFTER(&end);
}

}  // namespace ifnd
