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

// The arguments of a kernel by name: numbers, and addresses (0 for null; those that a kernel does not use may be missing).
struct Named {
  const nb::kwargs& values;
  template <class T>
  T number(const char* name) const {
    return nb::cast<T>(values[name]);
  }
  template <class T>
  T* at(const char* name) const {
    return values.contains(name) ? reinterpret_cast<T*>(nb::cast<uintptr_t>(values[name])) : nullptr;
  }
  bool is(const char* name, const char* value) const { return number<std::string>(name) == value; }
  Numbers numbers() const {
    return is("numbers", "two_terms") ? Numbers::TWO_TERMS : is("numbers", "bfloat16") ? Numbers::BFLOAT16 : Numbers::FLOAT16;
  }
  Stream stream() const { return reinterpret_cast<Stream>(number<uintptr_t>("stream")); }
};

void terms(const nb::kwargs& values) {
  const Named n{values};
  TwoTermsArguments p{};
  p.rows = n.at<float>("rows"), p.terms = n.at<u16>("terms"), p.units = n.at<float>("units");
  p.lengths = n.at<float>("lengths"), p.summary = n.at<float>("summary");
  p.count = n.number<int>("count"), p.columns = n.number<int>("columns"), p.D = n.number<int>("D");
  two_terms(p, n.stream());
}

AssignArguments assign_arguments(const Named& n) {
  AssignArguments p{};
  p.features = n.at<u16>("features"), p.centroids = n.at<u16>("centroids");
  p.half_norms = n.at<float>("half_norms");
  p.feature_units = n.at<float>("feature_units"), p.centroid_units = n.at<float>("centroid_units");
  p.exact_features = n.at<float>("exact_features"), p.exact_centroids = n.at<float>("exact_centroids");
  p.centroid_summary = n.at<float>("centroid_summary");
  p.rows = n.at<int>("rows"), p.row_count = n.at<int>("row_count"), p.margins = n.at<float>("margins");
  p.labels = n.at<int>("labels"), p.confidence = n.at<float>("confidence");
  p.near_rows = n.at<int>("near_rows"), p.near_count = n.at<int>("near_count");
  p.N = n.number<int>("N"), p.C = n.number<int>("C"), p.D = n.number<int>("D");
  p.columns = n.number<int>("columns"), p.scale = n.number<float>("scale");
  return p;
}

void assign(const nb::kwargs& values) {
  const Named n{values};
  const Assign mode = n.is("mode", "confidence") ? Assign::CONFIDENCE
                      : n.is("mode", "screen")   ? Assign::SCREEN
                                                 : Assign::LABELS;
  assign_clusters(assign_arguments(n), n.numbers(), mode, n.stream());
}

void exactly(const nb::kwargs& values) {
  const Named n{values};
  assign_exactly(assign_arguments(n), n.stream());
}

void loss_pass(const nb::kwargs& values) {
  const Named n{values};
  const Side queries{n.at<u16>("query"), n.at<float>("query_units"), n.at<float>("query_summary"),
                     n.at<int>("query_labels"), n.at<long long>("query_ids"), n.number<int>("B")};
  const Side negatives{n.at<u16>("negatives"), n.at<float>("negative_units"), n.at<float>("negative_summary"),
                       n.at<int>("negative_labels"), n.at<long long>("negative_ids"), n.number<int>("K")};
  const Pass pass = n.is("step", "dense")         ? Pass::DENSE
                    : n.is("step", "marked_sums") ? Pass::MARKED_SUMS
                    : n.is("step", "marked_grad") ? Pass::MARKED_GRAD
                                                  : Pass::NEGATIVES;
  InfoNceArguments p{};
  p.rows = pass == Pass::NEGATIVES ? negatives : queries;
  p.columns = pass == Pass::NEGATIVES ? queries : negatives;
  p.D = n.number<int>("D"), p.L = n.number<int>("L"), p.grad_columns = n.number<int>("grad_columns");
  p.split_columns = n.number<int>("split_columns"), p.tiles = n.number<int>("tiles");
  p.scale = n.number<float>("scale"), p.shift = n.number<float>("shift");
  p.n_losses = n.number<int>("n_losses"), p.all_levels = n.number<bool>("all_levels");
  p.attract = n.number<bool>("attract"), p.with_grad = n.number<bool>("with_grad");
  p.split_max = n.at<float>("split_max"), p.split_sum = n.at<float>("split_sum");
  p.split_grad = n.at<float>("split_grad"), p.flags = n.at<unsigned char>("flags");
  p.level_max = n.at<float>("level_max"), p.level_sum = n.at<float>("level_sum");
  p.level_count = n.at<int>("level_count"), p.split_factor = n.at<float>("split_factor");
  p.log_normalizer = n.at<float>("log_normalizer"), p.false_negative_counts = n.at<int>("false_negative_counts");
  p.loss_grad = n.at<float>("loss_grad"), p.negatives_grad = n.at<float>("negatives_grad");
  info_nce(p, n.numbers(), pass, n.number<int>("warps"), n.number<int>("splits"), n.stream());
}

