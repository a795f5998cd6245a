// Each way a transfer can take, on a fake device: its bytes, its order, what it refuses. Run it under the
// sanitizers.
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include "transfer_scene.h"

namespace jaxkv::cuda {
namespace {

constexpr Schedule kSchedules[] = {Schedule::kAny, Schedule::kLate};
constexpr LayoutLimits kSmall = {3, 3, 200, 3, false, 12, 512};
constexpr LayoutLimits kHoles = {3, 4, 200, 3, true, 12, 512};
constexpr LayoutLimits kLarge = {2, 2, 5000, 2, false, 6, 512};
constexpr LayoutLimits kManyPlans = {8, 200, 40, 2, false, 4, 512};

// Offloads, which the next step of the model follows at once; then restores, which another follows.
void CheckRoundTrip(Scene& scene) {
  const Request out = scene.Ask(Direction::kToRecords);
  const void* tag = scene.Start(out);
  scene.Model(out);
  scene.leaves->Overwrite(scene.rng);
  scene.device.RunSome();
  ExpectDone(scene.engine->Close(tag), out.blocks.size());
  Check(scene.pool->Matches(0, scene.pool_bytes()), "an offload fills its records and nothing else");
  const Request in = scene.Ask(Direction::kToLeaves);
  tag = scene.Start(in);
  scene.Model(in);
  scene.leaves->Compare();
  scene.device.RunSome();
  ExpectDone(scene.engine->Close(tag), in.blocks.size());
}

void CheckWays() {
  for (const Way& way : kWays) {
    for (Schedule schedule : kSchedules) {
      for (const LayoutLimits& limits : {kSmall, kHoles, kLarge, kManyPlans}) {
        for (uint64_t seed = 0; seed < 10; ++seed) {
          Scene scene(way, seed, schedule, limits);
          for (int round = 0; round < 2; ++round) CheckRoundTrip(scene);
          scene.End();
        }
      }
    }
  }
}

// Which of kernels and copy engines a way uses.
void CheckWhoCopies() {
  const auto counts = [](const Way& way) {
    Scene scene(way, 1, Schedule::kAny, {1, 1, 200, 1, false, 12, 512});
    CheckRoundTrip(scene);
    scene.End();
    return scene.device.counts();
  };
  for (const Way& way : kWays) {
    const FakeCounts found = counts(way);
    const std::string name = way.name;
    const bool uses_engines = name == "staged, by copy engines" || name == "bounced";
    Check(found.kernels >= 2, name + " uses kernels on the leaves");
    Check((found.copies_to_host > 0) == uses_engines, name + " uses copy engines if it should");
    Check((found.copies_to_device > 0) == uses_engines, name + " uses copy engines if it should");
    Check((found.kernels > 2) == (name == "staged, by kernels"),
          name + " uses kernels for records if it should");
  }
}

// -- what is refused ----------------------------------------------------------------------------------------

Outcome Run(Scene& scene, const Request& request) { return scene.engine->Close(scene.Start(request)); }

void ExpectStatus(const Outcome& outcome, const std::vector<int32_t>& wanted, const std::string& what) {
  Check(outcome.error.empty(), what + " is no error: " + outcome.error);
  Check(outcome.status.size() == kStatusSize, what + " has a whole status");
  for (size_t i = 0; i < wanted.size(); ++i) {
    Check(outcome.status[i] == wanted[i], what + ": entry " + std::to_string(i) + " of the status is " +
                                              std::to_string(outcome.status[i]) + ", not " +
                                              std::to_string(wanted[i]));
  }
}

// Entries that cannot move, among one that can.
void CheckRefusedEntries(const Way& way, Direction direction) {
  Scene scene(way, 3, Schedule::kAny, {2, 2, 100, 2, false, 12, 512});
  const auto num_blocks = static_cast<int32_t>(scene.leaves->layout().num_blocks());
  const auto end = static_cast<int32_t>(scene.pool_bytes() / 512);
  const auto units = static_cast<int32_t>(scene.record_bytes() / 512);
  Check(num_blocks > 1, "there are two blocks");
  Request request = {direction, scene.pool->key(), 1, {}, {}};
  request.blocks = {-1, num_blocks, -2, INT32_MAX, INT32_MIN, 0, 1, 1, 1, 0, 1};
  request.addresses = {-5, 0, 0, 0, 0, end - units, -1, end - units + 1, INT32_MAX, 0, INT32_MIN};
  const bool to_leaves = direction == Direction::kToLeaves;
  const int32_t moved = to_leaves ? 1 : 2;
  ExpectStatus(Run(scene, request), {moved, 4, to_leaves ? 1 : 0, 4, 0, 0, 0, 0, 0, 1},
               "a request with bad entries");
  Request good = {direction, scene.pool->key(), 1, {0}, {end - units}};
  if (!to_leaves) good.blocks.push_back(0), good.addresses.push_back(0);
  scene.Model(good);
  scene.End();
}

// Requests of which nothing moves.
void CheckRefusedRequests(const Way& way, Direction direction) {
  Scene scene(way, 4, Schedule::kAny, kSmall);
  Request request = scene.Ask(direction);
  request.blocks.insert(request.blocks.begin(), -1);
  request.addresses.insert(request.addresses.begin(), 0);
  const auto n = static_cast<int32_t>(request.blocks.size()) - 1;
  const auto refused = [&](StatusEntry reason) {
    std::vector<int32_t> status(kElapsedUs, 0);
    status[reason] = n;
    status[kFirstRefused] = 1;
    return status;
  };
  scene.engine->Cancel(request.number);
  ExpectStatus(Run(scene, request), refused(kCancelled), "a request that was called off");
  scene.engine->Forget(request.number);
  const void* tag = OpenCall(*scene.engine, request);
  scene.engine->Move(direction, tag, request.pool.id, std::nullopt, scene.leaves->compute());
  ExpectStatus(scene.engine->Close(tag), refused(kBadGeometry), "a request for leaves of another shape");
  tag = OpenCall(*scene.engine, request);
  scene.engine->Move(direction, tag, request.pool.id + 1, scene.leaves->pages(), scene.leaves->compute());
  ExpectStatus(scene.engine->Close(tag), refused(kNoPool), "a request for an unknown pool");
  Request stale = request;
  --stale.pool.generation;
  ExpectStatus(Run(scene, stale), refused(kNoPool), "a request for the pool that was there before");
  Request empty = request;
  empty.blocks.clear();
  empty.addresses.clear();
  ExpectStatus(Run(scene, empty), std::vector<int32_t>(kElapsedUs, 0), "an empty request");
  scene.engine->AddTag(&scene);
  tag = scene.engine->Open(nullptr, 0);
  Check(tag == &scene, "there is a tag for a request of nothing");
  scene.engine->Move(direction, tag, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  ExpectStatus(scene.engine->Close(tag), std::vector<int32_t>(kElapsedUs, 0), "a request without a head");
  scene.pool->Close();
  ExpectStatus(Run(scene, request), refused(kNoPool), "a request for a pool that was closed");
  Check(!scene.pool->is_alive(), "a refused request holds no pool");
  scene.pool = std::make_unique<HostPool>(scene.device, PoolKey{1, 8}, scene.pool_bytes(), scene.rng);
  scene.End();
}

// -- the life of a call -------------------------------------------------------------------------------------

void CheckLife(const Way& way) {
  Scene scene(way, 5, Schedule::kLate, kSmall);
  Engine& engine = *scene.engine;
  const Request request = scene.Ask(Direction::kToRecords);
  const void* never = OpenCall(engine, request);
  Check(engine.HasEnded(never), "a call that never begins need not be waited for");
  Check(!engine.Close(never).error.empty(), "a call whose program never ran failed");
  // A program that runs after all finds its call closed; one of an unknown tag finds none.
  engine.Move(request.direction, never, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  engine.Move(request.direction, &scene, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  const void* tag = scene.Start(request);
  Check(tag == never, "tags are used again");
  scene.Model(request);
  engine.Move(request.direction, tag, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  const void* other = OpenCall(engine, request);
  Check(other != tag, "a tag in use is not given out");
  Check(!engine.Close(other).error.empty(), "a call whose program never ran failed");
  ExpectDone(engine.Close(tag), request.blocks.size());
  Check(!engine.Close(tag).error.empty(), "a call that was closed is not closed again");
  Check(!engine.Close(&scene).error.empty(), "a tag that nobody made is not closed");
  const void* first = OpenCall(engine, request);
  const void* second = OpenCall(engine, request);
  Check(first != second, "two calls have two tags");
  engine.Close(first);
  engine.Close(second);
  scene.End();
}

// Who gave a call up does not know whether its program has run, or will.
void CheckAbandoned(const Way& way, Direction direction) {
  Scene scene(way, 9, Schedule::kLate, kSmall);
  Engine& engine = *scene.engine;
  const Request request = scene.Ask(direction);
  const void* late = OpenCall(engine, request);
  engine.Abandon(late);
  const void* tag = OpenCall(engine, request);
  Check(tag != late, "a program that is still to come does not find the call of another");
  const Direction other = direction == Direction::kToLeaves ? Direction::kToRecords : Direction::kToLeaves;
  engine.Move(other, late, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  engine.Move(direction, tag, request.pool.id, scene.leaves->pages(), scene.leaves->compute());
  scene.Model(request);
  ExpectDone(engine.Close(tag), request.blocks.size());
  const void* begun = scene.Start(request);
  scene.pool->Close();
  engine.Abandon(begun);
  Check(!scene.pool->is_alive(), "the copies of a call that has begun are waited for");
  Check(OpenCall(engine, request) == begun, "its tag is used again");
  engine.Close(begun);
  engine.Abandon(begun);
  engine.Abandon(&scene);
  scene.pool = std::make_unique<HostPool>(scene.device, PoolKey{1, 8}, scene.pool_bytes(), scene.rng);
  scene.End();
}

// A pool that is closed ends with the last transfer that uses it.
void CheckPoolClosedMeanwhile(const Way& way, Direction direction) {
  Scene scene(way, 6, Schedule::kLate, kSmall);
  const Request request = scene.Ask(direction);
  const void* tag = scene.Start(request);
  scene.Model(request);
  scene.pool->Close();
  Check(scene.pool->is_alive(), "a pool in use stays");
  if (direction == Direction::kToRecords) scene.leaves->Overwrite(scene.rng);
  ExpectDone(scene.engine->Close(tag), request.blocks.size());
  Check(!scene.pool->is_alive(), "a pool that nothing uses ends");
  scene.pool = std::make_unique<HostPool>(scene.device, PoolKey{1, 8}, scene.pool_bytes(), scene.rng);
  scene.End();
}

void CheckPolling(const Way& way, uint64_t seed) {
  Scene scene(way, seed, Schedule::kAny, kLarge);
  const Request request = scene.Ask(Direction::kToRecords);
  const void* tag = scene.Start(request);
  scene.Model(request);
  while (!scene.engine->HasEnded(tag)) std::this_thread::yield();
  Check(scene.pool->Matches(0, scene.pool_bytes()), "an offload that has ended has filled its records");
  Check(scene.engine->HasEnded(tag), "what has ended stays so");
  ExpectDone(scene.engine->Close(tag), request.blocks.size());
  scene.End();
}

// Larger records than staging memory was made for, while smaller ones are under way.
void CheckGrowth(const Way& way, Direction direction) {
  Scene scene(way, 8, Schedule::kLate, kSmall);
  const Request request = scene.Ask(direction);
  const void* tag = scene.Start(request);
  scene.Model(request);
  scene.engine->Fit(3 * 4096);
  Check(scene.engine->staging_refusal().empty(), "there is memory enough");
  ExpectDone(scene.engine->Close(tag), request.blocks.size());
  CheckRoundTrip(scene);
  scene.End();
}

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  using namespace jaxkv::cuda;
  CheckWays();
  CheckWhoCopies();
  for (const Way& way : kWays) {
    for (Direction direction : {Direction::kToRecords, Direction::kToLeaves}) {
      CheckRefusedEntries(way, direction);
      CheckRefusedRequests(way, direction);
      CheckAbandoned(way, direction);
      CheckPoolClosedMeanwhile(way, direction);
      CheckGrowth(way, direction);
    }
    CheckLife(way);
    for (uint64_t seed = 0; seed < 20; ++seed) CheckPolling(way, seed);
  }
  std::puts("cuda_engine_test: ok");
}
