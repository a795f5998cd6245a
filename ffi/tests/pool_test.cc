// Checks arenas, their registry and the threads that fill them. Run it under the sanitizers.
#include "pool.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <csignal>
#include <cstdio>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "thread_pool.h"

using jaxkv::AllocationError;
using jaxkv::Arena;
using jaxkv::ClosedError;
using jaxkv::PoolKey;
using jaxkv::PoolRegistry;
using jaxkv::SharedFile;
using jaxkv::ThreadPool;

namespace {

template <typename Error, typename Function>
bool Refuses(Function function) {
  try {
    function();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void CheckArena() {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  for (int64_t bytes : {int64_t{1}, int64_t{4096}, int64_t{4097}, int64_t{70} << 20}) {
    Arena arena(bytes);
    assert(arena.num_bytes() >= bytes && arena.num_bytes() < bytes + 4096 && arena.num_bytes() % 4096 == 0);
    assert(reinterpret_cast<uintptr_t>(arena.data()) % 4096 == 0);
    arena.data()[0] = 1;
    arena.data()[arena.num_bytes() - 1] = 2;
    assert(arena.owned_by_this_process());
    assert(arena.Contains(0, arena.num_bytes()) && arena.Contains(arena.num_bytes(), 0));
    assert(!arena.Contains(1, arena.num_bytes()) && !arena.Contains(-1, 1) && !arena.Contains(0, -1));
    assert(!arena.Contains(kMost, kMost) && !arena.Contains(kMost, 1) && !arena.Contains(1, kMost));
  }
  for (int64_t bytes : {int64_t{0}, int64_t{-1}, kMost, int64_t{1} << 60}) {
    assert(Refuses<AllocationError>([&] { Arena arena(bytes); }));
    assert(Refuses<AllocationError>([&] { Arena arena(SharedFile::Create(bytes, "n")); }));
  }
}

void CheckSharedArena() {
  for (int64_t bytes : {int64_t{1}, int64_t{4097}, (int64_t{70} << 20) + 1}) {
    SharedFile file = SharedFile::Create(bytes, "nonce");
    assert(file.num_bytes() >= bytes && file.num_bytes() < bytes + 4096 && file.num_bytes() % 4096 == 0);
    assert(ftruncate(file.fd(), 0) != 0 && ftruncate(file.fd(), 1 << 30) != 0);
    assert((fcntl(file.fd(), F_GETFD) & FD_CLOEXEC) != 0);
    auto owner = std::make_unique<Arena>(file);
    assert(reinterpret_cast<uintptr_t>(owner->data()) % (bytes < (2 << 20) ? 4096 : 2 << 20) == 0);
    const int64_t last = owner->num_bytes() - 1;
    owner->data()[0] = 1;
    owner->data()[last] = 2;
    Arena attached(SharedFile::Open(getpid(), file.fd(), file.num_bytes(), "nonce"));
    assert(attached.data() != owner->data() && attached.num_bytes() == owner->num_bytes());
    assert(attached.data()[0] == 1 && attached.data()[last] == 2);
    attached.data()[last] = 3;
    assert(owner->data()[last] == 3);
    owner.reset();
    assert(attached.data()[0] == 1 && attached.data()[last] == 3);
  }
}

void CheckWrongSharedFiles() {
  const SharedFile file = SharedFile::Create(8192, "nonce");
  const auto open_file = [](pid_t pid, int fd, int64_t num_bytes, const std::string& nonce) {
    return [=] { SharedFile::Open(pid, fd, num_bytes, nonce); };
  };
  assert(!Refuses<ClosedError>(open_file(getpid(), file.fd(), 8192, "nonce")));
  assert(Refuses<ClosedError>(open_file(getpid(), file.fd(), 8192, "nonc")));
  assert(Refuses<ClosedError>(open_file(getpid(), file.fd(), 8192, "")));
  assert(Refuses<ClosedError>(open_file(getpid(), file.fd() + 100, 8192, "nonce")));
  assert(Refuses<ClosedError>(open_file(getpid(), -1, 8192, "nonce")));
  assert(Refuses<ClosedError>(open_file(0, file.fd(), 8192, "nonce")));
  assert(Refuses<AllocationError>(open_file(getpid(), file.fd(), 4096, "nonce")));
  assert(Refuses<AllocationError>(open_file(getpid(), file.fd(), 12288, "nonce")));
  assert(Refuses<AllocationError>([] { SharedFile::Create(4096, std::string(300, 'n')); }));
  int pipe_ends[2];
  assert(pipe(pipe_ends) == 0);
  assert(Refuses<ClosedError>(open_file(getpid(), pipe_ends[0], 4096, "nonce")));
  close(pipe_ends[0]);
  close(pipe_ends[1]);
}

// Runs a check in a child whose limits are its own. Returns whether it held.
template <typename Function>
bool HoldsInChild(Function function) {
  const pid_t child = fork();
  if (child == 0) _exit(function() ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void CheckLimits() {
  const rlimit none = {0, 0};
  const SharedFile file = SharedFile::Create(8192, "nonce");
  assert(HoldsInChild([&] {
    setrlimit(RLIMIT_NOFILE, &none);
    return Refuses<AllocationError>([&] { SharedFile::Open(getppid(), file.fd(), 8192, "nonce"); }) &&
           Refuses<AllocationError>([] { SharedFile::Create(4096, "n"); });
  }));
  assert(HoldsInChild([&] {
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &none);
    return Refuses<AllocationError>([] { SharedFile::Create(4096, "n"); });
  }));
}

void CheckRegistry() {
  PoolRegistry& registry = PoolRegistry::Global();
  const PoolKey first = registry.Add(std::make_shared<Arena>(4096));
  const PoolKey second = registry.Add(std::make_shared<Arena>(4096));
  assert(first.id != second.id && registry.Find(first) != registry.Find(second));
  auto held = registry.Find(first);
  assert(registry.Remove(first) == held && registry.Find(first) == nullptr &&
         registry.Remove(first) == nullptr);
  held->data()[0] = 1;  // Still there for whoever found it in time.
  const PoolKey third = registry.Add(std::make_shared<Arena>(4096));
  assert(third.id == first.id && third.generation != first.generation);
  assert(registry.Find(first) == nullptr && registry.Find(third) != held);
  assert(registry.Find({-1, third.generation}) == nullptr);
  assert(registry.Find({std::numeric_limits<int64_t>::max(), third.generation}) == nullptr);
  registry.Remove(second);
  registry.Remove(third);
}

void CheckThreads() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) {
        std::vector<int> runs(static_cast<size_t>(round), 0);
        ThreadPool::Global().ParallelFor(round, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
        for (int count : runs) assert(count == 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void CheckFork() {
  Arena arena(4096);
  Arena shared(SharedFile::Create(4096, "nonce"));
  assert(HoldsInChild([&] {
    std::atomic<int> sum{0};
    ThreadPool::Global().ParallelFor(10, [&](int64_t i) { sum += static_cast<int>(i); });
    return !arena.owned_by_this_process() && !shared.owned_by_this_process() && sum == 45;
  }));
  assert(HoldsInChild([&] {
    Arena of_child(4096);
    return of_child.owned_by_this_process() &&
           HoldsInChild([&] { return !of_child.owned_by_this_process(); });
  }));
  assert(arena.owned_by_this_process() && shared.owned_by_this_process());
}

}  // namespace

int main() {
  CheckArena();
  CheckSharedArena();
  CheckWrongSharedFiles();
  CheckLimits();
  CheckRegistry();
  CheckThreads();
  CheckFork();
  std::puts("pool_test: ok");
}
