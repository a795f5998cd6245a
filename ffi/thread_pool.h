// A few threads shared by all copies of the process. Knows neither pages nor pools.
#ifndef JAXKV_THREAD_POOL_H_
#define JAXKV_THREAD_POOL_H_

#include <sched.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace jaxkv {

class ThreadPool {
 public:
  // The pool of this process, with one thread less than there are CPUs: the caller works too. It is never
  // destroyed, because XLA may still run a copy while the interpreter shuts down.
  static ThreadPool& Global();

  // Threads that take part in a ParallelFor, the caller included.
  int num_threads() const { return num_workers_ + 1; }

  // Runs task(0) .. task(count - 1), each once, and returns when all have ended. Tasks must not throw.
  // Callers may overlap. In a forked child, where the threads do not exist, everything runs on the caller.
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& task);

 private:
  struct Job;
  struct Worker;

  ThreadPool();
  void Work(Worker& self);
  void Wake(int64_t most);

  cpu_set_t cpus_;  // those this process may use
  int num_workers_ = 0;
  const int fork_depth_;
  std::mutex mutex_;
  std::deque<std::shared_ptr<Job>> jobs_;
  std::vector<Worker*> idle_;
};

}  // namespace jaxkv

#endif  // JAXKV_THREAD_POOL_H_
