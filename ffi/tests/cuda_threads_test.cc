// Threads that start and close transfers, threads whose programs move them, and one that disturbs both, on a
// fake device that works in the background. Run it under the thread sanitizer.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transfer_bench.h"

namespace jaxkv::cuda {
namespace {

constexpr int32_t kNumStreams = 2;
constexpr int32_t kClientsPerStream = 2;
constexpr int32_t kBlocksPerClient = 3;
constexpr int32_t kNumRecords = 8;  // of a client's pool

// Runs what it is given, one after another, on a thread of its own: as XLA runs programs.
class Programs {
 public:
  Programs() : thread_([this] { Work(); }) {}
  ~Programs() {
    Run(nullptr);
    thread_.join();
  }

  // Null ends the thread.
  void Run(std::function<void()> program) {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(program));
    changed_.notify_all();
  }

 private:
  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty(); });
      const std::function<void()> program = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (program == nullptr) return;
      program();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  std::thread thread_;
};

struct Conditions {
  uint64_t seed;
  bool pins;
  double failures;      // how likely a call fails
  int64_t loses_after;  // operations; -1: the device is never lost
};

// Room for prefetches.
EngineOptions Options() {
  EngineOptions options = SmallOptions(kByEngines);
  options.staging_bytes = 8 * options.slot_bytes;
  return options;
}

// What all threads use.
struct Stage {
  explicit Stage(const Conditions& conditions)
      : rng(conditions.seed),
        device(conditions.seed, Schedule::kBackground),
        engine(new Engine(device, Options())) {
    constexpr int32_t kNumBlocks = kClientsPerStream * kBlocksPerClient;
    layout = DrawLayout(rng, {3, 4, 200, 3, false, kNumBlocks, 512, kNumBlocks});
    for (int32_t i = 0; i < kNumStreams; ++i) {
      leaves.push_back(std::make_unique<Leaves>(device, layout, rng));
      programs.push_back(std::make_unique<Programs>());
    }
    device.RefuseHost(!conditions.pins);
    engine->Fit(layout.record_bytes);
  }

  Rng rng;
  FakeRuntime device;
  std::unique_ptr<Engine> engine;
  Layout layout;
  std::vector<std::unique_ptr<Leaves>> leaves;
  std::vector<std::unique_ptr<Programs>> programs;
  std::atomic<int32_t> last_generation{0};
  std::atomic<int32_t> num_closed{0};
  std::atomic<int32_t> num_errors{0};
};

// Moves blocks of its own between the leaves of one stream and a pool of its own.
class Client {
 public:
  Client(Stage& stage, int32_t number)
      : stage_(stage),
        number_(number),
        leaves_(*stage.leaves[static_cast<size_t>(number % kNumStreams)]),
        programs_(*stage.programs[static_cast<size_t>(number % kNumStreams)]),
        model_(leaves_.model()),
        rng_(static_cast<uint64_t>(number)) {
    OpenPool();
  }

  void Work(int32_t num_rounds) {
    for (int32_t i = 0; i < num_rounds && !stage_.device.is_lost(); ++i) {
      try {
        if (Chance(rng_, 0.1)) OpenPool();
        FillRecord(Draw(rng_, 0, kNumRecords - 1));
        if (Chance(rng_, 0.5)) Prefetch();
        Transfer(Direction::kToLeaves);
        Transfer(Direction::kToRecords);
      } catch (const CudaError&) {
        // No tag was free, and none could be made.
      }
    }
    pool_->Close();
  }

 private:
  void OpenPool() {
    generation_ = ++stage_.last_generation;
    const PoolKey key = {number_, generation_};
    pool_ = std::make_unique<HostPool>(stage_.device, key, kNumRecords * stage_.layout.record_bytes, rng_);
  }

  void FillRecord(int64_t record) {
    const int64_t record_bytes = stage_.layout.record_bytes;
    pool_->Write(record * record_bytes, RandomBytes(rng_, record_bytes));
    const auto address = static_cast<int32_t>(record * record_bytes / 512);
    stage_.engine->ForgetPrefetched(generation_, &address, 1);
  }

  void Prefetch() {
    const Request request = Ask(Direction::kToLeaves);
    const void* tag = OpenCall(*stage_.engine, request);
    stage_.engine->Prefetch(tag, request.pool.id, stage_.layout.record_bytes);
    if (!stage_.engine->Close(tag).error.empty()) ++stage_.num_errors;
  }

  Request Ask(Direction direction) {
    Request request = {direction, pool_->key(), number_, {}, {}};
    const auto record_units = static_cast<int32_t>(stage_.layout.record_bytes / 512);
    const auto first_record = static_cast<int32_t>(Draw(rng_, 0, kNumRecords - kBlocksPerClient));
    for (int32_t k = 0; k < kBlocksPerClient; ++k) {
      request.blocks.push_back(number_ / kNumStreams * kBlocksPerClient + k);
      request.addresses.push_back((first_record + k) * record_units);
    }
    return request;
  }

