// Pinned memory through which a device reaches host memory that could not be pinned.
#ifndef JAXKV_CUDA_BOUNCE_H_
#define JAXKV_CUDA_BOUNCE_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/runtime.h"

namespace jaxkv::cuda {

// A few slots that are used by turns, and a thread that empties those a device has filled.
class BounceRing {
 public:
  struct Slot {
    uint8_t* data;
    Event event;            // what the device was last asked to do with it
    bool recorded = false;  // `event` was
    bool waits = false;     // for the thread
  };

  // `runtime` must outlive it. Throws CudaError.
  BounceRing(Runtime& runtime, int64_t num_slots, int64_t slot_bytes);
  // Ends once no slot waits any more.
  ~BounceRing();
  BounceRing(const BounceRing&) = delete;
  BounceRing& operator=(const BounceRing&) = delete;

  int64_t slot_bytes() const { return slot_bytes_; }

  // The next slot, once nothing uses it. One caller at a time.
  Slot& Acquire();
  // `user` was given work that reads the slot.
  void ReadBy(Slot& slot, Stream user);
  // `user` was given work that fills the slot: once that has ended, the thread calls `empty`; with the reason
  // where it failed, or `empty` itself threw.
  void FilledBy(Slot& slot, Stream user, std::function<void(const char* error)> empty);
  // Returns once `is_true`, which the thread may make so.
  void WaitUntil(const std::function<bool()>& is_true);

 private:
  struct Job {
    Slot* slot;
    std::function<void(const char*)> empty;
  };

  void FreeSlots();
  void Work();
  void Do(Job& job);

  Runtime& runtime_;
  const int64_t slot_bytes_;
  std::vector<Slot> slots_;
  size_t next_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_BOUNCE_H_
