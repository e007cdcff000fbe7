#include "assign.h"

#include <type_traits>

#include "api.h"
#include "launch.h"

namespace ifnd::cuda {

namespace {

template <class T, int CHUNK, Assign MODE>
void run(const AssignArguments& p, Stream stream) {
  const dim3 blocks((p.N + ASSIGN_ROWS - 1) / ASSIGN_ROWS);
  launch("assign_kernel", assign_kernel<T, CHUNK, MODE>, blocks, ASSIGN_THREADS, ASSIGN_SHARED_BYTES<CHUNK>, stream, p);
}

template <class T, Assign MODE>
void run(const AssignArguments& p, Stream stream) {
  p.D <= 64 ? run<T, 64, MODE>(p, stream) : run<T, 128, MODE>(p, stream);
}

template <class T>
void run(const AssignArguments& p, Assign mode, Stream stream) {
  if (mode == Assign::CONFIDENCE)
    run<T, Assign::CONFIDENCE>(p, stream);
  else if (mode == Assign::LABELS)
    run<T, Assign::LABELS>(p, stream);
  else if constexpr (!std::is_same_v<T, Bfloat16>)  // bfloat16 numbers are no terms of a float32
    run<T, Assign::SCREEN>(p, stream);
}

}  // namespace

void assign_clusters(const AssignArguments& p, bool bfloat16, Assign mode, Stream stream) {
  bfloat16 ? run<Bfloat16>(p, mode, stream) : run<Half>(p, mode, stream);
}

}  // namespace ifnd::cuda
