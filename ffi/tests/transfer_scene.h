// One group, one pool, one engine on a fake device: what tests of single transfers need.
#ifndef JAXKV_TESTS_TRANSFER_SCENE_H_
#define JAXKV_TESTS_TRANSFER_SCENE_H_

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "transfer_bench.h"

namespace jaxkv::cuda {

// The ways a transfer can take.
struct Way {
  const char* name;
  Paths paths;
  bool pins;
  bool has_staging;
};

constexpr Way kWays[] = {
    {"direct", kDirect, true, true},
    {"direct for want of staging memory", kByEngines, true, false},
    {"staged, by copy engines", kByEngines, true, true},
    {"staged, by kernels", kByKernels, true, true},
    {"bounced", kByEngines, false, true},
};

struct Scene {
  static constexpr int64_t kPoolRecords = 16;

  Scene(const Way& way, uint64_t seed, Schedule schedule, const LayoutLimits& limits)
      : rng(seed), device(seed, schedule), engine(new Engine(device, SmallOptions(way.paths))) {
    const Layout layout = DrawLayout(rng, limits);
    leaves = std::make_unique<Leaves>(device, layout, rng);
    device.RefuseHost(!way.pins);
    pool = std::make_unique<HostPool>(device, PoolKey{1, 7}, kPoolRecords * layout.record_bytes, rng);
    Check(pool->is_pinned() == way.pins, "the pool is pinned where it can be");
    if (way.has_staging) engine->Fit(layout.record_bytes);
  }

  // What must hold once every call is closed.
  void End() {
    leaves->Compare();
    device.RunAll();
    Check(leaves->Findings().empty(), leaves->Findings());
    Check(pool->Matches(0, pool_bytes()), "the pool holds its bytes");
    pool->Close();
    Check(!pool->is_alive(), "nobody holds the pool any more");
    engine.reset();
    leaves.reset();
    Check(device.Violations().empty(), device.Violations());
    Check(device.Leaks().empty(), device.Leaks());
  }

  int64_t record_bytes() const { return leaves->layout().record_bytes; }
  int64_t pool_bytes() const { return kPoolRecords * record_bytes(); }

  // Blocks in some order, each with a record of its own: all of them or as many as there are records.
  Request Ask(Direction direction) {
    Request request = {direction, pool->key(), 1, {}, {}};
    std::vector<int32_t> blocks(static_cast<size_t>(leaves->layout().num_blocks()));
    std::vector<int32_t> records(kPoolRecords);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::iota(records.begin(), records.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), rng);
    std::shuffle(records.begin(), records.end(), rng);
    for (size_t j = 0; j < std::min(blocks.size(), records.size()); ++j) {
      request.blocks.push_back(blocks[j]);
      request.addresses.push_back(records[j] * static_cast<int32_t>(record_bytes() / 512));
    }
    return request;
  }

  const void* Start(const Request& request) {
    const void* tag = OpenCall(*engine, request);
    engine->Move(request.direction, tag, request.pool.id, leaves->pages(), leaves->compute());
    return tag;
  }

  // What a request does, or what it leaves unknown.
  void Model(const Request& request, bool fails = false) {
    const Layout& layout = leaves->layout();
    for (size_t j = 0; j < request.blocks.size(); ++j) {
      const int64_t at = int64_t{512} * request.addresses[j];
      const int32_t block = request.blocks[j];
      const bool to_records = request.direction == Direction::kToRecords;
      if (fails && to_records) ForgetOffload(layout, pool->model(), at);
      if (fails && !to_records) ForgetRestore(layout, leaves->model(), block);
      if (!fails && to_records) ModelOffload(layout, leaves->model(), block, pool->model(), at);
      if (!fails && !to_records) ModelRestore(layout, leaves->model(), block, pool->model(), at);
    }
  }

  Rng rng;
  FakeRuntime device;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Leaves> leaves;
  std::unique_ptr<HostPool> pool;
};

inline void ExpectDone(const Outcome& outcome, size_t num_moved) {
  Check(outcome.error.empty(), "no error: " + outcome.error);
  Check(outcome.status[kMoved] == static_cast<int32_t>(num_moved), "all blocks moved");
  for (int entry = kBadBlock; entry <= kFirstRefused; ++entry) {
    Check(outcome.status[static_cast<size_t>(entry)] == 0, "no block was refused");
  }
}

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_TRANSFER_SCENE_H_
