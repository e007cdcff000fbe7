// GNU's OpenMP keeps its threads for the next parallel region. A forked child inherits the record of them but
// not the threads, and would wait for them for ever in its first region (so would torch's own operators). So a
// child of a process that had more than one thread at the fork works on one thread: data-loader workers do so
// anyway. A child forked before any thread was started has no such record and keeps all its threads.
#include "parallel.h"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#ifdef __linux__
#include <fcntl.h>
#include <sys/stat.h>
#endif

namespace ifnd {
namespace {

std::atomic<bool> single_threaded{false};
bool had_threads = false;  // written before the fork, read by the child

#if defined(__unix__) || defined(__APPLE__)
void before_fork() {
  had_threads = true;  // the worst, where it can't be told
#ifdef __linux__
  // A directory per thread, besides "." and "..". (Not stat: its symbol is of glibc 2.33, too new for wheels.)
  struct statx tasks;
  if (statx(AT_FDCWD, "/proc/self/task", 0, STATX_NLINK, &tasks) == 0) had_threads = tasks.stx_nlink > 3;
#endif
}

void in_child() {
  if (had_threads) single_threaded = true;
}

const int registered = pthread_atfork(before_fork, nullptr, in_child);
#endif

}  // namespace

bool threads_allowed() { return !single_threaded; }

}  // namespace ifnd
