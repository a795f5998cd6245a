// Divides a pool into slabs and slots, and knows which are in use. Offsets only: no memory, no Python.
#ifndef JAXKV_SLOTS_H_
#define JAXKV_SLOTS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <vector>

namespace jaxkv {

// Slots begin at multiples of this, where slabs do.
constexpr int64_t kSlotUnitBytes = 512;

// A pool, a slab or a slot of a size that cannot be.
class SizeError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A slot in use. No other slot of this process ever has the same epoch, so one that was freed is found out.
struct SlotRef {
  int64_t offset;
  int64_t epoch;
};

inline bool operator==(SlotRef a, SlotRef b) { return a.offset == b.offset && a.epoch == b.epoch; }
inline bool operator!=(SlotRef a, SlotRef b) { return !(a == b); }

// Slots that one call names: an array of SlotRef, or an array of their offsets and one of their epochs.
class SlotList {
 public:
  SlotList(const SlotRef* slots, size_t size)
      : offsets_(size == 0 ? nullptr : &slots->offset),
        epochs_(size == 0 ? nullptr : &slots->epoch),
        step_(sizeof(SlotRef) / sizeof(int64_t)),
        size_(size) {}
  SlotList(const int64_t* offsets, const int64_t* epochs, size_t size)
      : offsets_(offsets), epochs_(epochs), step_(1), size_(size) {}

  size_t size() const { return size_; }
  int64_t offset(size_t i) const { return offsets_[i * step_]; }
  int64_t epoch(size_t i) const { return epochs_[i * step_]; }
  // Those before the i-th.
  SlotList First(size_t i) const {
    SlotList first = *this;
    first.size_ = i;
    return first;
  }

 private:
  const int64_t* offsets_;
  const int64_t* epochs_;
  size_t step_;
  size_t size_;
};

// A slot in use and the bytes that were asked for.
struct LiveSlot {
  SlotRef slot;
  int64_t num_bytes;
};

// Bytes that a slot of `slot_bytes` takes: whole pages of 4 KiB if it fills one, else units of 512 bytes.
// Throws SizeError for less than one byte, or more than any pool.
int64_t SlotStride(int64_t slot_bytes);

// Hands out slots. Slabs are equal; each serves one stride at a time and is idle again with its last slot, so
// that slots of several sizes share the bytes. No slot crosses a slab. Slabs in use come before idle ones,
// and the slot freed last is given away first. All methods may be called from several threads.
//
// A slot in use takes 16 bytes here, a slab 40 and what the allocator adds; both only once they were used.
class SlotPool {
 public:
  // Bytes beyond the last whole slab stay unused. Throws SizeError unless at least one slab fits.
  SlotPool(int64_t capacity_bytes, int64_t slab_bytes);
  SlotPool(const SlotPool&) = delete;
  SlotPool& operator=(const SlotPool&) = delete;

  // Cuts other slabs, as a new pool would. False, and nothing changes, while a slot is in use or pinned.
  // Throws SizeError as the constructor does.
  bool Cut(int64_t slab_bytes);

  // A slot; nothing if there is none, or none of this size fits a slab. Throws SizeError as SlotStride does.
  std::optional<SlotRef> Reserve(int64_t slot_bytes);
  // As Reserve for `n` slots, written to `slots`. False, and nothing is reserved, if there are fewer.
  bool Reserve(int64_t slot_bytes, size_t n, SlotRef* slots);

  // Gives a slot back. False if it is not in use. A pinned slot is not given away before it is unpinned.
  bool Free(SlotRef slot);
  // As Free for several slots. False, and none is given back, if one is not in use or named twice.
  bool Free(const SlotList& slots);

  bool IsLive(SlotRef slot) const;
  // The first slot that is not in use, or was reserved with another size than `num_bytes` says.
  std::optional<size_t> FirstNotLive(const SlotList& slots, const int64_t* num_bytes) const;

  // Keeps the bytes of slots theirs until Unpin, even if they are freed. The same slot may be pinned several
  // times. False, and none is pinned, if one is not in use.
  bool Pin(const SlotList& slots);
  // As Pin, for slots that were all reserved with `num_bytes`.
  bool PinOfSize(const SlotList& slots, int64_t num_bytes);
  // Ends what Pin began. Throws std::logic_error for a slot that is not pinned.
  void Unpin(const SlotList& slots);

