// The fake device itself: what it must find, what it must allow, and that it does its work late.
#include "fake_runtime.h"

#include <cstdio>
#include <cstring>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "transfer_bench.h"

namespace jaxkv::cuda {
namespace {

constexpr int64_t kBytes = 64;

// Two streams, an event, memory of both kinds.
struct Things {
  explicit Things(uint64_t seed, Schedule schedule = Schedule::kAny)
      : device(seed, schedule),
        first(device.MakeStream()),
        second(device.MakeStream()),
        event(device.MakeEvent()),
        memory(device.AllocateDevice(2 * kBytes)),
        pinned(device.AllocatePinned(kBytes)) {
    std::memset(pinned, 1, kBytes);
  }

  void Upload(Stream stream) { device.CopyToDevice({{pinned, memory, kBytes}}, stream); }
  void Download(Stream stream) { device.CopyToHost({{pinned, memory, kBytes}}, stream); }
  void Order(Stream before, Stream after) {
    device.Record(event, before);
    device.WaitFor(after, event);
  }
  void Release() {
    device.Synchronize(first);
    device.Synchronize(second);
    device.FreeDevice(memory);
    device.FreePinned(pinned);
    device.FreeEvent(event);
    device.FreeStream(first);
    device.FreeStream(second);
  }

  FakeRuntime device;
  Stream first;
  Stream second;
  Event event;
  uint8_t* memory;
  uint8_t* pinned;
};

// Whatever order the fake draws, the mistake is found; without it nothing is.
void ExpectFound(const std::string& mistake, const std::function<void(Things&)>& make) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    for (Schedule schedule : {Schedule::kAny, Schedule::kLate}) {
      Things things(seed, schedule);
      make(things);
      things.device.RunAll();
      const std::string found = things.device.Violations();
      Check(found.find(mistake) != std::string::npos, "found: " + mistake + ", not: " + found);
    }
  }
}

void CheckRightUse() {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Things things(seed);
    FakeRuntime& device = things.device;
    Check(device.HasEnded(things.event), "an event that was never recorded has ended");
    things.Upload(things.first);
    things.Order(things.first, things.second);
    device.CopyOnDevice(things.memory + kBytes, things.memory, kBytes, things.second);
    device.Record(things.event, things.second);
    device.Synchronize(things.event);
    device.HostWrites(things.pinned, kBytes);
    std::memset(things.pinned, 0, kBytes);
    device.CopyToHost({{things.pinned, things.memory + kBytes, kBytes}}, things.first);
    device.Synchronize(things.first);
    device.HostReads(things.pinned, kBytes);
    Check(things.pinned[0] == 1 && things.pinned[kBytes - 1] == 1, "bytes go there and back");
    Check(!device.Leaks().empty(), "what is held is told");
    things.Release();
    Check(device.Violations().empty(), "right use is not blamed: " + device.Violations());
    Check(device.Leaks().empty(), "nothing is held any more: " + device.Leaks());
  }
}

void CheckMistakes() {
  ExpectFound("does not wait", [](Things& t) {
    t.Upload(t.first);
    t.device.CopyOnDevice(t.memory + kBytes, t.memory, kBytes, t.second);
  });
  ExpectFound("does not wait", [](Things& t) {  // The event was recorded before the work.
    t.device.Record(t.event, t.first);
    t.Upload(t.first);
    t.device.WaitFor(t.second, t.event);
    t.device.Zero(t.memory, 1, t.second);
  });
  ExpectFound("does not wait", [](Things& t) {  // Waits for what was recorded then, not for what came later.
    t.Order(t.first, t.second);
    t.Upload(t.first);
    t.device.Record(t.event, t.first);
    t.device.Zero(t.memory, 1, t.second);
  });
  ExpectFound("a read of the host does not wait for CopyToHost", [](Things& t) {
    t.Download(t.first);
    t.device.RunAll();
    t.device.HostReads(t.pinned, 1);
  });
  ExpectFound("CopyToDevice does not wait for CopyToHost",
              [](Things& t) {  // It may read ahead of its stream.
                t.Download(t.first);
                t.Upload(t.first);
              });
  ExpectFound("the end of memory", [](Things& t) {
    t.device.Zero(t.memory, 1, t.first);
    t.device.RunAll();
    t.device.FreeDevice(t.memory);
  });
  ExpectFound("memory that is not there", [](Things& t) {
    t.device.FreeDevice(t.memory);
    t.device.Zero(t.memory, 1, t.first);
  });
  ExpectFound("memory that is not there",
              [](Things& t) { t.device.Zero(t.memory + kBytes, kBytes + 1, t.first); });
  ExpectFound("touches bytes twice", [](Things& t) {
    t.device.CopyToHost({{t.pinned, t.memory, 8}, {t.pinned + 7, t.memory + 8, 8}}, t.first);
  });
  ExpectFound("address of the host", [](Things& t) { t.device.Zero(t.pinned, 1, t.first); });
  ExpectFound("an event was freed before", [](Things& t) {
    t.device.Record(t.event, t.first);
    t.device.FreeEvent(t.event);
  });
  ExpectFound("a stream was freed before", [](Things& t) {
    t.Upload(t.first);
    t.device.FreeStream(t.first);
  });
  ExpectFound("memory was freed that was not there", [](Things& t) {
    t.device.FreePinned(t.pinned);
    t.device.FreePinned(t.pinned);
  });
}

// Operations on two streams happen in either order; those of one never do.
void CheckOrders() {
  std::set<std::string> orders;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    Things things(seed);
    std::string order;
    const auto note = [&](char what) { return [&order, what] { order += what; }; };
    things.device.Enqueue(things.first, {}, note('a'));
    things.device.Enqueue(things.first, {}, note('b'));
    things.device.Enqueue(things.second, {}, note('c'));
    Check(order.empty(), "nothing happens before somebody waits");
    things.device.RunAll();
    orders.insert(order);
  }
  Check(orders == std::set<std::string>{"abc", "acb", "cab"}, "all orders happen that may");
}

void CheckFailures() {
  Things things(1);
  FakeRuntime& device = things.device;
  device.FailCall(2);
  things.Upload(things.first);
  bool threw = false;
  try {
    device.Record(things.event, things.first);
  } catch (const CudaError&) {
    threw = true;
  }
  Check(threw && device.num_failed() == 1, "the second call fails");
  device.Record(things.event, things.first);
  device.LoseAfter(1);
  threw = false;
  try {
    device.Synchronize(things.event);
  } catch (const CudaError&) {
    threw = true;
  }
  Check(threw && device.is_lost() && device.Leaks().empty(), "a lost device holds nothing");
  Check(!device.IsAwaited(things.pinned, kBytes), "nothing happens on a lost device");
}

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  jaxkv::cuda::CheckRightUse();
  jaxkv::cuda::CheckMistakes();
  jaxkv::cuda::CheckOrders();
  jaxkv::cuda::CheckFailures();
  std::puts("fake_runtime_test: ok");
}
