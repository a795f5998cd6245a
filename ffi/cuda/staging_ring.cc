#include "cuda/staging_ring.h"

namespace jaxkv::cuda {
namespace {

// Slots that are never held: one is filled while the other is emptied.
constexpr size_t kLeastFree = 2;

}  // namespace

StagingRing::StagingRing(Runtime& runtime, int64_t num_slots, int64_t slot_bytes)
    : runtime_(runtime), slot_bytes_(slot_bytes), data_(runtime.AllocateDevice(num_slots * slot_bytes)) {
  try {
    for (int64_t i = 0; i < num_slots; ++i) {
      slots_.push_back({data_ + i * slot_bytes, nullptr, nullptr});
      slots_.back().ready = runtime_.MakeEvent();
      slots_.back().free = runtime_.MakeEvent();
    }
  } catch (const CudaError&) {
    FreeEvents();
    runtime_.FreeDevice(data_);
    throw;
  }
}

StagingRing::~StagingRing() {
  try {
    for (const Slot& slot : slots_) {
      if (slot.used) runtime_.Synchronize(slot.free);
    }
    FreeEvents();
    runtime_.FreeDevice(data_);
  } catch (const CudaError&) {
    // The device is lost, and its memory with it.
  }
}

void StagingRing::FreeEvents() {
  for (const Slot& slot : slots_) {
    if (slot.ready != nullptr) runtime_.FreeEvent(slot.ready);
    if (slot.free != nullptr) runtime_.FreeEvent(slot.free);
  }
}

// Held slots never are all of them.
StagingRing::Slot& StagingRing::Next() {
  while (slots_[next_].held) next_ = (next_ + 1) % slots_.size();
  Slot& slot = slots_[next_];
  next_ = (next_ + 1) % slots_.size();
  return slot;
}

StagingRing::Slot& StagingRing::Acquire(Stream filler) {
  Slot& slot = Next();
  if (slot.used) runtime_.WaitFor(filler, slot.free);
  return slot;
}

StagingRing::Slot* StagingRing::AcquireToHold(Stream filler) {
  if (num_held_ + kLeastFree >= slots_.size()) return nullptr;
  Slot& slot = Acquire(filler);
  slot.held = true;
  ++num_held_;
  return &slot;
}

void StagingRing::Fill(Slot& slot, Stream filler) { runtime_.Record(slot.ready, filler); }

void StagingRing::Await(Slot& slot, Stream emptier) { runtime_.WaitFor(emptier, slot.ready); }

void StagingRing::Release(Slot& slot, Stream emptier) {
  Abandon(slot);
  NotePart(slot, emptier);
}

void StagingRing::AwaitPart(Slot& slot, Stream reader) {
  Await(slot, reader);
  if (slot.used) runtime_.WaitFor(reader, slot.free);
}

void StagingRing::NotePart(Slot& slot, Stream reader) {
  runtime_.Record(slot.free, reader);
  slot.used = true;
}

void StagingRing::Abandon(Slot& slot) {
  if (slot.held) --num_held_;
  slot.held = false;
}

}  // namespace jaxkv::cuda