  int64_t capacity_bytes() const { return capacity_bytes_; }
  int64_t slab_bytes() const;
  int64_t num_slabs() const;
  // Bytes of strides in use: reserved, or freed and still pinned.
  int64_t used_bytes() const;
  // Slots reserved and not freed.
  int64_t num_live() const;
  // Slots of this size in one slab; 0 if they are too large.
  int64_t SlotsPerSlab(int64_t slot_bytes) const;
  // Slots of this size that could be reserved now.
  int64_t NumFree(int64_t slot_bytes) const;
  // The slots reserved and not freed, by offset.
  std::vector<LiveSlot> ListLive() const;
  // The slab an offset lies in.
  int64_t SlabOf(int64_t offset) const;

 private:
  enum class State : uint8_t { kFree, kLive, kFreedWhilePinned };

  struct Slot {
    int64_t epoch;
    union {
      uint32_t pins;       // While it is not free.
      uint32_t next_free;  // While it is.
    };
    uint16_t padding;  // Bytes of its stride that were not asked for.
    State state;
  };

  // Slots and slabs are linked by number; kNone ends a list.
  static constexpr uint32_t kNone = UINT32_MAX;

  struct Slab {
    int64_t stride = 0;             // 0 while it is idle.
    std::unique_ptr<Slot[]> slots;  // Of these, `num_touched` were in use since the slab is.
    uint32_t num_touched = 0;
    uint32_t num_used = 0;
    uint32_t first_free = kNone;  // The slot freed last.
    uint32_t before = kNone;      // Neighbours among the slabs of its stride that have room.
    uint32_t after = kNone;
  };

  // The slabs of one stride that have room, in the order in which they came to have it.
  struct SlabsWithRoom {
    uint32_t first = kNone;
    uint32_t last = kNone;
    int64_t num_free = 0;
  };

  struct Place {
    uint32_t slab;
    uint32_t slot;
  };

  // Everything below is called with the mutex held.
  uint32_t CapacityOf(const Slab& slab) const { return static_cast<uint32_t>(slab_bytes_ / slab.stride); }
  Slot& At(Place place) const { return slabs_[place.slab].slots[place.slot]; }
  // Where the slot at this offset lies, if one there ever was in use.
  std::optional<Place> PlaceOf(int64_t offset) const;
  // Where a slot lies that is in use, or freed and pinned.
  std::optional<Place> Find(SlotRef slot) const;
  // Calls `accept(i, place)` for one slot after the other, until one is neither in use nor freed and pinned,
  // or not accepted. Returns how many came before that. `accept` may release the slot.
  template <typename Accept>
  size_t Walk(const SlotList& slots, const Accept& accept) const;
  // Pins slots that `may_pin(place)`. False, and none is pinned, if there is another.
  template <typename MayPin>
  bool PinWhere(const SlotList& slots, const MayPin& may_pin);
  bool IsLiveAt(Place place) const { return At(place).state == State::kLive; }
  bool HoldsAt(Place place, int64_t num_bytes) const {
    return IsLiveAt(place) && slabs_[place.slab].stride - At(place).padding == num_bytes;
  }
  int64_t CountFree(int64_t stride) const;
  SlotRef Take(int64_t stride, int64_t slot_bytes, int64_t epoch);
  void Release(Place place);
  // Takes slots out of use. False, and nothing changes, if one is not in use or named twice.
  bool EndUse(const SlotList& slots);
  void OpenSlab(int64_t stride);
  void Append(uint32_t index);
  void Unlink(uint32_t index);

  const int64_t capacity_bytes_;
  mutable std::mutex mutex_;
  int64_t slab_bytes_;
  int64_t num_slabs_;
  int64_t used_bytes_ = 0;
  int64_t num_live_ = 0;
  std::vector<Slab> slabs_;     // Those that ever were in use.
  std::vector<uint32_t> idle_;  // Those that are idle again, the last one first.
  std::map<int64_t, SlabsWithRoom> with_room_;
};

}  // namespace jaxkv

#endif  // JAXKV_SLOTS_H_
