#include "cuda/bounce.h"

#include <exception>
#include <utility>

namespace jaxkv::cuda {

BounceRing::BounceRing(Runtime& runtime, int64_t num_slots, int64_t slot_bytes)
    : runtime_(runtime), slot_bytes_(slot_bytes) {
  try {
    for (int64_t i = 0; i < num_slots; ++i) {
      slots_.push_back({nullptr, nullptr});
      slots_.back().data = runtime_.AllocatePinned(slot_bytes);
      slots_.back().event = runtime_.MakeEvent();
    }
  } catch (const CudaError&) {
    FreeSlots();
    throw;
  }
  thread_ = std::thread([this] { Work(); });
}

BounceRing::~BounceRing() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  thread_.join();
  try {
    FreeSlots();
  } catch (const CudaError&) {
    // The device is lost.
  }
}

void BounceRing::FreeSlots() {
  for (const Slot& slot : slots_) {
    if (slot.data != nullptr) runtime_.FreePinned(slot.data);
    if (slot.event != nullptr) runtime_.FreeEvent(slot.event);
  }
}

BounceRing::Slot& BounceRing::Acquire() {
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  WaitUntil([&] { return !slot.waits; });
  if (slot.recorded) runtime_.Synchronize(slot.event);
  return slot;
}

void BounceRing::ReadBy(Slot& slot, Stream user) {
  runtime_.Record(slot.event, user);
  slot.recorded = true;
}

void BounceRing::FilledBy(Slot& slot, Stream user, std::function<void(const char*)> empty) {
  runtime_.Record(slot.event, user);
  slot.recorded = true;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    slot.waits = true;
    jobs_.push_back({&slot, std::move(empty)});
  }
  changed_.notify_all();
}

void BounceRing::WaitUntil(const std::function<bool()>& is_true) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, is_true);
}

void BounceRing::Work() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return ends_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    Do(job);
    lock.lock();
    job.slot->waits = false;
    changed_.notify_all();
  }
}

void BounceRing::Do(Job& job) {
  try {
    runtime_.Synchronize(job.slot->event);
    job.empty(nullptr);
  } catch (const std::exception& error) {
    job.empty(error.what());
  }
}

}  // namespace jaxkv::cuda
