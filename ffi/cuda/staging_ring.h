// Memory of the device that records pass through, in equal slots that are used by turns.
#ifndef JAXKV_CUDA_STAGING_RING_H_
#define JAXKV_CUDA_STAGING_RING_H_

#include <cstdint>
#include <vector>

#include "cuda/runtime.h"

namespace jaxkv::cuda {

// Not for several threads at once. `runtime` must outlive it.
class StagingRing {
 public:
  struct Slot {
    uint8_t* data;
    Event ready;        // recorded when it was filled
    Event free;         // recorded when it was emptied
    bool used = false;  // `free` was recorded
    bool held = false;  // not to be acquired until it is released
  };

  // Throws CudaError where the device has not that much memory left.
  StagingRing(Runtime& runtime, int64_t num_slots, int64_t slot_bytes);
  // Waits until every slot that was released is empty.
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }

  // The next slot that is not held. Work given to `filler` from now on finds it free.
  Slot& Acquire(Stream filler);
  // The same, to be held until it is released; null where that would leave too few for others.
  Slot* AcquireToHold(Stream filler);
  // What `filler` was given fills the slot.
  void Fill(Slot& slot, Stream filler);
  // Work given to `emptier` from now on finds it filled.
  void Await(Slot& slot, Stream emptier);
  // What `emptier` was given empties the slot.
  void Release(Slot& slot, Stream emptier);
  // Reads a part of a slot that stays held. What `reader` was given before comes first; `Note` follows what
  // it was given for it.
  void AwaitPart(Slot& slot, Stream reader);
  void NotePart(Slot& slot, Stream reader);
  // The slot is not wanted any more. Who fills it next, on the stream that filled it last, waits for those
  // who read parts of it.
  void Abandon(Slot& slot);

 private:
  Slot& Next();
  void FreeEvents();

  Runtime& runtime_;
  const int64_t slot_bytes_;
  uint8_t* data_ = nullptr;
  std::vector<Slot> slots_;
  size_t next_ = 0;
  size_t num_held_ = 0;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_STAGING_RING_H_
