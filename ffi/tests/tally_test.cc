// Checks which entries of a call move and how the others are counted.
#include "tally.h"

#include <array>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

using jaxkv::BlockMove;
using jaxkv::Tally;

namespace {

constexpr int64_t kNumBlocks = 200;

std::array<int32_t, jaxkv::kStatusSize> StatusOf(Tally& tally) {
  std::array<int32_t, jaxkv::kStatusSize> status;
  tally.WriteTo(status.data(), status.size());
  status[jaxkv::kElapsedUs] = 0;
  return status;
}

// Ids from -2 to one too many, some of them twice; every seventh record is not there.
void CheckAgainstOneByOne(std::mt19937& random, bool writes_leaves) {
  std::vector<int32_t> ids(random() % 300);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % (kNumBlocks + 3)) - 2;
  std::vector<uint8_t> bytes(ids.size());
  const size_t missing = random() % 7;
  const auto record_of = [&](int64_t j) { return j % 7 == int64_t(missing) ? nullptr : bytes.data() + j; };

  std::array<int32_t, jaxkv::kStatusSize> expected{};
  std::vector<size_t> moved;
  std::vector<bool> seen(kNumBlocks);
  bool any_refused = false;
  for (size_t j = 0; j < ids.size(); ++j) {
    if (ids[j] == -1) continue;
    int reason = jaxkv::kMoved;
    if (ids[j] < 0 || ids[j] >= kNumBlocks) {
      reason = jaxkv::kBadBlock;
    } else if (j % 7 == missing) {
      reason = jaxkv::kBadAddress;
    } else if (writes_leaves && seen[static_cast<size_t>(ids[j])]) {
      reason = jaxkv::kRepeated;
    } else {
      seen[static_cast<size_t>(ids[j])] = true;
      moved.push_back(j);
    }
    ++expected[static_cast<size_t>(reason)];
    if (reason != jaxkv::kMoved && !any_refused) {
      any_refused = true;
      expected[jaxkv::kFirstRefused] = static_cast<int32_t>(j);
    }
  }

  Tally tally(ids.data(), ids.size());
  const std::vector<BlockMove> moves = tally.Collect(kNumBlocks, writes_leaves, record_of);
  assert(moves.size() == moved.size());
  for (size_t i = 0; i < moves.size(); ++i) {
    assert(moves[i].block == ids[moved[i]] && moves[i].record == bytes.data() + moved[i]);
  }
  assert(StatusOf(tally) == expected);
}

void CheckRefuseAll() {
  const int32_t ids[] = {-1, 4, -1, 4};
  Tally tally(ids, 4);
  uint8_t record;
  assert(tally.Collect(8, /*writes_leaves=*/true, [&](int64_t) { return &record; }).size() == 1);
  tally.RefuseAll(jaxkv::kNoMemory);
  const auto status = StatusOf(tally);
  assert(status[jaxkv::kNoMemory] == 2 && status[jaxkv::kMoved] == 0 && status[jaxkv::kRepeated] == 0);
  assert(status[jaxkv::kFirstRefused] == 1);
}

}  // namespace

int main() {
  std::mt19937 random(3);
  for (int round = 0; round < 4000; ++round) CheckAgainstOneByOne(random, round % 2 != 0);
  CheckRefuseAll();
  std::puts("tally_test: ok");
}
