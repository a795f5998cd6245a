#include "slots.h"

#include <atomic>
#include <limits>
#include <string>
#include <utility>

namespace jaxkv {
namespace {

constexpr int64_t kPageBytes = 4 << 10;
constexpr int64_t kMostBytes = std::numeric_limits<int64_t>::max() - kPageBytes;

// How far ahead of the slot that is looked at memory is asked for, where slots are not named in order.
constexpr size_t kPrefetchedSlots = 16;

std::atomic<int64_t> next_epoch{1};

// How many slabs there are. Throws SizeError if there are none, or more than are numbered.
int64_t CountSlabs(int64_t capacity_bytes, int64_t slab_bytes) {
  const std::string text = "slabs of " + std::to_string(slab_bytes) + " bytes do not fit " +
                           std::to_string(capacity_bytes) + " bytes";
  if (slab_bytes < 1 || slab_bytes > capacity_bytes) throw SizeError(text);
  const int64_t num_slabs = capacity_bytes / slab_bytes;
  constexpr int64_t kMost = std::numeric_limits<uint32_t>::max();
  if (num_slabs >= kMost || slab_bytes / kSlotUnitBytes >= kMost)
    throw SizeError(text + ": too many to number");
  return num_slabs;
}

}  // namespace

int64_t SlotStride(int64_t slot_bytes) {
  if (slot_bytes < 1 || slot_bytes > kMostBytes) {
    throw SizeError("a slot needs a whole number of bytes, at least 1, got " + std::to_string(slot_bytes));
  }
  const int64_t unit = slot_bytes >= kPageBytes ? kPageBytes : kSlotUnitBytes;
  return (slot_bytes + unit - 1) / unit * unit;
}

SlotPool::SlotPool(int64_t capacity_bytes, int64_t slab_bytes)
    : capacity_bytes_(capacity_bytes),
      slab_bytes_(slab_bytes),
      num_slabs_(CountSlabs(capacity_bytes, slab_bytes)) {}

bool SlotPool::Cut(int64_t slab_bytes) {
  const int64_t num_slabs = CountSlabs(capacity_bytes_, slab_bytes);
  const std::lock_guard lock(mutex_);
  if (used_bytes_ != 0) return false;
  slab_bytes_ = slab_bytes;
  num_slabs_ = num_slabs;
  slabs_ = std::vector<Slab>();
  idle_ = std::vector<uint32_t>();
  return true;
}

std::optional<SlotRef> SlotPool::Reserve(int64_t slot_bytes) {
  SlotRef slot;
  if (!Reserve(slot_bytes, 1, &slot)) return std::nullopt;
  return slot;
}

bool SlotPool::Reserve(int64_t slot_bytes, size_t n, SlotRef* slots) {
  const int64_t stride = SlotStride(slot_bytes);
  const std::lock_guard lock(mutex_);
  if (n > static_cast<uint64_t>(CountFree(stride))) return false;
  int64_t epoch = next_epoch.fetch_add(static_cast<int64_t>(n), std::memory_order_relaxed);
  for (size_t i = 0; i < n; ++i) slots[i] = Take(stride, slot_bytes, epoch++);
  return true;
}

bool SlotPool::Free(SlotRef slot) { return Free({&slot, 1}); }

bool SlotPool::Free(const SlotList& slots) {
  const std::lock_guard lock(mutex_);
  if (!EndUse(slots)) return false;
  Walk(slots, [&](size_t, Place place) {
    if (At(place).pins == 0) Release(place);
    return true;
  });
  return true;
}

bool SlotPool::IsLive(SlotRef slot) const {
  const std::lock_guard lock(mutex_);
  const std::optional<Place> place = Find(slot);
  return place && IsLiveAt(*place);
}

std::optional<size_t> SlotPool::FirstNotLive(const SlotList& slots, const int64_t* num_bytes) const {
  const std::lock_guard lock(mutex_);
  const size_t num_live = Walk(slots, [&](size_t i, Place place) { return HoldsAt(place, num_bytes[i]); });
  return num_live == slots.size() ? std::nullopt : std::optional(num_live);
}

template <typename MayPin>
bool SlotPool::PinWhere(const SlotList& slots, const MayPin& may_pin) {
  const std::lock_guard lock(mutex_);
  const size_t num_pinned = Walk(slots, [&](size_t, Place place) {
    if (!may_pin(place)) return false;
    ++At(place).pins;
    return true;
  });
  if (num_pinned == slots.size()) return true;
  Walk(slots.First(num_pinned), [&](size_t, Place place) {
    --At(place).pins;
    return true;
  });
  return false;
}

bool SlotPool::PinOfSize(const SlotList& slots, int64_t num_bytes) {
  return PinWhere(slots, [&](Place place) { return HoldsAt(place, num_bytes); });
}

bool SlotPool::Pin(const SlotList& slots) {
  return PinWhere(slots, [&](Place place) { return IsLiveAt(place); });
}

void SlotPool::Unpin(const SlotList& slots) {
  const std::lock_guard lock(mutex_);
  const size_t num_unpinned = Walk(slots, [&](size_t, Place place) {
    Slot& slot = At(place);
    if (slot.pins == 0) return false;
    if (--slot.pins == 0 && slot.state == State::kFreedWhilePinned) Release(place);
    return true;
  });
  if (num_unpinned != slots.size()) {
    throw std::logic_error("the slot at " + std::to_string(slots.offset(num_unpinned)) + " is not pinned");
  }
}

int64_t SlotPool::slab_bytes() const {
  const std::lock_guard lock(mutex_);
  return slab_bytes_;
}

int64_t SlotPool::num_slabs() const {
  const std::lock_guard lock(mutex_);
  return num_slabs_;
}

int64_t SlotPool::used_bytes() const {
  const std::lock_guard lock(mutex_);
  return used_bytes_;
}

int64_t SlotPool::num_live() const {
  const std::lock_guard lock(mutex_);
  return num_live_;
}

int64_t SlotPool::SlotsPerSlab(int64_t slot_bytes) const {
  const int64_t stride = SlotStride(slot_bytes);
  const std::lock_guard lock(mutex_);
  return slab_bytes_ / stride;
}

int64_t SlotPool::NumFree(int64_t slot_bytes) const {
  const int64_t stride = SlotStride(slot_bytes);
  const std::lock_guard lock(mutex_);
  return CountFree(stride);
}

std::vector<LiveSlot> SlotPool::ListLive() const {
  const std::lock_guard lock(mutex_);
  std::vector<LiveSlot> live;
  live.reserve(static_cast<size_t>(num_live_));
  for (size_t index = 0; index < slabs_.size(); ++index) {
    const Slab& slab = slabs_[index];
    for (uint32_t number = 0; number < slab.num_touched; ++number) {
      const Slot& slot = slab.slots[number];
      if (slot.state != State::kLive) continue;
      const int64_t offset = static_cast<int64_t>(index) * slab_bytes_ + number * slab.stride;
      live.push_back({{offset, slot.epoch}, slab.stride - slot.padding});
    }
  }
  return live;
}

int64_t SlotPool::SlabOf(int64_t offset) const {
  const std::lock_guard lock(mutex_);
  return offset / slab_bytes_;
}

inline std::optional<SlotPool::Place> SlotPool::PlaceOf(int64_t offset) const {
  const auto index = static_cast<uint64_t>(offset / slab_bytes_);
  if (index >= slabs_.size()) return std::nullopt;
  const Slab& slab = slabs_[index];
  if (slab.stride == 0) return std::nullopt;
  const int64_t within = offset - static_cast<int64_t>(index) * slab_bytes_;
  const auto number = static_cast<uint64_t>(within / slab.stride);
  if (number >= slab.num_touched || static_cast<int64_t>(number) * slab.stride != within) return std::nullopt;
  return Place{static_cast<uint32_t>(index), static_cast<uint32_t>(number)};
}

std::optional<SlotPool::Place> SlotPool::Find(SlotRef slot) const {
  std::optional<Place> place;
  Walk({&slot, 1}, [&](size_t, Place found) {
    place = found;
    return true;
  });
  return place;
}

template <typename Accept>
size_t SlotPool::Walk(const SlotList& slots, const Accept& accept) const {
  size_t i = 0;
  while (i < slots.size()) {
    if (i + kPrefetchedSlots < slots.size()) {
      const std::optional<Place> ahead = PlaceOf(slots.offset(i + kPrefetchedSlots));
      if (ahead) __builtin_prefetch(&At(*ahead));
    }
    std::optional<Place> place = PlaceOf(slots.offset(i));
    if (!place) return i;
    // Slots are mostly named in order: those that follow in the slab need no division. A slab whose last slot
    // is released has none left.
    const Slab& slab = slabs_[place->slab];
    const int64_t stride = slab.stride;
    for (int64_t offset = slots.offset(i); slots.offset(i) == offset; offset += stride) {
      const Slot& slot = At(*place);
      if (slot.state == State::kFree || slot.epoch != slots.epoch(i) || !accept(i, *place)) return i;
      ++i;
      if (i == slots.size() || ++place->slot >= slab.num_touched) break;
    }
  }
  return i;
}

int64_t SlotPool::CountFree(int64_t stride) const {
  const auto found = with_room_.find(stride);
  const int64_t in_open_slabs = found == with_room_.end() ? 0 : found->second.num_free;
  const int64_t num_unopened = num_slabs_ - static_cast<int64_t>(slabs_.size());
  return in_open_slabs + (static_cast<int64_t>(idle_.size()) + num_unopened) * (slab_bytes_ / stride);
}

SlotRef SlotPool::Take(int64_t stride, int64_t slot_bytes, int64_t epoch) {
  SlabsWithRoom& with_room = with_room_[stride];
  if (with_room.first == kNone) OpenSlab(stride);
  const uint32_t index = with_room.first;
  Slab& slab = slabs_[index];
  uint32_t number;
  if (slab.first_free != kNone) {
    number = slab.first_free;
    slab.first_free = slab.slots[number].next_free;
  } else {
    number = slab.num_touched++;
  }
  Slot& slot = slab.slots[number];
  slot.epoch = epoch;
  slot.pins = 0;
  slot.padding = static_cast<uint16_t>(stride - slot_bytes);
  slot.state = State::kLive;
  ++slab.num_used;
  --with_room.num_free;
  used_bytes_ += stride;
  ++num_live_;
  if (slab.num_used == CapacityOf(slab)) Unlink(index);
  return {static_cast<int64_t>(index) * slab_bytes_ + static_cast<int64_t>(number) * stride, epoch};
}

void SlotPool::Release(Place place) {
  Slab& slab = slabs_[place.slab];
  SlabsWithRoom& with_room = with_room_[slab.stride];
  const uint32_t capacity = CapacityOf(slab);
  if (slab.num_used == capacity) Append(place.slab);
  Slot& slot = slab.slots[place.slot];
  slot.state = State::kFree;
  slot.next_free = slab.first_free;
  slab.first_free = place.slot;
  --slab.num_used;
  ++with_room.num_free;
  used_bytes_ -= slab.stride;
  if (slab.num_used == 0) {
    with_room.num_free -= capacity;
    Unlink(place.slab);
    slab = Slab{};
    idle_.push_back(place.slab);
  }
}

bool SlotPool::EndUse(const SlotList& slots) {
  const size_t num_ended = Walk(slots, [&](size_t, Place place) {
    if (!IsLiveAt(place)) return false;
    At(place).state = State::kFreedWhilePinned;
    return true;
  });
  if (num_ended != slots.size()) {
    Walk(slots.First(num_ended), [&](size_t, Place place) {
      At(place).state = State::kLive;
      return true;
    });
    return false;
  }
  num_live_ -= static_cast<int64_t>(slots.size());
  return true;
}

void SlotPool::OpenSlab(int64_t stride) {
  Slab slab;
  slab.stride = stride;
  slab.slots.reset(new Slot[CapacityOf(slab)]);  // Read only once it was written.
  const uint32_t capacity = CapacityOf(slab);
  uint32_t index;
  if (idle_.empty()) {
    index = static_cast<uint32_t>(slabs_.size());
    slabs_.push_back(std::move(slab));
  } else {
    index = idle_.back();
    idle_.pop_back();
    slabs_[index] = std::move(slab);
  }
  with_room_[stride].num_free += capacity;
  Append(index);
}

void SlotPool::Append(uint32_t index) {
  Slab& slab = slabs_[index];
  SlabsWithRoom& with_room = with_room_[slab.stride];
  slab.before = with_room.last;
  slab.after = kNone;
  (with_room.last == kNone ? with_room.first : slabs_[with_room.last].after) = index;
  with_room.last = index;
}

void SlotPool::Unlink(uint32_t index) {
  const Slab& slab = slabs_[index];
  SlabsWithRoom& with_room = with_room_[slab.stride];
  (slab.before == kNone ? with_room.first : slabs_[slab.before].after) = slab.after;
  (slab.after == kNone ? with_room.last : slabs_[slab.after].before) = slab.before;
}

}  // namespace jaxkv
