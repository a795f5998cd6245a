// Every call of CUDA fails once, and devices are lost after every step, on a fake device: who waited is told,
// nothing is left behind, and what still works goes on. Run it under the sanitizers.
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "cuda/copy_probe.h"
#include "transfer_scene.h"

namespace jaxkv::cuda {
namespace {

constexpr LayoutLimits kLimits = {2, 3, 300, 3, true, 12, 512};
constexpr Direction kDirections[] = {Direction::kToRecords, Direction::kToLeaves};

std::string Name(const Way& way, Direction direction, int64_t n) {
  return std::string(way.name) + (direction == Direction::kToRecords ? ", out" : ", in") + ", call " +
         std::to_string(n) + ": ";
}

// Whether the device still has something to do with the request's records.
bool IsAwaited(Scene& scene, const Request& request) {
  bool is_awaited = false;
  for (int32_t address : request.addresses) {
    const uint8_t* record = scene.pool->data() + int64_t{512} * address;
    is_awaited = is_awaited || scene.device.IsAwaited(record, scene.record_bytes());
  }
  return is_awaited;
}

// A transfer whose n-th call fails, if it has so many. Returns whether it did.
bool Try(Scene& scene, Direction direction, const std::string& name, int64_t n = 0) {
  const Request request = scene.Ask(direction);
  const int64_t failed_before = scene.device.num_failed();
  const void* tag = OpenCall(*scene.engine, request);
  scene.device.FailCall(n);
  scene.engine->Move(direction, tag, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  const bool fails_to_move = scene.device.num_failed() > failed_before;
  if (fails_to_move) {
    Check(!IsAwaited(scene, request), name + "nothing is under way once a transfer has failed");
    Check(scene.engine->HasEnded(tag), name + "a transfer that failed has ended");
  }
  const Outcome outcome = scene.engine->Close(tag);
  scene.device.FailCall(0);
  const bool fails = scene.device.num_failed() > failed_before;
  Check(outcome.error.empty() != fails, name + "who waits is told of a failure: " + outcome.error);
  scene.Model(request, fails_to_move);
  Check(scene.pool->Matches(0, scene.pool_bytes()), name + "no other byte of the pool changes");
  scene.leaves->Compare();
  return fails;
}

void CheckEachCall(const Way& way, Direction direction, Schedule schedule) {
  for (int64_t n = 1;; ++n) {
    const std::string name = Name(way, direction, n);
    Scene scene(way, 11, schedule, kLimits);
    if (n % 2 == 0) Check(!Try(scene, direction, name), name + "nothing fails unless told to");
    const bool fails = Try(scene, direction, name, n);
    Check(!Try(scene, direction, name), name + "the next transfer goes well");
    Check(!Try(scene, Direction::kToRecords, name), name + "an offload after it too");
    scene.End();
    if (!fails) return Check(n > 5, name + "calls have failed");
  }
}

// Loses the device after each operation, or in each call.
using Lose = void (FakeRuntime::*)(int64_t);

void CheckLoss(const Way& way, Direction direction, Schedule schedule, Lose lose) {
  for (int64_t n = 1;; ++n) {
    Scene scene(way, 12, schedule, kLimits);
    (scene.device.*lose)(n);
    const Request request = scene.Ask(direction);
    const void* tags[] = {nullptr, nullptr};
    try {
      for (const void*& tag : tags) tag = scene.Start(request);
    } catch (const CudaError&) {
      Check(scene.device.is_lost(), "only a device that is lost refuses a tag");
    }
    scene.device.RunSome();
    for (const void* tag : tags) {
      if (tag == nullptr) continue;
      scene.engine->HasEnded(tag);
      const bool was_lost = scene.device.is_lost();
      const Outcome outcome = scene.engine->Close(tag);
      Check(!was_lost || !outcome.error.empty(), "the loss of the device is told");
      Check(scene.device.is_lost() || outcome.error.empty(), "no other is told");
    }
    scene.pool->Close();
    Check(!scene.pool->is_alive(), "a lost device holds no pool");
    const bool is_lost = scene.device.is_lost();
    scene.engine.reset();
    scene.leaves.reset();
    if (!is_lost) return Check(n > 3, "devices were lost");
  }
}

void CheckFit(const Way& way) {
  for (int64_t n = 1;; ++n) {
    const std::string name = Name(way, Direction::kToLeaves, n);
    Scene scene(way, 13, Schedule::kAny, kLimits);
    const bool was_refused = !scene.engine->staging_refusal().empty();
    Check(!was_refused, name + "there is memory at first");
    scene.device.FailCall(n);
    scene.engine->Fit(scene.record_bytes() + 3 * 4096);
    const bool fails = scene.device.num_failed() > 0;
    Check(scene.engine->staging_refusal().empty() != fails, name + "a refusal of memory is told");
    scene.device.FailCall(0);
    Check(!Try(scene, Direction::kToRecords, name), name + "transfers go on with what there is");
    scene.engine->Fit(scene.record_bytes() + 3 * 4096);
    Check(scene.engine->staging_refusal().empty(), name + "memory may come later");
    Check(!Try(scene, Direction::kToLeaves, name), name + "transfers go on with more");
    scene.End();
    if (!fails) return Check(n > 3, name + "calls have failed");
  }
}

// A pool that is not pinned, and no memory to pass through.
void CheckNoWay() {
  Scene scene({"nothing", kByEngines, false, false}, 14, Schedule::kAny, kLimits);
  const Request request = scene.Ask(Direction::kToLeaves);
  const Outcome outcome = scene.engine->Close(scene.Start(request));
  Check(outcome.error.find("refused by the test") != std::string::npos, "why there is no way is told");
  scene.End();
}

// What throws in a constructor leaves nothing behind. Whatever happens, nothing but CudaError is thrown.
template <typename Make>
void CheckConstruction(const Make& make, int64_t least_calls, const std::string& name) {
  for (const Lose fail : {&FakeRuntime::FailCall, &FakeRuntime::LoseInCall}) {
    for (int64_t n = 1;; ++n) {
      FakeRuntime device(static_cast<uint64_t>(n));
      (device.*fail)(n);
      try {
        make(device);
      } catch (const CudaError&) {
      }
      Check(device.Leaks().empty(), name + " leaves nothing behind: " + device.Leaks());
      Check(device.Violations().empty(), name + ": " + device.Violations());
      if (device.num_failed() > 0) continue;
      Check(n > least_calls, name + " made calls");
      break;
    }
  }
}

// A pool that cannot be pinned is no error.
void MakePool(Runtime& device, Bytes& memory) {
  try {
    PinnedPool(device, memory.data(), static_cast<int64_t>(memory.size()), nullptr);
  } catch (const CudaError& error) {
    Check(false, std::string("a pool that is not pinned throws nothing: ") + error.what());
  }
}

void CheckConstructions() {
  const EngineOptions options = SmallOptions(kByEngines);
  CheckConstruction([&](Runtime& device) { Engine(device, options); }, 2, "an engine");
  CheckConstruction([&](Runtime& device) { Engine(device, options).AddTag(&device); }, 4, "a tag");
  CheckConstruction([&](Runtime& device) { StagingRing(device, 2, 512); }, 5, "staging memory");
  CheckConstruction([&](Runtime& device) { BounceRing(device, 2, 512); }, 4, "bounce memory");
  CheckConstruction([&](Runtime& device) { PinnedNumbers(device).Reserve(3); }, 2, "numbers");
  CheckConstruction(
      [&](Runtime& device) {
        PinnedNumbers numbers(device);
        numbers.Reserve(3);
        numbers.Reserve(3000);
      },
      4, "more numbers");
  CheckConstruction(
      [&](Runtime& device) {
        CopyProbe probe(device, 8192);
        for (LinkDirection direction : {LinkDirection::kToHost, LinkDirection::kToDevice}) {
          for (int32_t host_blocks : {0, 2}) {
            Check(probe.TimeUs(direction, 512, host_blocks) > 0, "copies take time");
          }
        }
      },
      20, "a probe");
  Bytes memory(512);
  CheckConstruction([&](Runtime& device) { MakePool(device, memory); }, 2, "a pool");
}

// Emptying a slot may want memory that is not there.
void CheckBounceThatThrows() {
  FakeRuntime device(15);
  const Stream stream = device.MakeStream();
  std::string told;
  {
    BounceRing ring(device, 2, 512);
    ring.FilledBy(ring.Acquire(), stream, [&](const char* error) {
      if (error == nullptr) throw std::bad_alloc();
      told = error;
    });
  }
  Check(!told.empty(), "who waits is told why a slot was not emptied");
  device.FreeStream(stream);
  Check(device.Leaks().empty(), device.Leaks());
}

// Work of compiled programs, which nobody closes.
void CheckNotedUse() {
  CheckConstruction(
      [](FakeRuntime& device) {
        auto owner = std::make_shared<Bytes>(4096);
        const std::weak_ptr<Bytes> memory = owner;
        uint8_t* data = owner->data();
        Stream streams[] = {nullptr, nullptr};
        auto pool = std::make_unique<PinnedPool>(device, data, 4096, std::move(owner));
        try {
          if (pool->device_data() == nullptr) throw CudaError("not pinned");
          for (Stream& stream : streams) stream = device.MakeStream();
          for (Stream stream : {streams[1], streams[0], streams[1]}) {
            Accesses accesses;
            accesses.Read(pool->device_data(), 4096);
            device.Enqueue(stream, accesses, [] {});
            pool->NoteUse(device, stream);
          }
        } catch (const CudaError&) {
        }
        pool.reset();
        Check(memory.expired(), "a pool lets go of its memory");
        for (Stream stream : streams) {
          if (stream != nullptr && !device.is_lost()) device.FreeStream(stream);
        }
      },
      8, "a pool that programs use");
}

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  using namespace jaxkv::cuda;
  for (const Way& way : kWays) {
    for (Direction direction : kDirections) {
      for (Schedule schedule : {Schedule::kAny, Schedule::kLate}) {
        CheckEachCall(way, direction, schedule);
        CheckLoss(way, direction, schedule, &FakeRuntime::LoseAfter);
        CheckLoss(way, direction, schedule, &FakeRuntime::LoseInCall);
      }
    }
    if (way.has_staging) CheckFit(way);
  }
  CheckNoWay();
  CheckConstructions();
  CheckBounceThatThrows();
  CheckNotedUse();
  std::puts("cuda_failures_test: ok");
}
