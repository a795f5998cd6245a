// Copies run by run, in as many threads as asked for: the plain way to move pages, and what memory can do.
#include "bench_module.h"

#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Source = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Target = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kPortionBytes = 1 << 20;

void RequireInside(const Numbers& offsets, int64_t run_bytes, size_t num_bytes) {
  const int64_t last = static_cast<int64_t>(num_bytes) - run_bytes;
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets(i) < 0 || offsets(i) > last) throw nb::index_error("a run lies outside its array");
  }
}

void PlainCopy(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
  std::memcpy(to, from, static_cast<size_t>(num_bytes));
}

// memcpy that does not read what it overwrites. libc does this too, from a size on that differs.
void StreamingCopy(uint8_t* to, const uint8_t* from, int64_t num_bytes) {
#ifdef __SSE2__
  const int64_t before = std::min<int64_t>(-reinterpret_cast<intptr_t>(to) & 15, num_bytes);
  PlainCopy(to, from, before);
  int64_t i = before;
  for (; i + 16 <= num_bytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
  PlainCopy(to + i, from + i, num_bytes - i);
  _mm_sfence();
#else
  PlainCopy(to, from, num_bytes);
#endif
}

void CopyRuns(const Target& to, const Numbers& to_offsets, const Source& from, const Numbers& from_offsets,
              int64_t run_bytes, int64_t num_threads, bool streaming) {
  const int64_t num_runs = static_cast<int64_t>(to_offsets.size());
  if (to_offsets.size() != from_offsets.size()) throw nb::value_error("each run needs two offsets");
  if (run_bytes < 1 || num_threads < 1) throw nb::value_error("run_bytes and num_threads are at least 1");
  RequireInside(to_offsets, run_bytes, to.size());
  RequireInside(from_offsets, run_bytes, from.size());
  nb::gil_scoped_release unlocked;
  const auto copy = streaming ? StreamingCopy : PlainCopy;
  // Threads take portions as they go, so that one that is held up does not hold up all.
  const int64_t portion = std::max<int64_t>(kPortionBytes / run_bytes, 1);
  std::atomic<int64_t> next{0};
  auto copy_share = [&] {
    for (int64_t begin = next.fetch_add(portion); begin < num_runs; begin = next.fetch_add(portion)) {
      for (int64_t i = begin; i < std::min(begin + portion, num_runs); ++i) {
        copy(to.data() + to_offsets.data()[i], from.data() + from_offsets.data()[i], run_bytes);
      }
    }
  };
  std::vector<std::thread> threads;
  for (int64_t thread = 1; thread < num_threads; ++thread) threads.emplace_back(copy_share);
  copy_share();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void RegisterBench(nb::module_& module) {
  module.def("bench_memcpy", &CopyRuns, nb::arg("to").noconvert(), nb::arg("to_offsets"),
             nb::arg("from_").noconvert(), nb::arg("from_offsets"), nb::arg("run_bytes"),
             nb::arg("num_threads"), nb::kw_only(), nb::arg("streaming") = false);
}

}  // namespace jaxkv