  void Transfer(Direction direction) {
    const Request request = Ask(direction);
    const void* tag = OpenCall(*stage_.engine, request);
    std::atomic<bool> has_run{false};
    programs_.Run([&, pages = leaves_.pages()] {
      stage_.engine->Move(direction, tag, request.pool.id, pages, leaves_.compute());
      has_run.store(true, std::memory_order_release);
    });
    // While it runs, the pool may go: either the program finds it first, or it moves nothing.
    const bool closes_pool = Chance(rng_, 0.05);
    if (closes_pool) pool_->Close();
    while (!has_run.load(std::memory_order_acquire)) std::this_thread::yield();
    if (Chance(rng_, 0.5)) {
      while (!stage_.engine->HasEnded(tag)) std::this_thread::yield();
    }
    Judge(request, stage_.engine->Close(tag));
    if (!closes_pool) return CheckPool();
    Check(!pool_->is_alive(), "a pool that was closed ends with its last transfer");
    OpenPool();
  }

  void Judge(const Request& request, const Outcome& outcome) {
    ++stage_.num_closed;
    const bool fails = !outcome.error.empty();
    if (fails) ++stage_.num_errors;
    const int32_t moved = outcome.status[kMoved];
    Check(fails || moved == kBlocksPerClient || moved == 0, "all blocks move, or none");
    if (!fails && moved == 0) return;
    for (size_t j = 0; j < request.blocks.size(); ++j) {
      const int64_t at = int64_t{512} * request.addresses[j];
      const bool to_records = request.direction == Direction::kToRecords;
      if (fails && to_records) ForgetOffload(stage_.layout, pool_->model(), at);
      if (fails && !to_records) ForgetRestore(stage_.layout, model_, request.blocks[j]);
      if (!fails && to_records) ModelOffload(stage_.layout, model_, request.blocks[j], pool_->model(), at);
      if (!fails && !to_records) ModelRestore(stage_.layout, model_, request.blocks[j], pool_->model(), at);
    }
  }

  void CheckPool() {
    Check(pool_->Matches(0, kNumRecords * stage_.layout.record_bytes), "the pool holds its bytes");
  }

  Stage& stage_;
  const int32_t number_;
  Leaves& leaves_;
  Programs& programs_;
  std::vector<Known> model_;  // of its own blocks
  Rng rng_;
  int32_t generation_ = 0;
  std::unique_ptr<HostPool> pool_;
};

// Changes what transfers under way rely on, as other threads of a process may.
void Disturb(Stage& stage, const Conditions& conditions, const std::atomic<bool>& ends) {
  Rng rng(conditions.seed + 1000);
  int64_t record_bytes = stage.layout.record_bytes;
  while (!ends.load()) {
    const auto number = static_cast<int32_t>(Draw(rng, 0, kNumStreams * kClientsPerStream - 1));
    if (Chance(rng, 0.1)) stage.engine->Cancel(number);
    if (Chance(rng, 0.01)) stage.engine->Fit(record_bytes += 512);
    const Paths ways[] = {kByEngines, kByKernels, kDirect};
    stage.engine->set_paths(ways[Draw(rng, 0, 2)]);
    stage.device.RefuseHost(conditions.pins == Chance(rng, 0.1));
    Check(stage.engine->paths().host_blocks == 2, "paths are read while they change");
    for (int64_t i = Draw(rng, 0, 50); i > 0; --i) std::this_thread::yield();
    stage.engine->Forget(number);
    stage.engine->staging_refusal();
  }
}

void CheckConditions(const Conditions& conditions, int32_t num_rounds) {
  Stage stage(conditions);
  std::vector<std::unique_ptr<Client>> clients;
  for (int32_t i = 0; i < kNumStreams * kClientsPerStream; ++i) {
    clients.push_back(std::make_unique<Client>(stage, i));
  }
  stage.device.FailAtRandom(conditions.failures);
  if (conditions.loses_after >= 0) stage.device.LoseAfter(conditions.loses_after);
  std::atomic<bool> ends{false};
  std::vector<std::thread> threads;
  for (const auto& client : clients) threads.emplace_back([&] { client->Work(num_rounds); });
  std::thread disturber([&] { Disturb(stage, conditions, ends); });
  for (std::thread& thread : threads) thread.join();
  ends = true;
  disturber.join();
  clients.clear();
  stage.programs.clear();
  stage.device.FailAtRandom(0);
  stage.engine.reset();
  stage.leaves.clear();
  Check(stage.device.Violations().empty(), stage.device.Violations());
  Check(stage.device.Leaks().empty(), stage.device.Leaks());
  const bool may_fail = conditions.failures > 0 || conditions.loses_after >= 0 || !conditions.pins;
  Check(may_fail || stage.num_errors == 0, "nothing fails unless told to");
  std::printf("cuda_threads_test: %d transfers, %d failed\n", stage.num_closed.load(),
              stage.num_errors.load());
}

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  using jaxkv::cuda::CheckConditions;
  const char* rounds = std::getenv("JAXKV_THREADS_TEST_ROUNDS");
  const int32_t num_rounds = rounds != nullptr ? std::atoi(rounds) : 100;
  for (uint64_t seed : {1, 2, 3}) {
    for (bool pins : {true, false}) {
      CheckConditions({seed, pins, 0, -1}, num_rounds);
      CheckConditions({seed, pins, 0.01, -1}, num_rounds);
    }
    CheckConditions({seed, false, 0, 300}, num_rounds);
    CheckConditions({seed, true, 0, 300}, num_rounds);
  }
  std::puts("cuda_threads_test: ok");
}
