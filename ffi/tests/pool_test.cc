// Checks arenas, their registry and the threads that fill them. Run it under the sanitizers.
#include "pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <cstdio>
#include <limits>
#include <numeric>
#include <thread>
#include <vector>

#include "thread_pool.h"

using jaxkv::AllocationError;
using jaxkv::Arena;
using jaxkv::PoolKey;
using jaxkv::PoolRegistry;
using jaxkv::ThreadPool;

namespace {

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
    bool refused = false;
    try {
      Arena arena(bytes);
    } catch (const AllocationError&) {
      refused = true;
    }
    assert(refused);
  }
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
  const pid_t child = fork();
  if (child == 0) {
    std::atomic<int> sum{0};
    ThreadPool::Global().ParallelFor(10, [&](int64_t i) { sum += static_cast<int>(i); });
    _exit(!arena.owned_by_this_process() && sum == 45 ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  CheckArena();
  CheckRegistry();
  CheckThreads();
  CheckFork();
  std::puts("pool_test: ok");
}
