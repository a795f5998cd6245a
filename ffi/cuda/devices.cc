#include "cuda/devices.h"

#include <map>
#include <memory>
#include <mutex>

namespace jaxkv::cuda {
namespace {

struct Device {
  std::unique_ptr<Runtime> runtime;
  std::unique_ptr<Engine> engine;
};

std::mutex& Mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

// The mutex is held.
Device& Find(int32_t ordinal) {
  static auto* devices = new std::map<int32_t, Device>;
  Device& device = (*devices)[ordinal];
  if (device.runtime == nullptr) device.runtime = MakeCudaRuntime(ordinal);
  return device;
}

}  // namespace

Runtime& RuntimeOf(int32_t ordinal) {
  const std::lock_guard<std::mutex> lock(Mutex());
  return *Find(ordinal).runtime;
}

Engine& MakeEngine(int32_t ordinal, const EngineOptions& options) {
  const std::lock_guard<std::mutex> lock(Mutex());
  Device& device = Find(ordinal);
  if (device.engine == nullptr) device.engine = std::make_unique<Engine>(*device.runtime, options);
  return *device.engine;
}

Engine* FindEngine(int32_t ordinal) {
  const std::lock_guard<std::mutex> lock(Mutex());
  return Find(ordinal).engine.get();
}

}  // namespace jaxkv::cuda
