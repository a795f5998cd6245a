// memcpy run by run, in as many threads as asked for: the plain way to move pages, and with one run a thread
// the fastest copy libc has.
#include "bench_module.h"

#include <nanobind/ndarray.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Source = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void RequireInside(const Numbers& offsets, int64_t run_bytes, size_t num_bytes) {
  const int64_t last = static_cast<int64_t>(num_bytes) - run_bytes;
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets(i) < 0 || offsets(i) > last) throw nb::index_error("a run lies outside its array");
  }
}

void CopyRuns(const Target& to, const Numbers& to_offsets, const Source& from, const Numbers& from_offsets,
              int64_t run_bytes, int64_t num_threads) {
  const int64_t num_runs = static_cast<int64_t>(to_offsets.size());
  if (to_offsets.size() != from_offsets.size()) throw nb::value_error("each run needs two offsets");
  if (run_bytes < 1 || num_threads < 1) throw nb::value_error("run_bytes and num_threads are at least 1");
  RequireInside(to_offsets, run_bytes, to.size());
  RequireInside(from_offsets, run_bytes, from.size());
  nb::gil_scoped_release unlocked;
  auto copy_share = [&](int64_t thread) {
    for (int64_t i = num_runs * thread / num_threads; i < num_runs * (thread + 1) / num_threads; ++i) {
      std::memcpy(to.data() + to_offsets.data()[i], from.data() + from_offsets.data()[i],
                  static_cast<size_t>(run_bytes));
    }
  };
  std::vector<std::thread> threads;
  for (int64_t thread = 1; thread < num_threads; ++thread) threads.emplace_back(copy_share, thread);
  copy_share(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void RegisterBench(nb::module_& module) {
  module.def("bench_memcpy", &CopyRuns, nb::arg("to").noconvert(), nb::arg("to_offsets"),
             nb::arg("from_").noconvert(), nb::arg("from_offsets"), nb::arg("run_bytes"),
             nb::arg("num_threads"));
}

}  // namespace jaxkv
