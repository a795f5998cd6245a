// Checks who gets which slot, pins, and many threads on one pool. Run it under the sanitizers.
#include "slots.h"

#include <algorithm>
#include <cassert>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

using jaxkv::LiveSlot;
using jaxkv::SizeError;
using jaxkv::SlotList;
using jaxkv::SlotPool;
using jaxkv::SlotRef;
using jaxkv::SlotStride;

namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

template <typename Error, typename Function>
bool Refuses(Function function) {
  try {
    function();
  } catch (const Error&) {
    return true;
  }
  return false;
}

std::vector<int64_t> Offsets(const std::vector<SlotRef>& slots) {
  std::vector<int64_t> offsets;
  for (const SlotRef slot : slots) offsets.push_back(slot.offset);
  return offsets;
}

std::vector<SlotRef> Reserve(SlotPool& pool, int64_t slot_bytes, size_t n) {
  std::vector<SlotRef> slots(n);
  assert(pool.Reserve(slot_bytes, n, slots.data()));
  return slots;
}

void CheckStrides() {
  for (const auto& [bytes, stride] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 512}, {512, 512}, {513, 1024}, {4095, 4096}, {4096, 4096}, {4097, 8192}}) {
    assert(SlotStride(bytes) == stride);
  }
  for (const int64_t bytes : {int64_t{0}, int64_t{-1}, -kMost, kMost}) {
    assert(Refuses<SizeError>([&] { SlotStride(bytes); }));
  }
}

void CheckSizes() {
  for (const auto& [capacity, slab] : std::vector<std::pair<int64_t, int64_t>>{
           {4096, 0}, {4096, -1}, {4096, 4097}, {0, 0}, {-1, -1}, {kMost, 1}, {kMost, kMost}}) {
    assert(Refuses<SizeError>([&] { SlotPool(capacity, slab); }));
  }
  SlotPool pool(10 * 4096 + 100, 8192);
  assert(pool.num_slabs() == 5 && pool.slab_bytes() == 8192 && pool.capacity_bytes() == 10 * 4096 + 100);
  assert(pool.SlotsPerSlab(600) == 8 && pool.SlotsPerSlab(8193) == 0);
  assert(pool.NumFree(600) == 40 && pool.NumFree(8193) == 0);
  assert(!pool.Reserve(8193) && !pool.Reserve(kMost - 4096));
  assert(Refuses<SizeError>([&] { pool.Reserve(0); }) && Refuses<SizeError>([&] { pool.NumFree(-1); }));
  assert(pool.used_bytes() == 0 && pool.num_live() == 0);
}

void CheckOrder() {
  SlotPool pool(4 * 4096, 4096);
  const std::vector<SlotRef> a = Reserve(pool, 2048, 6);
  assert((Offsets(a) == std::vector<int64_t>{0, 2048, 4096, 6144, 8192, 10240}));
  // Slabs serve in the order in which they came to have room; within one, the slot freed last comes first.
  assert(pool.Free(a[2]) && pool.Free(a[0]) && pool.Free(a[3]));
  // The slab of a[2] and a[3] is idle now, so another stride takes it before those never used.
  assert(pool.Reserve(4096)->offset == 4096);
  assert(pool.Free(a[4]));
  assert((Offsets(Reserve(pool, 2048, 4)) == std::vector<int64_t>{0, 8192, 12288, 14336}));
  assert(!pool.Reserve(2048) && pool.used_bytes() == pool.capacity_bytes());
}

