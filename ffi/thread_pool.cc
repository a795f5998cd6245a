#include "thread_pool.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "fork_depth.h"

namespace jaxkv {
namespace {

// More threads than this only fight for memory bandwidth.
constexpr int kMaxThreads = 16;

// Apart from each other and from all else, because several threads write them.
constexpr size_t kCacheLineBytes = 64;

}  // namespace

struct ThreadPool::Job {
  Job(int64_t count, const std::function<void(int64_t)>& task) : count(count), task(task) {}

  // Takes tasks until none is left. `task` is only touched while a task is owed, so while the caller waits.
  void Run() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      task(i);
      if (done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [this] { return done.load() == count; });
  }

  const int64_t count;
  const std::function<void(int64_t)>& task;
  alignas(kCacheLineBytes) std::atomic<int64_t> next{0};
  alignas(kCacheLineBytes) std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

struct ThreadPool::Worker {
  // Bars the worker from the CPU on which the one that wakes it runs. Virtual machines that halt idle CPUs
  // look to their kernels as if those were taken, and a woken thread then queues behind its waker: measured
  // under KVM, half of all jobs of 0.2 ms so ran on one CPU of two. A refusal by the system is harmless.
  void KeepOff(int cpu, cpu_set_t cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE || cpu == barred_cpu) return;
    barred_cpu = cpu;
    CPU_CLR(cpu, &cpus);
    if (CPU_COUNT(&cpus) > 0) sched_setaffinity(thread_id, sizeof(cpus), &cpus);
  }

  std::condition_variable wake;
  bool woken = true;
  pid_t thread_id = 0;
  int barred_cpu = -1;
};

ThreadPool& ThreadPool::Global() {
  static ThreadPool* pool = new ThreadPool;
  return *pool;
}

ThreadPool::ThreadPool() : fork_depth_(ForkDepth()) {
  CPU_ZERO(&cpus_);
  int num_cpus = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof(cpus_), &cpus_) == 0) num_cpus = CPU_COUNT(&cpus_);
  for (; num_workers_ < std::min(num_cpus, kMaxThreads) - 1; ++num_workers_) {
    auto worker = std::make_unique<Worker>();
    try {
      std::thread([this, self = worker.get()] { Work(*self); }).detach();
    } catch (const std::system_error&) {
      break;  // Fewer threads only mean slower copies: the caller can do all the work.
    }
    worker.release();  // As the pool, a worker is never destroyed.
  }
}

void ThreadPool::Work(Worker& self) {
  self.thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (!jobs_.empty()) {
      const std::shared_ptr<Job> job = jobs_.front();
      if (job->next.load() >= job->count) {
        jobs_.pop_front();
        continue;
      }
      lock.unlock();
      job->Run();
      lock.lock();
    }
    self.woken = false;
    idle_.push_back(&self);
    self.wake.wait(lock, [&self] { return self.woken; });
  }
}

// Wakes up to `most` idle workers, and no more than that: each costs the caller a system call.
void ThreadPool::Wake(int64_t most) {
  std::array<Worker*, kMaxThreads> woken;
  size_t count = 0;
  const int cpu = sched_getcpu();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; static_cast<int64_t>(count) < most && !idle_.empty(); ++count) {
      woken[count] = idle_.back();
      woken[count]->woken = true;
      // Under the lock: a worker may wake by itself, be idle again and be taken by another caller.
      woken[count]->KeepOff(cpu, cpus_);
      idle_.pop_back();
    }
  }
  for (size_t i = 0; i < count; ++i) woken[i]->wake.notify_one();
}

void ThreadPool::ParallelFor(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || num_workers_ == 0 || ForkDepth() != fork_depth_) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto job = std::make_shared<Job>(count, task);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
  }
  Wake(count - 1);
  job->Run();
  job->Wait();
}

}  // namespace jaxkv
