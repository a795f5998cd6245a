// Python's view of what pool ops are given, and of calling them off. Decides nothing.
#include "entries_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <utility>

#include "cancellations.h"
#include "entries.h"

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers32 = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;

// XLA takes an array of NumPy's as it is from such an address, and copies it from others.
constexpr std::align_val_t kAlignment{64};

struct FreeAligned {
  void operator()(int32_t* numbers) const { ::operator delete[](numbers, kAlignment); }
};

std::optional<size_t> FindOutside(const Numbers& block_ids, int64_t num_blocks) {
  return FirstOutside(block_ids.data(), block_ids.size(), num_blocks);
}

std::optional<size_t> FindRepeated(const Numbers& values) {
  return FirstRepeated(values.data(), values.size());
}

std::pair<Numbers32, int64_t> MakeEntries(const Numbers& block_ids, const Numbers& chunk_addresses,
                                          std::tuple<int64_t, int64_t, int64_t> layout,
                                          std::pair<int32_t, int32_t> call, size_t num_entries) {
  const auto [blocks_per_chunk, first_block, record_units] = layout;
  const size_t n = block_ids.size();
  if (n > num_entries || blocks_per_chunk < 1 || first_block < 0) {
    throw nb::value_error("more blocks than entries, or chunks that hold none");
  }
  const auto per_chunk = static_cast<uint64_t>(blocks_per_chunk);
  const uint64_t end = static_cast<uint64_t>(first_block) + n;  // Both below 2^63.
  if (end / per_chunk + (end % per_chunk != 0) > chunk_addresses.size()) {
    throw nb::value_error("each entry needs a chunk");
  }
  const size_t size = 2 + 2 * num_entries;
  std::unique_ptr<int32_t[], FreeAligned> owned(new (kAlignment) int32_t[size]);
  owned[0] = call.first;
  owned[1] = call.second;
  int32_t* ids = owned.get() + 2;
  int32_t* addresses = ids + num_entries;
  const int64_t num_blocks = FillEntries(block_ids.data(), n, chunk_addresses.data(),
                                         {blocks_per_chunk, first_block, record_units}, ids, addresses);
  std::fill(ids + n, addresses, -1);
  std::fill(addresses + n, owned.get() + size, 0);
  nb::capsule owner(owned.get(), [](void* p) noexcept { FreeAligned()(static_cast<int32_t*>(p)); });
  return {Numbers32(owned.release(), {size}, owner), num_blocks};
}

}  // namespace

void RegisterEntries(nb::module_& module) {
  module.def("first_outside", &FindOutside, nb::arg("block_ids"), nb::arg("num_blocks"));
  module.def("first_repeated", &FindRepeated, nb::arg("values"));
  module.def("make_entries", &MakeEntries, nb::arg("block_ids"), nb::arg("chunk_addresses"),
             nb::arg("layout"), nb::arg("call"), nb::arg("num_entries"));
  module.def("cancel_call", [](int32_t call) { Cancellations::Global().Add(call); }, nb::arg("call"));
  module.def("forget_call", [](int32_t call) { Cancellations::Global().Remove(call); }, nb::arg("call"));
}

}  // namespace jaxkv
