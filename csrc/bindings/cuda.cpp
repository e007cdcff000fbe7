// The module ifnd_fast._cuda: for now it only says which GPUs there are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "../cuda/device.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace {

nb::dict device(int index) {
  const ifnd::cuda::Device d = ifnd::cuda::device(index);
  nb::dict out;
  out["name"] = d.name;
  out["compute_capability"] = nb::make_tuple(d.major, d.minor);
  out["multiprocessors"] = d.multiprocessors;
  out["memory"] = d.memory;
  return out;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "The GPUs that this process sees.";
  m.attr("architectures") = IFND_CUDA_ARCHITECTURES;
  m.def("device_count", &ifnd::cuda::device_count, "0 where there is no driver or no device.");
  m.def("device", &device, "index"_a,
        "name, compute_capability (major, minor), multiprocessors and memory (bytes) of one GPU.");
}
