// A device for tests. It does its work late and in any order that CUDA allows, fails calls on command, and
// notes every access that could come before what it needs, or after what it uses was released.
#ifndef JAXKV_TESTS_FAKE_RUNTIME_H_
#define JAXKV_TESTS_FAKE_RUNTIME_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda/runtime.h"
#include "fake_accesses.h"

namespace jaxkv::cuda {

// When operations happen that nobody waits for.
enum class Schedule {
  kAny,         // as chance will, while somebody else is waited for
  kLate,        // never: only what is waited for, and what that waits for
  kBackground,  // on a thread of their own, by and by
};

using Random = std::minstd_rand;

struct FakeOperation;

struct FakeCounts {
  int64_t kernels = 0;
  int64_t copies_to_host = 0;
  int64_t copies_to_device = 0;
};

// Addresses of the device are those of the host with one bit more, so that neither can use the other's.
class FakeRuntime : public Runtime {
 public:
  explicit FakeRuntime(uint64_t seed, Schedule schedule = Schedule::kAny);
  ~FakeRuntime() override;

  // -- what tests steer; none of it fails --

  // The n-th call from now that can fail does; 0 for none.
  void FailCall(int64_t n);
  void FailAtRandom(double probability);
  // Refuses to pin host memory from now on, or no longer.
  void RefuseHost(bool refuses);
  // The device stops working when it has done this many operations more: nothing happens on it any more, and
  // every call fails.
  void LoseAfter(int64_t num_operations);
  // The same in the n-th call from now that can fail, which fails.
  void LoseInCall(int64_t n);
  // Some of what could happen happens.
  void RunSome();
  void RunAll();
  // An operation of a program, on memory of the device that it names.
  void Enqueue(Stream stream, const Accesses& accesses, std::function<void()> body);
  // The device's memory as the host would address it. Only operations may look there.
  static uint8_t* Look(const uint8_t* device);

  // -- what tests find --

  // The host uses these bytes now.
  void HostReads(const uint8_t* data, int64_t num_bytes);
  void HostWrites(const uint8_t* data, int64_t num_bytes);
  // Whether an operation that has not happened uses these bytes.
  bool IsAwaited(const uint8_t* data, int64_t num_bytes);
  bool is_lost();
  int64_t num_failed();
  FakeCounts counts();
  // What went wrong so far; empty if nothing did.
  std::string Violations();
  // What is still held; empty if nothing is. A lost device holds nothing.
  std::string Leaks();

  // -- Runtime --

  Stream MakeStream() override;
  void FreeStream(Stream stream) override;
  void Synchronize(Stream stream) override;
  Event MakeEvent() override;
  void FreeEvent(Event event) override;
  void Record(Event event, Stream stream) override;
  void WaitFor(Stream stream, Event event) override;
  bool HasEnded(Event event) override;
  void Synchronize(Event event) override;
  int64_t ElapsedUs(Event begin, Event end) override;
  uint8_t* AllocateDevice(int64_t num_bytes) override;
  void FreeDevice(uint8_t* data) override;
  uint8_t* AllocatePinned(int64_t num_bytes) override;
  void FreePinned(uint8_t* data) override;
  void RegisterHost(uint8_t* data, int64_t num_bytes) override;
  void UnregisterHost(uint8_t* data) override;
  uint8_t* DevicePointer(uint8_t* host) override;
  void CopyToHost(const std::vector<HostCopy>& copies, Stream stream) override;
  void CopyToDevice(const std::vector<HostCopy>& copies, Stream stream) override;
  void CopyOnDevice(uint8_t* to, const uint8_t* from, int64_t num_bytes, Stream stream) override;
  void Zero(void* data, int64_t num_bytes, Stream stream) override;
  void MovePages(Direction direction, const MoveArgs& args, int32_t most_blocks, Stream stream) override;
  void MarkRepeats(const EntryList& entries, int32_t* repeats, Stream stream) override;
  void Tally(const EntryList& entries, int32_t* status, Stream stream) override;
  int32_t most_blocks() const override { return 4; }

 private:
  using OperationPtr = std::shared_ptr<FakeOperation>;
  using Lock = std::unique_lock<std::mutex>;

  Lock Call(const char* what);
  void ThrowIfLost(const char* what) const;
  bool FailsNow();
  bool Chance(double probability);
  int64_t Draw(int64_t first, int64_t last);
  void Blame(const std::string& what);

  OperationPtr Push(Stream stream, const char* what, std::function<Accesses()> accesses,
                    std::function<void(Random&)> body);
  size_t CopiesBegun(const char* what, size_t num_copies);
  // The next operation that may happen, of those that come before `target` or of all; null if none may.
  OperationPtr Choose(const FakeOperation* target);
  bool BeginWork(FakeOperation& operation);
  void EndWork(FakeOperation& operation);
  void Run(const OperationPtr& operation, Lock& lock);
  void RunUntil(const OperationPtr& target, Lock& lock, const char* what);
  void RunALittle(Lock& lock);
  void RunInBackground();
  void LoseDevice();
  void KnowThat(const FakeOperation& operation);
  void NoteHost(const char* what, Accesses accesses);
  void ForgetOld();
  bool IsKnown(const OperationPtr& operation) const;
  void FreeMemory(uint8_t* data, MemoryKind kind);
  const uint8_t* OfDevice(const void* device);
  EntryList Translate(EntryList entries);

  std::mutex mutex_;
  std::condition_variable changed_;
  const Schedule schedule_;
  std::mt19937_64 rng_;
  FakeMemory memory_;
  AccessLog log_;
  Clock known_{};  // what the host has waited for, and how often it has used memory
  std::vector<std::unique_ptr<CUstream_st>> streams_;
  std::vector<std::unique_ptr<CUevent_st>> events_;
  std::set<std::string> violations_;
  FakeCounts counts_;
  int64_t fails_in_ = 0;
  double fails_with_ = 0;
  int64_t num_failed_ = 0;
  bool refuses_host_ = false;
  int64_t loses_in_ = -1;
  int64_t loses_in_call_ = 0;
  int64_t num_done_ = 0;
  bool lost_ = false;
  bool ends_ = false;
  std::thread background_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_FAKE_RUNTIME_H_
