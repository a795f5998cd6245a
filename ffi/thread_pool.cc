#include "thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

namespace jaxkv {
namespace {

// More threads than this only fight for memory bandwidth.
constexpr int kMaxThreads = 16;

int UsableCpus() {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return CPU_COUNT(&cpus);
  return static_cast<int>(std::thread::hardware_concurrency());
}

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
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

ThreadPool& ThreadPool::Global() {
  static ThreadPool* pool = new ThreadPool(std::clamp(UsableCpus(), 1, kMaxThreads) - 1);
  return *pool;
}

ThreadPool::ThreadPool(int num_workers) : num_workers_(num_workers), pid_(getpid()) {
  for (int i = 0; i < num_workers_; ++i) {
    try {
      std::thread([this] { Work(); }).detach();
    } catch (const std::system_error&) {
      break;  // Fewer threads only mean slower copies: the caller can do all the work.
    }
  }
}

void ThreadPool::Work() {
  for (;;) {
    std::shared_ptr<Job> job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      has_jobs_.wait(lock, [this] { return !jobs_.empty(); });
      job = jobs_.front();
      if (job->next.load() >= job->count) {
        jobs_.pop_front();
        continue;
      }
    }
    job->Run();
  }
}

void ThreadPool::ParallelFor(int64_t count, const std::function<void(int64_t)>& task) {
  if (count <= 1 || num_workers_ == 0 || getpid() != pid_) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto job = std::make_shared<Job>(count, task);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(job);
  }
  has_jobs_.notify_all();
  job->Run();
  job->Wait();
}

}  // namespace jaxkv
