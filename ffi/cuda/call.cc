#include "cuda/call.h"

namespace jaxkv::cuda {

PinnedNumbers::~PinnedNumbers() {
  try {
    if (host_ != nullptr) runtime_.FreePinned(reinterpret_cast<uint8_t*>(host_));
  } catch (const CudaError&) {
    // The device is lost.
  }
}

void PinnedNumbers::Reserve(size_t count) {
  if (count <= capacity_) return;
  size_t capacity = 1024;
  while (capacity < count) capacity *= 2;
  uint8_t* data = runtime_.AllocatePinned(static_cast<int64_t>(capacity * sizeof(int32_t)));
  const uint8_t* device;
  try {
    device = runtime_.DevicePointer(data);
  } catch (const CudaError&) {
    runtime_.FreePinned(data);
    throw;
  }
  if (host_ != nullptr) runtime_.FreePinned(reinterpret_cast<uint8_t*>(host_));
  host_ = reinterpret_cast<int32_t*>(data);
  device_ = reinterpret_cast<const int32_t*>(device);
  capacity_ = capacity;
}

Call::Call(Runtime& runtime, const void* tag)
    : runtime(runtime), tag(tag), moved(runtime), begin(runtime.MakeEvent()), end(nullptr) {
  try {
    end = runtime.MakeEvent();
  } catch (const CudaError&) {
    runtime.FreeEvent(begin);
    throw;
  }
}

void Call::AwaitHost() const {
  if (bounce == nullptr) return;
  bounce->WaitUntil([this] { return host_copies.load(std::memory_order_acquire) == 0; });
}

Call::~Call() {
  try {
    runtime.FreeEvent(begin);
    runtime.FreeEvent(end);
  } catch (const CudaError&) {
    // The device is lost.
  }
}

}  // namespace jaxkv::cuda
