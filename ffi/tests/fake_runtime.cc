#include "fake_runtime.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "fake_streams.h"

namespace jaxkv::cuda {
namespace {

constexpr uintptr_t kDeviceBit = uintptr_t{1} << 62;

bool IsOfDevice(const void* data) { return (reinterpret_cast<uintptr_t>(data) & kDeviceBit) != 0; }

uint8_t* ToDevice(const uint8_t* host) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(host) | kDeviceBit);
}

// All threads of a grid of some size, one after another in any order.
void RunGrid(int32_t most_groups, Random& random, const std::function<void(Lane)>& body) {
  constexpr int32_t kLanes[] = {1, 3, 32};
  const int32_t num_lanes = kLanes[random() % 3];
  const auto num_groups = static_cast<int32_t>(random() % static_cast<uint32_t>(most_groups) + 1);
  std::vector<Lane> lanes;
  for (int32_t group = 0; group < num_groups; ++group) {
    for (int32_t lane = 0; lane < num_lanes; ++lane) lanes.push_back({group, num_groups, lane, num_lanes});
  }
  std::shuffle(lanes.begin(), lanes.end(), random);
  for (const Lane& lane : lanes) body(lane);
}

}  // namespace

uint8_t* FakeRuntime::Look(const uint8_t* device) {
  return reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(device) & ~kDeviceBit);
}

// -- memory -------------------------------------------------------------------------------------------------

uint8_t* FakeRuntime::AllocateDevice(int64_t num_bytes) {
  const Lock lock = Call("AllocateDevice");
  return ToDevice(memory_.Allocate(num_bytes, MemoryKind::kDevice));
}

uint8_t* FakeRuntime::AllocatePinned(int64_t num_bytes) {
  const Lock lock = Call("AllocatePinned");
  return memory_.Allocate(num_bytes, MemoryKind::kPinned);
}

// Whoever frees memory writes to all of it: the device must have ended with it, and the host must know.
void FakeRuntime::FreeMemory(uint8_t* data, MemoryKind kind) {
  const int64_t num_bytes = memory_.Free(data, kind);
  if (num_bytes == 0) return Blame("memory was freed that was not there");
  Accesses accesses;
  accesses.Write(data, num_bytes);
  NoteHost("the end of memory", std::move(accesses));
}

void FakeRuntime::FreeDevice(uint8_t* data) {
  const Lock lock(mutex_);
  ThrowIfLost("FreeDevice");
  if (!IsOfDevice(data)) Blame("FreeDevice was given an address of the host");
  FreeMemory(Look(data), MemoryKind::kDevice);
}

void FakeRuntime::FreePinned(uint8_t* data) {
  const Lock lock(mutex_);
  ThrowIfLost("FreePinned");
  FreeMemory(data, MemoryKind::kPinned);
}

void FakeRuntime::RegisterHost(uint8_t* data, int64_t num_bytes) {
  const Lock lock = Call("RegisterHost");
  if (refuses_host_) throw CudaError("RegisterHost failed: refused by the test");
  if (!memory_.Register(data, num_bytes)) Blame("host memory was registered twice");
}

void FakeRuntime::UnregisterHost(uint8_t* data) {
  const Lock lock(mutex_);
  ThrowIfLost("UnregisterHost");
  FreeMemory(data, MemoryKind::kRegistered);
}

uint8_t* FakeRuntime::DevicePointer(uint8_t* host) {
  const Lock lock = Call("DevicePointer");
  if (!memory_.IsLive({host, host + 1})) Blame("DevicePointer was asked for memory that is not pinned");
  return ToDevice(host);
}

const uint8_t* FakeRuntime::OfDevice(const void* device) {
  if (device != nullptr && !IsOfDevice(device)) Blame("the device was given an address of the host");
  return Look(static_cast<const uint8_t*>(device));
}

// -- copies -------------------------------------------------------------------------------------------------

// A call that fails may have begun some of its copies.
size_t FakeRuntime::CopiesBegun(const char* what, size_t num_copies) {
  ThrowIfLost(what);
  if (!FailsNow()) return num_copies;
  return static_cast<size_t>(Draw(0, static_cast<int64_t>(num_copies)));
}

void FakeRuntime::CopyToHost(const std::vector<HostCopy>& copies, Stream stream) {
  const Lock lock(mutex_);
  const int64_t failed_before = num_failed_;
  const size_t count = CopiesBegun("CopyToHost", copies.size());
  counts_.copies_to_host += static_cast<int64_t>(count);
  std::vector<HostCopy> begun(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(count));
  Accesses accesses;
  for (HostCopy& copy : begun) {
    if (IsOfDevice(copy.host)) Blame("CopyToHost was given an address of the device");
    copy.device = const_cast<uint8_t*>(OfDevice(copy.device));
    accesses.Read(copy.device, copy.num_bytes);
    accesses.Write(copy.host, copy.num_bytes);
  }
  std::shuffle(begun.begin(), begun.end(), rng_);
  Push(
      stream, "CopyToHost", [accesses] { return accesses; },
      [begun](Random&) {
        for (const HostCopy& copy : begun) {
          std::memcpy(copy.host, copy.device, static_cast<size_t>(copy.num_bytes));
        }
      });
  if (num_failed_ > failed_before) throw CudaError("CopyToHost failed on command");
}

