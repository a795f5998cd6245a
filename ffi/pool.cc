#include "pool.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "fork_depth.h"
#include "numa.h"
#include "thread_pool.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

namespace jaxkv {
namespace {

constexpr int64_t kPageBytes = 4 << 10;
constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kPopulateBytes = 32 << 20;

constexpr int kFixedSize = F_SEAL_SHRINK | F_SEAL_GROW;

[[noreturn]] void ThrowAllocationError(int64_t num_bytes, int error) {
  throw AllocationError("the system refused " + std::to_string(num_bytes) + " bytes for a host pool (" +
                        std::strerror(error) + "); ask for less or free memory");
}

int64_t WholePages(int64_t num_bytes) {
  if (num_bytes < 1 || num_bytes > std::numeric_limits<int64_t>::max() / 2) {
    throw AllocationError("a host pool needs a positive number of bytes, got " + std::to_string(num_bytes));
  }
  return (num_bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

uint8_t* Map(int64_t num_bytes, int protection) {
  void* data = mmap(nullptr, static_cast<size_t>(num_bytes), protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) ThrowAllocationError(num_bytes, errno);
  return static_cast<uint8_t*>(data);
}

// Maps memory that starts on a huge page. What is mapped too much for that goes back at once.
uint8_t* MapAligned(int64_t num_bytes, int protection) {
  if (num_bytes < kHugePageBytes) return Map(num_bytes, protection);
  uint8_t* mapped = Map(num_bytes + kHugePageBytes, protection);
  const int64_t before = -reinterpret_cast<intptr_t>(mapped) & (kHugePageBytes - 1);
  const int64_t after = kHugePageBytes - before;
  if (before > 0) munmap(mapped, static_cast<size_t>(before));
  munmap(mapped + before + num_bytes, static_cast<size_t>(after));
  return mapped + before;
}

// Maps a file from its start where an aligned place was found for it.
uint8_t* MapFile(const SharedFile& file) {
  const auto num_bytes = static_cast<size_t>(file.num_bytes());
  uint8_t* place = MapAligned(file.num_bytes(), PROT_NONE);
  if (mmap(place, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.fd(), 0) == MAP_FAILED) {
    const int error = errno;
    munmap(place, num_bytes);
    ThrowAllocationError(file.num_bytes(), error);
  }
  return place;
}

bool AdviseHugePages(uint8_t* data, int64_t num_bytes) {
  return num_bytes >= kHugePageBytes && madvise(data, static_cast<size_t>(num_bytes), MADV_HUGEPAGE) == 0;
}

// The kernel takes the advice for shared memory even where it is told not to follow it.
bool SharedMemoryHasHugePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::string choices;
  return std::getline(file, choices) && choices.find("[never]") == std::string::npos &&
         choices.find("[deny]") == std::string::npos;
}

// Makes a range resident and changes no byte of it. Returns an errno, 0 when done.
int PopulateRange(uint8_t* data, int64_t num_bytes) {
  if (madvise(data, static_cast<size_t>(num_bytes), MADV_POPULATE_WRITE) == 0) return 0;
  if (errno != EINVAL) return errno;
  // Kernels before 5.14 do not know the advice; writing to each page does the same. The write adds nothing in
  // one step, because another process may be writing there.
  for (int64_t i = 0; i < num_bytes; i += kPageBytes) {
    __atomic_fetch_or(static_cast<volatile uint8_t*>(data + i), uint8_t{0}, __ATOMIC_RELAXED);
  }
  return 0;
}

// How the kernel calls the file in /proc. Read there, it says which file a number stands for.
std::string NameInProc(const std::string& nonce) { return "/memfd:jaxkv-" + nonce + " (deleted)"; }

std::string ReadLink(const std::string& path) {
  std::array<char, 256> target;
  const ssize_t size = readlink(path.c_str(), target.data(), target.size());
  return std::string(target.data(), static_cast<size_t>(std::max<ssize_t>(size, 0)));
}

[[noreturn]] void ThrowNotOpened(pid_t pid, int error) {
  const std::string process = "process " + std::to_string(pid);
  if (error == ENOENT || error == ESRCH) {
    throw ClosedError(process +
                      " no longer has the host pool of this handle: the process ended or closed the " +
                      "pool, or runs in another container; open a new shared pool and send its handle");
  }
  throw AllocationError("the system refused to open the host pool of " + process + " (" +
                        std::strerror(error) +
                        "); both must run as the same user, and may need more open files");
}

// Checks a file that is open as `found`, by a descriptor that can do nothing else, and opens it for use.
// Which file it is cannot change in between.
int OpenChecked(pid_t pid, int found, int64_t num_bytes, const std::string& nonce) {
  const std::string path = "/proc/self/fd/" + std::to_string(found);
  if (ReadLink(path) != NameInProc(nonce)) {
    throw ClosedError("process " + std::to_string(pid) + " has something else open where the host pool of " +
                      "this handle was; open a new shared pool and send its handle");
  }
  struct stat status;
  if (fstat(found, &status) != 0) ThrowNotOpened(pid, errno);
  if (status.st_size != num_bytes) {
    throw AllocationError("the handle says that the host pool has " + std::to_string(num_bytes) +
                          " bytes, but it has " + std::to_string(status.st_size) +
                          "; use the handle of the owner as it is");
  }
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) ThrowNotOpened(pid, errno);
  return fd;
}

}  // namespace

SharedFile SharedFile::Create(int64_t num_bytes, const std::string& nonce) {
  num_bytes = WholePages(num_bytes);
  const std::string name = "jaxkv-" + nonce;
  int fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
  // Kernels before 6.3 do not know the last flag; some later ones refuse files without it.
  if (fd < 0 && errno == EINVAL) fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) ThrowAllocationError(num_bytes, errno);
  SharedFile file(fd, num_bytes);
  // A file that shrank would kill whoever touches the memory behind its end.
  if (ftruncate(fd, num_bytes) != 0 || fcntl(fd, F_ADD_SEALS, kFixedSize | F_SEAL_SEAL) != 0) {
    ThrowAllocationError(num_bytes, errno);
  }
  return file;
}

SharedFile SharedFile::Open(pid_t pid, int fd, int64_t num_bytes, const std::string& nonce) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  // O_PATH, because opening whatever it is for use could block or do something.
  const int found = open(path.c_str(), O_PATH | O_CLOEXEC);
  if (found < 0) ThrowNotOpened(pid, errno);
  const SharedFile holder(found, num_bytes);
  return SharedFile(OpenChecked(pid, found, num_bytes, nonce), num_bytes);
}

SharedFile::~SharedFile() {
  if (fd_ >= 0) close(fd_);
}

SharedFile::SharedFile(SharedFile&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), num_bytes_(other.num_bytes_) {}

Arena::Arena(int64_t num_bytes) : num_bytes_(WholePages(num_bytes)), fork_depth_(ForkDepth()) {
  data_ = MapAligned(num_bytes_, PROT_READ | PROT_WRITE);
  huge_pages_ = AdviseHugePages(data_, num_bytes_);
  InterleaveOverNodes(data_, num_bytes_);
  Populate();
}

Arena::Arena(const SharedFile& file) : num_bytes_(file.num_bytes()), fork_depth_(ForkDepth()) {
  data_ = MapFile(file);
  huge_pages_ = AdviseHugePages(data_, num_bytes_) && SharedMemoryHasHugePages();
  InterleaveOverNodes(data_, num_bytes_);
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

bool Arena::owned_by_this_process() const { return ForkDepth() == fork_depth_; }

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
