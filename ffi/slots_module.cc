// Python's view of SlotPool: slots as arrays of offsets and epochs. Decides nothing.
//
// No Python object is made or dropped while the pool's mutex is held, so the garbage collector cannot come
// back in here under it, and a finalizer may unpin.
#include "slots_module.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "copy.h"
#include "slots.h"

namespace nb = nanobind;

namespace jaxkv {
namespace {

using Numbers = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NewNumbers = nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>;

NewNumbers ToNumpy(std::vector<int64_t> values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  int64_t* data = owned->data();
  const size_t size = owned->size();
  nb::capsule owner(owned.get(), [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
  owned.release();
  return NewNumbers(data, {size}, owner);
}

SlotList ToSlots(const Numbers& offsets, const Numbers& epochs) {
  if (offsets.size() != epochs.size()) throw nb::value_error("each slot needs an offset and an epoch");
  return {offsets.data(), epochs.data(), offsets.size()};
}

std::optional<std::pair<NewNumbers, NewNumbers>> Reserve(SlotPool& pool, int64_t slot_bytes, size_t n) {
  // Whether there are so many is asked before room is made for them: `n` may be anything.
  if (n > static_cast<uint64_t>(pool.NumFree(slot_bytes))) return std::nullopt;
  std::vector<SlotRef> slots(n);
  if (!pool.Reserve(slot_bytes, n, slots.data())) return std::nullopt;
  std::vector<int64_t> offsets(n);
  std::vector<int64_t> epochs(n);
  for (size_t i = 0; i < n; ++i) {
    offsets[i] = slots[i].offset;
    epochs[i] = slots[i].epoch;
  }
  return std::make_pair(ToNumpy(std::move(offsets)), ToNumpy(std::move(epochs)));
}

std::optional<std::pair<int64_t, int64_t>> ReserveOne(SlotPool& pool, int64_t slot_bytes) {
  const std::optional<SlotRef> slot = pool.Reserve(slot_bytes);
  if (!slot) return std::nullopt;
  return std::make_pair(slot->offset, slot->epoch);
}

bool Free(SlotPool& pool, const Numbers& offsets, const Numbers& epochs) {
  return pool.Free(ToSlots(offsets, epochs));
}

bool Pin(SlotPool& pool, const Numbers& offsets, const Numbers& epochs) {
  return pool.Pin(ToSlots(offsets, epochs));
}

std::optional<NewNumbers> PinOfSize(SlotPool& pool, const Numbers& offsets, const Numbers& epochs,
                                    int64_t num_bytes) {
  static_assert(kSlotUnitBytes == kAddressUnitBytes, "an address says where a slot begins");
  const size_t n = offsets.size();
  std::unique_ptr<int64_t[]> addresses(new int64_t[n]);  // Not cleared: all are written.
  for (size_t i = 0; i < n; ++i) addresses[i] = offsets.data()[i] / kSlotUnitBytes;
  if (!pool.PinOfSize(ToSlots(offsets, epochs), num_bytes)) return std::nullopt;
  nb::capsule owner(addresses.get(), [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  return NewNumbers(addresses.release(), {n}, owner);
}

void Unpin(SlotPool& pool, const Numbers& offsets, const Numbers& epochs) {
  pool.Unpin(ToSlots(offsets, epochs));
}

std::tuple<NewNumbers, NewNumbers, NewNumbers> ListLive(const SlotPool& pool) {
  std::vector<int64_t> offsets;
  std::vector<int64_t> epochs;
  std::vector<int64_t> num_bytes;
  for (const LiveSlot& live : pool.ListLive()) {
    offsets.push_back(live.slot.offset);
    epochs.push_back(live.slot.epoch);
    num_bytes.push_back(live.num_bytes);
  }
  return {ToNumpy(std::move(offsets)), ToNumpy(std::move(epochs)), ToNumpy(std::move(num_bytes))};
}

std::optional<size_t> FirstNotLive(const SlotPool& pool, const Numbers& offsets, const Numbers& epochs,
                                   const Numbers& num_bytes) {
  const SlotList slots = ToSlots(offsets, epochs);
  if (num_bytes.size() != slots.size()) throw nb::value_error("each slot needs a number of bytes");
  return pool.FirstNotLive(slots, num_bytes.data());
}

}  // namespace

void RegisterSlots(nb::module_& module) {
  nb::class_<SlotPool>(module, "SlotPool")
      .def(nb::new_([](int64_t capacity_bytes, int64_t slab_bytes) {
             return std::make_shared<SlotPool>(capacity_bytes, slab_bytes);
           }),
           nb::arg("capacity_bytes"), nb::arg("slab_bytes"))
      .def("cut", &SlotPool::Cut, nb::arg("slab_bytes"))
      .def("reserve", &ReserveOne, nb::arg("slot_bytes"))
      .def("reserve_many", &Reserve, nb::arg("slot_bytes"), nb::arg("num_slots"))
      .def("free", &Free, nb::arg("offsets"), nb::arg("epochs"))
      .def("pin", &Pin, nb::arg("offsets"), nb::arg("epochs"))
      .def("pin_of_size", &PinOfSize, nb::arg("offsets"), nb::arg("epochs"), nb::arg("num_bytes"))
      .def("unpin", &Unpin, nb::arg("offsets"), nb::arg("epochs"))
      .def("first_not_live", &FirstNotLive, nb::arg("offsets"), nb::arg("epochs"), nb::arg("num_bytes"))
      .def("list_live", &ListLive)
      .def("slots_per_slab", &SlotPool::SlotsPerSlab, nb::arg("slot_bytes"))
      .def("num_free", &SlotPool::NumFree, nb::arg("slot_bytes"))
      .def("slab_of", &SlotPool::SlabOf, nb::arg("offset"))
      .def_prop_ro("capacity_bytes", &SlotPool::capacity_bytes)
      .def_prop_ro("slab_bytes", &SlotPool::slab_bytes)
      .def_prop_ro("num_slabs", &SlotPool::num_slabs)
      .def_prop_ro("used_bytes", &SlotPool::used_bytes)
      .def_prop_ro("num_live", &SlotPool::num_live);
}

}  // namespace jaxkv