NormaliseArguments normalise_arguments(const Named& n) {
  NormaliseArguments p{};
  p.query = n.at<void>("query"), p.positive = n.at<void>("positive");
  p.split_max = n.at<float>("split_max"), p.split_sum = n.at<float>("split_sum");
  p.split_grad = n.at<float>("split_grad"), p.split_factor = n.at<float>("split_factor");
  p.level_max = n.at<float>("level_max"), p.level_sum = n.at<float>("level_sum");
  p.level_count = n.at<int>("level_count"), p.false_negative_counts = n.at<int>("false_negative_counts");
  p.loss = n.at<float>("loss"), p.log_normalizer = n.at<float>("log_normalizer");
  p.positive_weight = n.at<float>("positive_weight"), p.query_grad = n.at<float>("query_grad");
  p.B = n.number<int>("B"), p.D = n.number<int>("D"), p.n_losses = n.number<int>("n_losses"), p.splits = n.number<int>("splits");
  p.kind = n.number<int>("kind");
  p.scale = n.number<float>("scale"), p.inverse_temperature = n.number<float>("inverse_temperature");
  p.attract = n.number<bool>("attract"), p.has_marked_pass = n.number<bool>("has_marked_pass");
  return p;
}

void normalise(const nb::kwargs& values) {
  const Named n{values};
  info_nce_normalise(normalise_arguments(n), n.stream());
}

void add_splits(const nb::kwargs& values) {
  const Named n{values};
  info_nce_add_splits(normalise_arguments(n), n.stream());
}

void sums(const nb::kwargs& values) {
  const Named n{values};
  ClusterSumsArguments p{};
  p.features = n.at<void>("features"), p.centroids = n.at<float>("centroids"), p.labels = n.at<int>("labels");
  p.order = n.at<long long>("order"), p.begins = n.at<long long>("begins");
  p.sums = n.at<double>("sums"), p.distances = n.at<float>("distances");
  p.N = n.number<int>("N"), p.C = n.number<int>("C"), p.D = n.number<int>("D");
  p.parts = n.number<int>("parts"), p.kind = n.number<int>("kind");
  cluster_sums(p, n.stream());
}

}  // namespace

NB_MODULE(IFND_MODULE_NAME, m) {
  m.doc() = "The GPUs that this process sees, and kernels that run on a stream of the current one.";
  m.attr("architectures") = IFND_CUDA_ARCHITECTURES;
  m.def("device_count", &device_count, "0 where there is no driver or no device.");
  m.def("device", &device_properties, "index"_a,
        "name, compute_capability (major, minor), multiprocessors and memory (bytes) of one GPU.");
  // Arguments by name, as in the struct of each kernel.
  m.def("two_terms", &terms, "csrc/cuda/two_terms.h");
  m.def("assign_exactly", &exactly, "csrc/cuda/assign.h: exact_kernel");
  m.def("assign_clusters", &assign, "csrc/cuda/assign.h; mode is \"labels\", \"confidence\" or \"screen\".");
  m.def("info_nce", &loss_pass,
        "csrc/cuda/info_nce.h; step is \"dense\", \"marked_sums\", \"marked_grad\" or \"negatives\".");
  m.def("info_nce_normalise", &normalise, "csrc/cuda/normalise.h");
  m.def("cluster_sums", &sums, "csrc/cuda/cluster_sums.h");
  m.def("info_nce_add_splits", &add_splits, "csrc/cuda/normalise.h");
}
