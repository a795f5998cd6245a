// Owns the memory of host pools and finds it again by number. Knows neither slots, nor XLA, nor Python.
#ifndef JAXKV_POOL_H_
#define JAXKV_POOL_H_

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace jaxkv {

// The operating system did not give the memory asked for.
class AllocationError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The pool that was named is not there any more.
class ClosedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Memory that several processes map: a memfd that nobody can resize. It has no name in any directory, so the
// kernel takes it back when the last process that maps it or holds it open has ended, however it ended.
class SharedFile {
 public:
  // `num_bytes` is rounded up to whole 4 KiB pages. `nonce` tells this file from every other. Throws
  // AllocationError.
  static SharedFile Create(int64_t num_bytes, const std::string& nonce);
  // The file that process `pid` has open as `fd`. Throws ClosedError if that is not the file created with
  // this nonce, AllocationError if it is of another size or the system refuses.
  static SharedFile Open(pid_t pid, int fd, int64_t num_bytes, const std::string& nonce);
  ~SharedFile();
  SharedFile(SharedFile&& other) noexcept;
  SharedFile(const SharedFile&) = delete;
  SharedFile& operator=(const SharedFile&) = delete;

  int fd() const { return fd_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  SharedFile(int fd, int64_t num_bytes) : fd_(fd), num_bytes_(num_bytes) {}

  int fd_;
  int64_t num_bytes_;
};

// One arena of host memory, page aligned, touched and therefore resident, on huge pages where there are any.
class Arena {
 public:
  // Memory of this process alone. `num_bytes` is rounded up to whole 4 KiB pages. Throws AllocationError.
  explicit Arena(int64_t num_bytes);
  // All of a shared file, which need not stay open. What it holds is left as it is. Throws AllocationError.
  explicit Arena(const SharedFile& file);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  // Whether the kernel accepted the advice to use huge pages, and for shared memory uses them at all.
  bool huge_pages() const { return huge_pages_; }
  // False in a forked child, whose copy of the memory is not the pool any more.
  bool owned_by_this_process() const;
  // Whether [offset, offset + length) lies inside. Safe for any values.
  bool Contains(int64_t offset, int64_t length) const {
    return offset >= 0 && length >= 0 && length <= num_bytes_ && offset <= num_bytes_ - length;
  }

 private:
  void Populate();

  uint8_t* data_ = nullptr;
  int64_t num_bytes_ = 0;
  bool huge_pages_ = false;
  const int fork_depth_;
};

// What a compiled program knows of a pool: a small number that stays the same over its life and is used again
// after it, and a generation that is not.
struct PoolKey {
  int64_t id;
  int32_t generation;
};

// Arenas by number. Whoever found one keeps it alive, so that closing a pool never pulls memory away from a
// copy.
class PoolRegistry {
 public:
  static PoolRegistry& Global();

  PoolKey Add(std::shared_ptr<Arena> arena);
  // Null if there is no such pool any more.
  std::shared_ptr<Arena> Find(PoolKey key) const;
  // Forgets the arena and returns it, so that the caller chooses when to free it; null if it was gone.
  std::shared_ptr<Arena> Remove(PoolKey key);

 private:
  struct Entry {
    std::shared_ptr<Arena> arena;
    int32_t generation = 0;
  };

  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
  int32_t last_generation_ = 0;
};

}  // namespace jaxkv

#endif  // JAXKV_POOL_H_