// The host's bytes may be read as soon as the call is made, or when the stream has come that far.
void FakeRuntime::CopyToDevice(const std::vector<HostCopy>& copies, Stream stream) {
  const Lock lock(mutex_);
  const int64_t failed_before = num_failed_;
  const size_t count = CopiesBegun("CopyToDevice", copies.size());
  counts_.copies_to_device += static_cast<int64_t>(count);
  struct Part {
    uint8_t* to;
    const uint8_t* from;
    int64_t num_bytes;
    std::vector<uint8_t> early;
  };
  auto parts = std::make_shared<std::vector<Part>>();
  Accesses early;
  Accesses late;
  for (size_t i = 0; i < count; ++i) {
    const auto& [host, device, num_bytes] = copies[i];
    if (IsOfDevice(host)) Blame("CopyToDevice was given an address of the device");
    parts->push_back({const_cast<uint8_t*>(OfDevice(device)), host, num_bytes, {}});
    early.Read(host, num_bytes);
    late.Write(parts->back().to, num_bytes);
    const bool is_pinned = memory_.IsLive({host, host + num_bytes});
    if (!is_pinned) Blame("CopyToDevice was given memory that is not pinned");
    if (is_pinned && Chance(0.5)) parts->back().early.assign(host, host + num_bytes);
  }
  std::shuffle(parts->begin(), parts->end(), rng_);
  const OperationPtr operation = Push(
      stream, "CopyToDevice", [late] { return late; },
      [parts](Random&) {
        for (const Part& part : *parts) {
          const uint8_t* from = part.early.empty() ? part.from : part.early.data();
          std::memcpy(part.to, from, static_cast<size_t>(part.num_bytes));
        }
      });
  operation->early = early;
  if (num_failed_ > failed_before) throw CudaError("CopyToDevice failed on command");
}

void FakeRuntime::CopyOnDevice(uint8_t* to, const uint8_t* from, int64_t num_bytes, Stream stream) {
  const Lock lock = Call("CopyOnDevice");
  auto* there = const_cast<uint8_t*>(OfDevice(to));
  const uint8_t* here = OfDevice(from);
  Accesses accesses;
  accesses.Read(here, num_bytes);
  accesses.Write(there, num_bytes);
  Push(
      stream, "CopyOnDevice", [accesses] { return accesses; },
      [=](Random&) { std::memcpy(there, here, static_cast<size_t>(num_bytes)); });
}

void FakeRuntime::Zero(void* data, int64_t num_bytes, Stream stream) {
  const Lock lock = Call("Zero");
  auto* there = const_cast<uint8_t*>(OfDevice(data));
  Accesses accesses;
  accesses.Write(there, num_bytes);
  Push(
      stream, "Zero", [accesses] { return accesses; },
      [=](Random&) { std::memset(there, 0, static_cast<size_t>(num_bytes)); });
}

// -- kernels ------------------------------------------------------------------------------------------------

EntryList FakeRuntime::Translate(EntryList entries) {
  entries.ids = reinterpret_cast<const int32_t*>(OfDevice(entries.ids));
  entries.addresses = reinterpret_cast<const int32_t*>(OfDevice(entries.addresses));
  entries.refused = reinterpret_cast<const int32_t*>(OfDevice(entries.refused));
  entries.token = reinterpret_cast<const int32_t*>(OfDevice(entries.token));
  entries.area = const_cast<uint8_t*>(OfDevice(entries.area));
  return entries;
}

void FakeRuntime::MovePages(Direction direction, const MoveArgs& args, int32_t most_blocks, Stream stream) {
  const Lock lock = Call("MovePages");
  ++counts_.kernels;
  auto translated = std::make_shared<MoveArgs>(args);
  translated->entries = Translate(args.entries);
  for (int32_t p = 0; p < args.num_plans; ++p) {
    translated->plans[p].leaf = const_cast<uint8_t*>(OfDevice(args.plans[p].leaf));
  }
  Push(
      stream, direction == Direction::kToRecords ? "MovePages to records" : "MovePages to leaves",
      [=] { return ListAccesses(direction, *translated, memory_); },
      [=](Random& random) {
        RunGrid(most_blocks, random, [&](Lane at) {
          if (direction == Direction::kToRecords) {
            cuda::MovePages<Direction::kToRecords>(*translated, at);
          } else {
            cuda::MovePages<Direction::kToLeaves>(*translated, at);
          }
        });
      });
}

void FakeRuntime::MarkRepeats(const EntryList& entries, int32_t* repeats, Stream stream) {
  const Lock lock = Call("MarkRepeats");
  ++counts_.kernels;
  const EntryList list = Translate(entries);
  auto* marks = reinterpret_cast<int32_t*>(const_cast<uint8_t*>(OfDevice(repeats)));
  Accesses accesses = ListAccesses(list);
  accesses.Write(marks, static_cast<int64_t>(sizeof(int32_t)) * list.num_entries);
  Push(
      stream, "MarkRepeats", [accesses] { return accesses; },
      [=](Random& random) {
        RunGrid(most_blocks(), random, [&](Lane at) { cuda::MarkRepeats(list, marks, at); });
      });
}

void FakeRuntime::Tally(const EntryList& entries, int32_t* status, Stream stream) {
  const Lock lock = Call("Tally");
  ++counts_.kernels;
  const EntryList list = Translate(entries);
  auto* counts = reinterpret_cast<int32_t*>(const_cast<uint8_t*>(OfDevice(status)));
  Accesses accesses = ListAccesses(list);
  accesses.Write(counts, sizeof(int32_t) * kStatusSize);
  Push(
      stream, "Tally", [accesses] { return accesses; },
      [=](Random& random) {
        int32_t shared[kStatusSize];
        const auto num_threads = static_cast<int32_t>(random() % 5 + 1);
        for (int32_t t = 0; t < num_threads; ++t) BeginTally(shared, t, num_threads);
        for (int32_t t = 0; t < num_threads; ++t) TallyEntries(list, shared, t, num_threads);
        for (int32_t t = 0; t < num_threads; ++t) EndTally(shared, counts, t, num_threads);
      });
}

}  // namespace jaxkv::cuda
