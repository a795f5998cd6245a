// Records that wait in staging memory for the restore that will read them.
#ifndef JAXKV_CUDA_PREFETCHES_H_
#define JAXKV_CUDA_PREFETCHES_H_

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

#include "cuda/staging_ring.h"

namespace jaxkv::cuda {

// What names a record: the generation of its pool and its address there.
struct RecordName {
  int32_t generation;
  int32_t address;
};

// Some entries of a restore whose records lie in one slot, at these places.
struct Landed {
  StagingRing::Slot* slot;
  std::vector<size_t> entries;
  std::vector<int32_t> places;
};

// Slots that are given back, because nothing that waits in them is wanted any more.
using EmptySlots = std::vector<StagingRing::Slot*>;

// Not for several threads at once.
class Prefetches {
 public:
  // Record `place` of a slot is `name` from now on, and no other is. Returns slots that this leaves empty.
  EmptySlots Add(RecordName name, StagingRing::Slot& slot, int32_t place);
  // The records of `names` that wait, slot by slot. They wait no longer; the slots are the caller's to give
  // back where nothing else waits in them, which `IsEmpty` tells.
  std::vector<Landed> Take(const std::vector<RecordName>& names);
  bool IsEmpty(const StagingRing::Slot& slot) const;
  // These records have changed in their pool.
  EmptySlots Forget(const std::vector<RecordName>& names);
  // The slot in which records have waited longest; null if none do.
  StagingRing::Slot* Oldest() const { return oldest_first_.empty() ? nullptr : oldest_first_.front(); }
  // Nothing waits in this slot any more.
  void ForgetAll(const StagingRing::Slot& slot);

 private:
  struct Place {
    StagingRing::Slot* slot;
    int32_t place;
  };

  static int64_t Key(RecordName name) {
    return static_cast<int64_t>(name.generation) << 32 | static_cast<uint32_t>(name.address);
  }
  void Remove(std::unordered_map<int64_t, Place>::iterator found, EmptySlots& empty);

  std::unordered_map<int64_t, Place> places_;
  std::unordered_map<const StagingRing::Slot*, int32_t> num_waiting_;
  std::deque<StagingRing::Slot*> oldest_first_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_PREFETCHES_H_
