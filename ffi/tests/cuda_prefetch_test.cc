// Records that were brought to the device before they are restored, on a fake device. Run it under the
// sanitizers.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/prefetches.h"
#include "transfer_scene.h"

namespace jaxkv::cuda {
namespace {

constexpr LayoutLimits kLimits = {2, 3, 200, 3, true, 12, 512, 6};
constexpr Schedule kSchedules[] = {Schedule::kAny, Schedule::kLate};

// Staging memory for all records of a scene, or for so few that they crowd each other out.
std::unique_ptr<Scene> MakeScene(const Way& way, uint64_t seed, Schedule schedule, int64_t num_slots) {
  auto scene = std::make_unique<Scene>(way, seed, schedule, kLimits);
  EngineOptions options = SmallOptions(way.paths);
  options.slot_bytes = 2 * scene->record_bytes();
  options.staging_bytes = num_slots * options.slot_bytes;
  scene->engine = std::make_unique<Engine>(scene->device, options);
  scene->engine->Fit(scene->record_bytes());
  return scene;
}

void Shorten(Request& request, size_t count) {
  request.blocks.resize(count);
  request.addresses.resize(count);
}

const void* StartPrefetch(Scene& scene, const Request& request) {
  const void* tag = OpenCall(*scene.engine, request);
  scene.engine->Prefetch(tag, request.pool.id, scene.record_bytes());
  return tag;
}

// Copies to the device and kernels so far.
int64_t CountWork(Scene& scene) {
  const FakeCounts counts = scene.device.counts();
  return counts.copies_to_device + counts.kernels;
}

// Restores and compares. Returns how many copies and kernels that took.
int64_t Restore(Scene& scene, const Request& request) {
  const int64_t before = CountWork(scene);
  const void* tag = scene.Start(request);
  scene.Model(request);
  scene.leaves->Compare();
  ExpectDone(scene.engine->Close(tag), request.blocks.size());
  return CountWork(scene) - before;
}

void CheckLanded(const Way& way, Schedule schedule, uint64_t seed) {
  const auto scene = MakeScene(way, seed, schedule, 10);
  const Request request = scene->Ask(Direction::kToLeaves);
  const bool waits = seed % 2 == 0;
  const void* tag = StartPrefetch(*scene, request);
  if (waits) ExpectDone(scene->engine->Close(tag), request.blocks.size());
  const auto num_slots = static_cast<int64_t>(request.blocks.size() + 1) / 2;
  Check(Restore(*scene, request) == num_slots, "records that have landed are not copied again");
  if (!waits) ExpectDone(scene->engine->Close(tag), request.blocks.size());
  for (int again = 0; again < 3; ++again) {
    Check(Restore(*scene, request) > num_slots, "they are when they have been restored");
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, request)), request.blocks.size());
    Check(Restore(*scene, request) == num_slots, "restored records leave room for the next");
  }
  scene->End();
}

// Two slots are kept for what was not prefetched; what one prefetch has brought it does not crowd out again.
void CheckRoom(const Way& way, Schedule schedule) {
  for (int64_t num_slots : {2, 3, 4, 5}) {
    const auto scene = MakeScene(way, 9, schedule, num_slots);
    Request request = scene->Ask(Direction::kToLeaves);
    // One record of this much is one copy or one kernel.
    Shorten(request, 1);
    const int64_t work = Restore(*scene, request) - 1;
    Check(work == 1, "a record is copied once");
    request = scene->Ask(Direction::kToLeaves);
    Shorten(request, 6);
    for (size_t j = 0; j < 6; ++j)
      request.addresses[j] = static_cast<int32_t>(2 * j * scene->record_bytes() / 512);
    const int64_t before = CountWork(*scene);
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, request)), 6);
    const bool one_by_one = CountWork(*scene) - before == 2 * std::min<int64_t>(num_slots - 2, 3);
    const bool together = CountWork(*scene) - before == std::min<int64_t>(num_slots - 2, 3);
    Check(one_by_one || together, "a prefetch fills all slots but two, and each once");
    scene->End();
  }
}

// Two programs read what waits in one slot, on streams of their own; the next prefetch waits for both.
void CheckTwoStreams(const Way& way, Schedule schedule, uint64_t seed) {
  const auto scene = MakeScene(way, seed, schedule, 3);
  auto others = std::make_unique<Leaves>(scene->device, scene->leaves->layout(), scene->rng);
  Request request = scene->Ask(Direction::kToLeaves);
  Shorten(request, 2);
  ExpectDone(scene->engine->Close(StartPrefetch(*scene, request)), 2);
  Request first = request;
  Shorten(first, 1);
  const void* tag = scene->Start(first);
  scene->Model(first);
  const Request second = {Direction::kToLeaves, request.pool, 2, {request.blocks[1]}, {request.addresses[1]}};
  const void* other_tag = OpenCall(*scene->engine, second);
  scene->engine->Move(second.direction, other_tag, second.pool.id, others->pages(), others->compute());
  ExpectDone(scene->engine->Close(other_tag), 1);
  for (int round = 0; round < 3; ++round) {
    const Request next = scene->Ask(Direction::kToLeaves);
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, next)), next.blocks.size());
  }
  ExpectDone(scene->engine->Close(tag), 1);
  others.reset();
  scene->End();
}

