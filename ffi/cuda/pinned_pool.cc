#include "cuda/pinned_pool.h"

namespace jaxkv::cuda {
namespace {

void Await(Runtime& runtime, Stream stream) {
  try {
    runtime.Synchronize(stream);
  } catch (const CudaError&) {
    // Nothing runs on it any more.
  }
}

}  // namespace

// In one piece: a record that crossed from one registration to the next could not be copied in one go.
PinnedPool::PinnedPool(Runtime& runtime, uint8_t* data, int64_t num_bytes, std::shared_ptr<void> owner)
    : runtime_(runtime), data_(data), num_bytes_(num_bytes), owner_(std::move(owner)) {
  try {
    runtime_.RegisterHost(data_, num_bytes_);
  } catch (const CudaError& error) {
    refusal_ = error.what();
    return;
  }
  try {
    device_data_ = runtime_.DevicePointer(data_);
  } catch (const CudaError& error) {
    refusal_ = error.what();
    Unregister();
  }
}

void PinnedPool::Unregister() noexcept {
  try {
    runtime_.UnregisterHost(data_);
  } catch (const CudaError&) {
    // The device is lost.
  }
}

PinnedPool::~PinnedPool() {
  try {
    for (const auto& [user, event] : last_uses_) {
      user.first->Synchronize(event);
      user.first->FreeEvent(event);
    }
  } catch (const CudaError&) {
    // The device is lost, and with it whatever used the memory.
  }
  if (device_data_ != nullptr) Unregister();
}

bool PinnedPool::Contains(int64_t offset, int64_t length) const {
  return offset >= 0 && length >= 0 && length <= num_bytes_ && offset <= num_bytes_ - length;
}

void PinnedPool::NoteUse(Runtime& runtime, Stream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  try {
    auto found = last_uses_.find({&runtime, stream});
    if (found == last_uses_.end()) {
      found = last_uses_.emplace(User{&runtime, stream}, runtime.MakeEvent()).first;
    }
    runtime.Record(found->second, stream);
  } catch (const CudaError&) {
    Await(runtime, stream);
  }
}

PinnedPools& PinnedPools::Global() {
  static auto* pools = new PinnedPools;  // Programs may look here until the process ends.
  return *pools;
}

void PinnedPools::Add(PoolKey key, std::shared_ptr<PinnedPool> pool) {
  const std::lock_guard<std::mutex> lock(mutex_);
  pools_[key.id] = {std::move(pool), key.generation};
}

std::shared_ptr<PinnedPool> PinnedPools::Find(PoolKey key) const {
  const auto [pool, generation] = FindAny(key.id);
  return generation == key.generation ? pool : nullptr;
}

std::pair<std::shared_ptr<PinnedPool>, int32_t> PinnedPools::FindAny(int64_t id) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pools_.find(id);
  return found == pools_.end() ? std::pair<std::shared_ptr<PinnedPool>, int32_t>{nullptr, 0} : found->second;
}

void PinnedPools::Remove(PoolKey key) {
  std::shared_ptr<PinnedPool> last;  // Ends outside the lock.
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = pools_.find(key.id);
  if (found == pools_.end() || found->second.second != key.generation) return;
  last = std::move(found->second.first);
  pools_.erase(found);
}

}  // namespace jaxkv::cuda
