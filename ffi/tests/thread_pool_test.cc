// Checks that every task runs once, whoever calls and however many call at the same time. Run it under the
// sanitizers.
#include "thread_pool.h"

#include <cassert>
#include <cstdio>
#include <thread>
#include <vector>

using jaxkv::ThreadPool;

namespace {

// Tasks write plain memory that the caller reads: both are ordered, or the sanitizer says so.
void CheckEachOnce(int64_t count) {
  std::vector<int> runs(static_cast<size_t>(count), 0);
  ThreadPool::Global().ParallelFor(count, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
  for (int times : runs) assert(times == 1);
}

}  // namespace

int main() {
  for (int64_t count : {0, 1, 2, 3, 17, 1000}) CheckEachOnce(count);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([] {
      for (int64_t round = 0; round < 300; ++round) CheckEachOnce(round % 40);
    });
  }
  for (std::thread& caller : callers) caller.join();
  // A task may itself spread work.
  ThreadPool::Global().ParallelFor(8, [](int64_t) { CheckEachOnce(16); });
  std::puts("thread_pool_test: ok");
}
