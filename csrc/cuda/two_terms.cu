#include "two_terms.h"

#include "api.h"
#include "launch.h"

namespace ifnd::cuda {

void two_terms(const TwoTermsArguments& p, Stream stream) {
  launch("two_terms_kernel", two_terms_kernel, dim3((p.count + TERMS_WARPS - 1) / TERMS_WARPS), 32 * TERMS_WARPS, 0, stream,
         p);
}

}  // namespace ifnd::cuda
