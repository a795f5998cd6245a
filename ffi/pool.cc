#include "pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "thread_pool.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace jaxkv {
namespace {

constexpr int64_t kPageBytes = 4 << 10;
constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kPopulateBytes = 32 << 20;

int64_t RoundUp(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

[[noreturn]] void ThrowAllocationError(int64_t num_bytes, int error) {
  throw AllocationError("the system refused " + std::to_string(num_bytes) + " bytes for a host pool (" +
                        std::strerror(error) + "); ask for less or free memory");
}

uint8_t* Map(int64_t num_bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) ThrowAllocationError(num_bytes, errno);
  return static_cast<uint8_t*>(data);
}

// Maps memory that starts on a huge page. What is mapped too much for that goes back at once.
uint8_t* MapAligned(int64_t num_bytes) {
  if (num_bytes < kHugePageBytes) return Map(num_bytes);
  uint8_t* mapped = Map(num_bytes + kHugePageBytes);
  const int64_t before = -reinterpret_cast<intptr_t>(mapped) & (kHugePageBytes - 1);
  const int64_t after = kHugePageBytes - before;
  if (before > 0) munmap(mapped, static_cast<size_t>(before));
  munmap(mapped + before + num_bytes, static_cast<size_t>(after));
  return mapped + before;
}

// Makes a range resident. Returns an errno, 0 when done.
int PopulateRange(uint8_t* data, int64_t num_bytes) {
  if (madvise(data, static_cast<size_t>(num_bytes), MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;
  // Kernels before 5.14 do not know the advice; writing to each page does the same.
  for (int64_t i = 0; i < num_bytes; i += kPageBytes) static_cast<volatile uint8_t*>(data)[i] = 0;
  return 0;
}

}  // namespace

Arena::Arena(int64_t num_bytes) : creator_(getpid()) {
  if (num_bytes < 1 || num_bytes > std::numeric_limits<int64_t>::max() / 2) {
    throw AllocationError("a host pool needs a positive number of bytes, got " + std::to_string(num_bytes));
  }
  num_bytes_ = RoundUp(num_bytes, kPageBytes);
  data_ = MapAligned(num_bytes_);
  huge_pages_ =
      num_bytes_ >= kHugePageBytes && madvise(data_, static_cast<size_t>(num_bytes_), MADV_HUGEPAGE) == 0;
  Populate();
}

Arena::~Arena() { munmap(data_, static_cast<size_t>(num_bytes_)); }

void Arena::Populate() {
  const int64_t parts = (num_bytes_ + kPopulateBytes - 1) / kPopulateBytes;
  std::vector<int> errors(static_cast<size_t>(parts), 0);
  ThreadPool::Global().ParallelFor(parts, [&](int64_t i) {
    const int64_t begin = i * kPopulateBytes;
    errors[static_cast<size_t>(i)] =
        PopulateRange(data_ + begin, std::min(kPopulateBytes, num_bytes_ - begin));
  });
  for (int error : errors) {
    if (error == 0) continue;
    munmap(data_, static_cast<size_t>(num_bytes_));
    ThrowAllocationError(num_bytes_, error);
  }
}

bool Arena::owned_by_this_process() const { return getpid() == creator_; }

bool Arena::Contains(int64_t offset, int64_t length) const {
  return offset >= 0 && length >= 0 && length <= num_bytes_ && offset <= num_bytes_ - length;
}

PoolRegistry& PoolRegistry::Global() {
  static PoolRegistry* registry = new PoolRegistry;  // Outlives every copy, also at exit.
  return *registry;
}

PoolKey PoolRegistry::Add(std::shared_ptr<Arena> arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto entry =
      std::find_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.arena == nullptr; });
  if (entry == entries_.end()) entry = entries_.emplace(entries_.end());
  entry->arena = std::move(arena);
  entry->generation = ++last_generation_;
  return {entry - entries_.begin(), entry->generation};
}

std::shared_ptr<Arena> PoolRegistry::Find(PoolKey key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (key.id < 0 || static_cast<size_t>(key.id) >= entries_.size()) return nullptr;
  const Entry& entry = entries_[static_cast<size_t>(key.id)];
  return entry.generation == key.generation ? entry.arena : nullptr;
}

std::shared_ptr<Arena> PoolRegistry::Remove(PoolKey key) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (key.id < 0 || static_cast<size_t>(key.id) >= entries_.size()) return nullptr;
  Entry& entry = entries_[static_cast<size_t>(key.id)];
  return entry.generation == key.generation ? std::exchange(entry.arena, nullptr) : nullptr;
}

}  // namespace jaxkv
