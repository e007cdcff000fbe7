#include "info_nce.h"

#include "api.h"
#include "launch.h"
#include "normalise.h"

namespace ifnd::cuda {

namespace {

template <class T, int CHUNK, Pass PASS>
void run(const InfoNceArguments& p, int warps, int splits, Stream stream) {
  const int rows = warps * WARP_ROWS, chunks = PASS == Pass::MARKED_SUMS || !p.with_grad ? 1 : (p.D + CHUNK - 1) / CHUNK;
  launch("info_nce_kernel", info_nce_kernel<T, CHUNK, PASS>,
         dim3((p.rows.count + rows - 1) / rows, splits, chunks), 32 * warps,
         LossShared<T, CHUNK>::bytes(warps, p.L, PASS), stream, p);
}

template <class T, int CHUNK>
void run(const InfoNceArguments& p, Pass pass, int warps, int splits, Stream stream) {
  if (pass == Pass::DENSE) run<T, CHUNK, Pass::DENSE>(p, warps, splits, stream);
  if (pass == Pass::MARKED_SUMS) run<T, CHUNK, Pass::MARKED_SUMS>(p, warps, splits, stream);
  if (pass == Pass::MARKED_GRAD) run<T, CHUNK, Pass::MARKED_GRAD>(p, warps, splits, stream);
  if (pass == Pass::NEGATIVES) run<T, CHUNK, Pass::NEGATIVES>(p, warps, splits, stream);
}

template <class T>
void run(const InfoNceArguments& p, Pass pass, int warps, int splits, Stream stream) {
  p.D <= 64 ? run<T, 64>(p, pass, warps, splits, stream) : run<T, 128>(p, pass, warps, splits, stream);
}

}  // namespace

void info_nce(const InfoNceArguments& p, Numbers numbers, Pass pass, int warps, int splits, Stream stream) {
  if (numbers == Numbers::FLOAT16) run<Half>(p, pass, warps, splits, stream);
  if (numbers == Numbers::BFLOAT16) run<Bfloat16>(p, pass, warps, splits, stream);
  if (numbers == Numbers::TWO_TERMS) run<TwoTerms>(p, pass, warps, splits, stream);
}

void info_nce_normalise(const NormaliseArguments& p, Stream stream) {
  launch("normalise_kernel", normalise_kernel, dim3((p.B + 3) / 4), 128, 0, stream, p);
}

void info_nce_add_splits(const NormaliseArguments& p, Stream stream) {
  const long long numbers = (long long)p.B * p.D;
  constexpr int threads = 32 * ADD_WARPS;
  launch("add_splits_kernel", add_splits_kernel, dim3((unsigned)((numbers + 31) / 32)), threads,
         threads * int(sizeof(float)), stream, p);
}

}  // namespace ifnd::cuda