void CheckWrongSlots() {
  SlotPool pool(4 * 4096, 4096);
  SlotPool other(4 * 4096, 4096);
  const SlotRef slot = *pool.Reserve(600);
  const SlotRef same_place = *other.Reserve(600);
  assert(slot.offset == same_place.offset && slot.epoch != same_place.epoch);
  const SlotRef wrong[] = {same_place,
                           {slot.offset + 1, slot.epoch},
                           {slot.offset + 1024, slot.epoch},
                           {-1024, slot.epoch},
                           {4096, slot.epoch},
                           {1 << 20, slot.epoch},
                           {kMost, slot.epoch},
                           {-kMost - 1, slot.epoch},
                           {slot.offset, 0}};
  for (const SlotRef bad : wrong) {
    const SlotRef both[] = {slot, bad};
    const int64_t bytes[] = {600, 600};
    assert(!pool.IsLive(bad) && !pool.Free(bad) && !pool.Free({both, 2}) && !pool.Pin({both, 2}));
    assert(pool.FirstNotLive({both, 2}, bytes) == 1u);
    assert(Refuses<std::logic_error>([&] { pool.Unpin({&bad, 1}); }));
  }
  const SlotRef twice[] = {slot, slot};
  assert(!pool.Free({twice, 2}) && pool.IsLive(slot) && pool.num_live() == 1);
  const int64_t right = 600;
  const int64_t another = 700;
  assert(!pool.FirstNotLive({&slot, 1}, &right) && pool.FirstNotLive({&slot, 1}, &another) == 0u);
  assert(Refuses<std::logic_error>([&] { pool.Unpin({&slot, 1}); }));
  assert(pool.Free(slot) && !pool.Free(slot) && !pool.IsLive(slot) && pool.used_bytes() == 0);
  assert(pool.Free({nullptr, 0}) && pool.Pin({nullptr, 0}) && pool.Reserve(600, 0, nullptr));
}

void CheckSlotsNeverTouched() {
  SlotPool pool(20480, 20480);
  const SlotRef first = *pool.Reserve(8192);
  const SlotRef second = *pool.Reserve(8192);
  for (const int64_t offset : {16384, 20479, 20480}) assert(!pool.IsLive({offset, first.epoch}));
  assert(pool.Free(second) && !pool.IsLive(second));
  assert(Refuses<std::logic_error>([&] { pool.Unpin({&second, 1}); }));
  assert(pool.Reserve(8192)->offset == second.offset && !pool.Reserve(8192));
}

void CheckPins() {
  SlotPool pool(2 * 4096, 4096);
  const std::vector<SlotRef> slots = Reserve(pool, 4096, 2);
  assert(pool.Pin({slots.data(), 2}) && pool.Pin({slots.data(), 1}));
  assert(pool.Free({slots.data(), 2}));
  assert(pool.num_live() == 0 && pool.used_bytes() == 8192 && !pool.Reserve(4096));
  assert(!pool.IsLive(slots[0]) && !pool.Pin({slots.data(), 1}) && !pool.Free(slots[0]));
  assert(!pool.Cut(8192) && pool.slab_bytes() == 4096);
  pool.Unpin({slots.data(), 2});
  const SlotRef again = *pool.Reserve(4096);
  assert(again.offset == 4096 && !pool.Reserve(4096));
  pool.Unpin({slots.data(), 1});
  assert(pool.Reserve(4096)->offset == 0);
  assert(Refuses<std::logic_error>([&] { pool.Unpin({slots.data(), 1}); }));
}

void CheckCut() {
  SlotPool pool(4 * 4096, 4096);
  const std::vector<SlotRef> slots = Reserve(pool, 4096, 3);
  assert(!pool.Cut(8192));
  assert(pool.Free({slots.data(), 3}));
  assert(pool.Cut(8192) && pool.num_slabs() == 2 && pool.SlabOf(8192) == 1);
  assert(Refuses<SizeError>([&] { pool.Cut(4 * 4096 + 1); }) && pool.slab_bytes() == 8192);
  assert(!pool.IsLive(slots[0]));
  assert((Offsets(Reserve(pool, 4096, 4)) == std::vector<int64_t>{0, 4096, 8192, 12288}));
}