// Some records are restored, in several transfers; some change meanwhile.
void CheckParts(const Way& way, Schedule schedule, uint64_t seed, int64_t num_slots) {
  const auto scene = MakeScene(way, seed, schedule, num_slots);
  for (int round = 0; round < 6; ++round) {
    const Request request = scene->Ask(Direction::kToLeaves);
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, request)), request.blocks.size());
    const int32_t changed = request.addresses[0];
    scene->pool->Write(int64_t{512} * changed, RandomBytes(scene->rng, scene->record_bytes()));
    scene->engine->ForgetPrefetched(request.pool.generation, &changed, 1);
    Request out = request;
    out.direction = Direction::kToRecords;
    Shorten(out, 2);
    const void* tag = scene->Start(out);
    scene->Model(out);
    ExpectDone(scene->engine->Close(tag), 2);
    Request some = scene->Ask(Direction::kToLeaves);
    some.blocks.resize(some.blocks.size() / 2 + 1);
    some.addresses.resize(some.blocks.size());
    Restore(*scene, some);
    if (round == 3) scene->engine->Fit(scene->record_bytes() * 3);
  }
  scene->End();
}

// The same record several times in one prefetch: it waits in one place.
void CheckRepeated(const Way& way, Schedule schedule) {
  const auto scene = MakeScene(way, 5, schedule, 3);
  Request request = scene->Ask(Direction::kToLeaves);
  Request twice = request;
  Shorten(twice, 4);
  for (int32_t& address : twice.addresses) address = request.addresses[0];
  ExpectDone(scene->engine->Close(StartPrefetch(*scene, twice)), 4);
  Request others = request;
  others.blocks.erase(others.blocks.begin());
  others.addresses.erase(others.addresses.begin());
  Restore(*scene, others);
  Restore(*scene, request);
  scene->End();
}

// Nothing of a prefetch is taken for a record of the next pool, or stays when calls fail.
void CheckNextPool(const Way& way) {
  const auto scene = MakeScene(way, 6, Schedule::kLate, 10);
  Request request = scene->Ask(Direction::kToLeaves);
  const void* tag = StartPrefetch(*scene, request);
  scene->pool->Close();
  Check(scene->pool->is_alive(), "a prefetch holds its pool");
  ExpectDone(scene->engine->Close(tag), request.blocks.size());
  Check(!scene->pool->is_alive(), "and lets it go");
  scene->pool = std::make_unique<HostPool>(scene->device, PoolKey{1, 8}, scene->pool_bytes(), scene->rng);
  request.pool = scene->pool->key();
  Restore(*scene, request);
  scene->End();
}

// Three slots can hold what waits, whatever failed before.
void CheckCapacity(Scene& scene) {
  Request request = scene.Ask(Direction::kToLeaves);
  Shorten(request, 6);
  ExpectDone(scene.engine->Close(StartPrefetch(scene, request)), 6);
  Check(Restore(scene, request) == 3, "as many records can wait as before a failure");
}

// Each call of a prefetch fails once: who waits is told.
void CheckFailedPrefetches(const Way& way, Schedule schedule) {
  for (int64_t n = 1;; ++n) {
    const auto scene = MakeScene(way, 7, schedule, 5);
    const Request first = scene->Ask(Direction::kToLeaves);
    Restore(*scene, first);
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, first)), first.blocks.size());
    const Request second = scene->Ask(Direction::kToLeaves);
    const void* tag = OpenCall(*scene->engine, second);
    scene->device.FailCall(n);
    scene->engine->Prefetch(tag, second.pool.id, scene->record_bytes());
    const bool fails = scene->device.num_failed() > 0;
    scene->device.FailCall(0);
    Check(scene->engine->Close(tag).error.empty() != fails, "who waits for a prefetch is told of failures");
    CheckCapacity(*scene);
    Restore(*scene, second);
    scene->End();
    if (!fails) return Check(n > 4, "calls have failed");
  }
}

// Each call of a restore of what waits fails once.
void CheckFailedRestores(const Way& way, Schedule schedule) {
  for (int64_t n = 1;; ++n) {
    const auto scene = MakeScene(way, 8, schedule, 5);
    const Request request = scene->Ask(Direction::kToLeaves);
    ExpectDone(scene->engine->Close(StartPrefetch(*scene, request)), request.blocks.size());
    const void* tag = OpenCall(*scene->engine, request);
    scene->device.FailCall(n);
    scene->engine->Move(request.direction, tag, request.pool.id, scene->leaves->pages(),
                        scene->leaves->compute());
    const bool fails = scene->device.num_failed() > 0;
    scene->device.FailCall(0);
    scene->Model(request, fails);
    Check(scene->engine->Close(tag).error.empty() != fails, "who waits for a restore is told of failures");
    CheckCapacity(*scene);
    scene->End();
    if (!fails) return Check(n > 6, "calls have failed");
  }
}

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  using namespace jaxkv::cuda;
  for (const Way& way : kWays) {
    if (!way.has_staging || way.paths.direct_below_bytes > 0) continue;
    for (Schedule schedule : kSchedules) {
      for (uint64_t seed = 0; seed < 8; ++seed) {
        CheckLanded(way, schedule, seed);
        CheckTwoStreams(way, schedule, seed);
        for (int64_t num_slots : {2, 3, 4, 8}) CheckParts(way, schedule, seed, num_slots);
      }
      CheckRepeated(way, schedule);
      CheckRoom(way, schedule);
      CheckFailedPrefetches(way, schedule);
      CheckFailedRestores(way, schedule);
    }
    CheckNextPool(way);
  }
  std::puts("cuda_prefetch_test: ok");
}
