#include "assign.h"

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
  else if constexpr (Terms<T>::STORED == 2)
    run<T, Assign::SCREEN>(p, stream);
}

}  // namespace

void assign_clusters(const AssignArguments& p, Numbers numbers, Assign mode, Stream stream) {
  if (numbers == Numbers::FLOAT16) run<Half>(p, mode, stream);
  if (numbers == Numbers::BFLOAT16) run<Bfloat16>(p, mode, stream);
  if (numbers == Numbers::TWO_TERMS) run<TwoTerms>(p, mode, stream);
}

void assign_exactly(const AssignArguments& p, Stream stream) {
  launch("exact_kernel", exact_kernel, dim3((p.N + ASSIGN_WARPS - 1) / ASSIGN_WARPS), ASSIGN_THREADS, 0, stream, p);
}

}  // namespace ifnd::cuda