// A pool that knows only which ranges are taken.
void CheckRandom() {
  std::mt19937 random(7);
  const int64_t sizes[] = {500, 600, 3000, 5000, 12000};
  SlotPool pool(40 * 4096, 16384);
  struct Held {
    SlotRef slot;
    int64_t stride;
    int pins;
    bool live;
  };
  std::vector<Held> held;
  int64_t used = 0;
  for (int step = 0; step < 200000; ++step) {
    const uint32_t action = random() % 4;
    if (action == 0) {
      const int64_t size = sizes[random() % 5];
      const int64_t num_free = pool.NumFree(size);
      const auto slot = pool.Reserve(size);
      assert(slot.has_value() == (num_free > 0));
      if (!slot) continue;
      const int64_t stride = SlotStride(size);
      assert(pool.SlabOf(slot->offset) == pool.SlabOf(slot->offset + stride - 1));
      for (const Held& h : held) {
        assert(h.slot.offset + h.stride <= slot->offset || slot->offset + stride <= h.slot.offset);
        assert(h.stride == stride || pool.SlabOf(h.slot.offset) != pool.SlabOf(slot->offset));
      }
      held.push_back({*slot, stride, 0, true});
      used += stride;
    } else if (!held.empty()) {
      Held& h = held[random() % held.size()];
      if (action == 1) {
        assert(pool.Free(h.slot) == h.live);
        h.live = false;
      } else if (action == 2) {
        assert(pool.Pin({&h.slot, 1}) == h.live);
        h.pins += h.live;
      } else if (h.pins > 0) {
        pool.Unpin({&h.slot, 1});
        --h.pins;
      }
      if (!h.live && h.pins == 0) {
        used -= h.stride;
        std::swap(h, held.back());
        held.pop_back();
      }
    }
    assert(pool.used_bytes() == used);
  }
  std::map<int64_t, int64_t> live;
  for (const Held& h : held) {
    if (h.live) live[h.slot.offset] = h.slot.epoch;
  }
  const std::vector<LiveSlot> listed = pool.ListLive();
  assert(listed.size() == live.size() && pool.num_live() == static_cast<int64_t>(live.size()));
  for (const LiveSlot& entry : listed) {
    assert(live.at(entry.slot.offset) == entry.slot.epoch);
    assert(!pool.FirstNotLive({&entry.slot, 1}, &entry.num_bytes));
  }
}

// Many slots a call, against slots one by one.
class ManySlots {
 public:
  ManySlots() {
    for (const SlotRef slot : Reserve(pool_, kBytes, 60)) known_.push_back({slot, true, 0});
  }

  void Step() {
    NameSome();
    std::vector<int64_t> offsets, epochs;
    for (const SlotRef slot : slots_) {
      offsets.push_back(slot.offset);
      epochs.push_back(slot.epoch);
    }
    const SlotList list = random_() % 2 ? SlotList(slots_.data(), slots_.size())
                                        : SlotList(offsets.data(), epochs.data(), slots_.size());
    const size_t num_live = CountWhile([](const Known& known) { return known.live; });
    const std::vector<int64_t> num_bytes(slots_.size(), kBytes);
    assert(pool_.FirstNotLive(list, num_bytes.data()) ==
           (num_live == slots_.size() ? std::nullopt : std::optional(num_live)));
    switch (random_() % 4) {
      case 0:
        return Free(list, num_live == slots_.size());
      case 1:
        return Pin(list, num_live == slots_.size());
      case 2:
        return Unpin(list);
      default:
        return ReserveAgain();
    }
  }

  void CheckTotals() const {
    int64_t num_used = 0;
    int64_t num_live = 0;
    for (const Known& known : known_) {
      num_used += known.live || known.pins > 0;
      num_live += known.live;
      assert(pool_.IsLive(known.slot) == known.live);
    }
    assert(pool_.num_live() == num_live && pool_.used_bytes() == num_used * SlotStride(kBytes));
  }

 private:
  static constexpr int64_t kBytes = 1500;

  struct Known {
    SlotRef slot;
    bool live;
    int pins;
  };

  // Slots in the order of the list or not, at times one of them twice, or one that is no slot of the pool.
  void NameSome() {
    named_.clear();
    for (size_t i = random_() % known_.size(); i < known_.size(); ++i) named_.push_back(i);
    named_.resize(1 + random_() % named_.size());
    if (random_() % 2) std::shuffle(named_.begin(), named_.end(), random_);
    if (random_() % 4 == 0) named_[random_() % named_.size()] = random_() % known_.size();
    slots_.clear();
    for (const size_t i : named_) slots_.push_back(known_[i].slot);
    if (random_() % 8 == 0) slots_[random_() % slots_.size()].epoch = 0;
  }

