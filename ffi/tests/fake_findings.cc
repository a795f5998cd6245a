#include <algorithm>
#include <utility>

#include "fake_streams.h"

namespace jaxkv::cuda {

// -- failures and findings ----------------------------------------------------------------------------------

void FakeRuntime::ThrowIfLost(const char* what) const {
  if (lost_) throw CudaError(std::string(what) + " failed: the device is lost");
}

bool FakeRuntime::FailsNow() {
  const bool is_lost_now = loses_in_call_ > 0 && --loses_in_call_ == 0;
  if (is_lost_now) LoseDevice();
  const bool on_command = fails_in_ > 0 && --fails_in_ == 0;
  if (!is_lost_now && !on_command && !Chance(fails_with_)) return false;
  ++num_failed_;
  return true;
}

FakeRuntime::Lock FakeRuntime::Call(const char* what) {
  Lock lock(mutex_);
  ThrowIfLost(what);
  if (FailsNow()) throw CudaError(std::string(what) + " failed on command");
  return lock;
}

bool FakeRuntime::Chance(double probability) {
  return probability > 0 && std::uniform_real_distribution<>(0, 1)(rng_) < probability;
}

int64_t FakeRuntime::Draw(int64_t first, int64_t last) {
  return std::uniform_int_distribution<int64_t>(first, last)(rng_);
}

void FakeRuntime::Blame(const std::string& what) { violations_.insert(what); }

void FakeRuntime::FailCall(int64_t n) {
  const Lock lock(mutex_);
  fails_in_ = n;
}

void FakeRuntime::FailAtRandom(double probability) {
  const Lock lock(mutex_);
  fails_with_ = probability;
}

void FakeRuntime::RefuseHost(bool refuses) {
  const Lock lock(mutex_);
  refuses_host_ = refuses;
}

void FakeRuntime::LoseAfter(int64_t num_operations) {
  const Lock lock(mutex_);
  loses_in_ = num_operations;
  if (num_operations == 0) LoseDevice();
}

void FakeRuntime::LoseInCall(int64_t n) {
  const Lock lock(mutex_);
  loses_in_call_ = n;
}

bool FakeRuntime::is_lost() {
  const Lock lock(mutex_);
  return lost_;
}

int64_t FakeRuntime::num_failed() {
  const Lock lock(mutex_);
  return num_failed_;
}

FakeCounts FakeRuntime::counts() {
  const Lock lock(mutex_);
  return counts_;
}

std::string FakeRuntime::Violations() {
  const Lock lock(mutex_);
  std::string all;
  for (const std::string& violation : violations_) all += violation + "; ";
  return all;
}

std::string FakeRuntime::Leaks() {
  const Lock lock(mutex_);
  if (lost_) return "";
  std::string leaks = memory_.Leaks();
  for (const auto& stream : streams_) leaks += stream->is_live ? "a stream; " : "";
  for (const auto& event : events_) leaks += event->is_live ? "an event; " : "";
  return leaks;
}

// -- what the host knows ------------------------------------------------------------------------------------

void FakeRuntime::KnowThat(const FakeOperation& operation) { Join(known_, operation.after); }

bool FakeRuntime::IsKnown(const OperationPtr& operation) const {
  return operation == nullptr || operation->index <= known_[operation->stream];
}

void FakeRuntime::NoteHost(const char* what, Accesses accesses) {
  accesses.Tidy();
  Footprint footprint = {what, 0, ++known_[0], known_, std::move(accesses)};
  const std::string conflict = log_.Add(std::move(footprint));
  if (!conflict.empty()) Blame(conflict);
}

void FakeRuntime::HostReads(const uint8_t* data, int64_t num_bytes) {
  const Lock lock(mutex_);
  Accesses accesses;
  accesses.Read(data, num_bytes);
  if (!lost_) NoteHost("a read of the host", std::move(accesses));
}

void FakeRuntime::HostWrites(const uint8_t* data, int64_t num_bytes) {
  const Lock lock(mutex_);
  Accesses accesses;
  accesses.Write(data, num_bytes);
  if (!lost_) NoteHost("a write of the host", std::move(accesses));
}

bool FakeRuntime::IsAwaited(const uint8_t* data, int64_t num_bytes) {
  const Lock lock(mutex_);
  const auto meets = [&](const std::vector<ByteRange>& ranges) {
    return std::any_of(ranges.begin(), ranges.end(), [&](const ByteRange& range) {
      return range.begin < data + num_bytes && data < range.end;
    });
  };
  for (const auto& stream : streams_) {
    for (const OperationPtr& operation : stream->queue) {
      const Accesses accesses = operation->accesses ? operation->accesses() : Accesses{};
      if (meets(accesses.reads) || meets(accesses.writes) || meets(operation->early.reads)) return true;
    }
  }
  return false;
}

// Drops what everything that can still come waits for.
void FakeRuntime::ForgetOld() {
  Clock floor = known_;
  for (const auto& stream : streams_) {
    for (const OperationPtr& operation : stream->queue) {
      for (size_t s = 0; s < kMostStreams; ++s) floor[s] = std::min(floor[s], operation->known_early[s]);
    }
  }
  log_.Forget(floor);
}

}  // namespace jaxkv::cuda
