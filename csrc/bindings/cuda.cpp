// The module ifnd_fast._cuda: which GPUs there are, and the kernels. Tensors come as addresses: their shapes, dtypes and
// devices are checked in Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "../cuda/api.h"
#include "../cuda/device.h"

namespace nb = nanobind;
using nb::literals::operator""_a;
using namespace ifnd::cuda;

namespace {

nb::dict device_properties(int index) {
  const Device d = device(index);
  nb::dict out;
  out["name"] = d.name;
  out["compute_capability"] = nb::make_tuple(d.major, d.minor);
  out["multiprocessors"] = d.multiprocessors;
  out["memory"] = d.memory;
  return out;
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void assign(uintptr_t features, uintptr_t centroids, uintptr_t half_norms, uintptr_t unit, uintptr_t rows,
            uintptr_t row_count, uintptr_t margins, uintptr_t labels, uintptr_t confidence, uintptr_t near_rows,
            uintptr_t near_count, int N, int C, int D, int terms, int stored_terms, float scale, bool bfloat16,
            const std::string& mode, uintptr_t stream) {
  const AssignArguments p{at<u16>(features), at<u16>(centroids), at<float>(half_norms), at<float>(unit), at<int>(rows),
                          at<int>(row_count), at<float>(margins), at<int>(labels), at<float>(confidence),
                          at<int>(near_rows), at<int>(near_count), N, C, D, terms, stored_terms, scale};
  const Assign how = mode == "confidence" ? Assign::CONFIDENCE : mode == "screen" ? Assign::SCREEN : Assign::LABELS;
  assign_clusters(p, bfloat16, how, reinterpret_cast<Stream>(stream));
}

}  // namespace

NB_MODULE(IFND_MODULE_NAME, m) {
  m.doc() = "The GPUs that this process sees, and kernels that run on a stream of the current one.";
  m.attr("architectures") = IFND_CUDA_ARCHITECTURES;
  m.def("device_count", &device_count, "0 where there is no driver or no device.");
  m.def("device", &device_properties, "index"_a,
        "name, compute_capability (major, minor), multiprocessors and memory (bytes) of one GPU.");
  m.def("assign_clusters", &assign, nb::kw_only(), "features"_a, "centroids"_a, "half_norms"_a = 0, "unit"_a = 0,
        "rows"_a = 0, "row_count"_a = 0, "margins"_a = 0, "labels"_a, "confidence"_a = 0, "near_rows"_a = 0,
        "near_count"_a = 0, "N"_a, "C"_a, "D"_a, "terms"_a = 1, "stored_terms"_a = 1, "scale"_a = 0.f,
        "bfloat16"_a = false, "mode"_a, "stream"_a,
        "Nearest centroids, as csrc/cuda/assign.h says; mode is \"labels\", \"confidence\" or \"screen\".");
}