  template <typename Holds>
  size_t CountWhile(const Holds& holds) {
    size_t count = 0;
    while (count < slots_.size() && slots_[count].epoch != 0 && holds(known_[named_[count]])) ++count;
    return count;
  }

  void Free(const SlotList& list, bool all_live) {
    const bool frees = all_live && std::set<size_t>(named_.begin(), named_.end()).size() == named_.size();
    assert(pool_.Free(list) == frees);
    for (size_t i = 0; frees && i < named_.size(); ++i) known_[named_[i]].live = false;
  }

  void Pin(const SlotList& list, bool all_live) {
    assert(!pool_.PinOfSize(list, kBytes + 1));
    const bool pins = random_() % 2 ? pool_.Pin(list) : pool_.PinOfSize(list, kBytes);
    assert(pins == all_live);
    for (size_t i = 0; pins && i < named_.size(); ++i) ++known_[named_[i]].pins;
  }

  void Unpin(const SlotList& list) {
    const size_t num_unpinned = CountWhile([](Known& known) { return known.pins > 0 && known.pins-- > 0; });
    assert(Refuses<std::logic_error>([&] { pool_.Unpin(list); }) == (num_unpinned < slots_.size()));
  }

  // Those that are free again get other names, at whatever places; at times all are sorted by place.
  void ReserveAgain() {
    for (Known& known : known_) {
      if (!known.live && known.pins == 0) known = {*pool_.Reserve(kBytes), true, 0};
    }
    if (random_() % 2) return;
    std::sort(known_.begin(), known_.end(),
              [](const Known& a, const Known& b) { return a.slot.offset < b.slot.offset; });
  }

  std::mt19937 random_{11};
  SlotPool pool_{12 * 8192, 8192};
  std::vector<Known> known_;
  std::vector<size_t> named_;
  std::vector<SlotRef> slots_;
};

void CheckMany() {
  ManySlots many;
  for (int step = 0; step < 40000; ++step) {
    many.Step();
    many.CheckTotals();
  }
}

void CheckThreads() {
  SlotPool pool(64 * 4096, 4 * 4096);
  std::vector<int> owner(64 * 8, 0);  // One for each 512 bytes; a race here is a slot given away twice.
  std::vector<std::thread> threads;
  for (int mark = 1; mark <= 4; ++mark) {
    threads.emplace_back([&, mark] {
      std::set<int64_t> epochs;
      for (int round = 0; round < 500; ++round) {
        const int64_t size = (mark + round) % 2 ? 1024 : 8192;
        SlotRef slots[4];
        if (!pool.Reserve(size, 4, slots)) continue;
        assert(pool.Pin({slots, 4}));
        for (const SlotRef slot : slots) {
          assert(epochs.insert(slot.epoch).second);
          for (int64_t i = 0; i < size / 512; ++i) owner[static_cast<size_t>(slot.offset / 512 + i)] = mark;
        }
        assert(round % 3 != 0 || pool.Free({slots, 4}));
        for (const SlotRef slot : slots) {
          for (int64_t i = 0; i < size / 512; ++i) {
            assert(owner[static_cast<size_t>(slot.offset / 512 + i)] == mark);
          }
        }
        assert(pool.NumFree(512) >= 0 && pool.used_bytes() <= pool.capacity_bytes());
        pool.Unpin({slots, 4});
        assert(round % 3 == 0 || pool.Free({slots, 4}));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  assert(pool.used_bytes() == 0 && pool.num_live() == 0 && pool.NumFree(4096) == 64);
}

}  // namespace

int main() {
  CheckStrides();
  CheckSizes();
  CheckOrder();
  CheckWrongSlots();
  CheckSlotsNeverTouched();
  CheckPins();
  CheckCut();
  CheckRandom();
  CheckMany();
  CheckThreads();
  std::puts("slots_test: ok");
}
