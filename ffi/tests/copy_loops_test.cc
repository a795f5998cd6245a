// Checks every copy loop that runs here against a byte-by-byte copy. Run it under the sanitizers, which do
// not see streaming stores: what a loop must not write is watched instead.
#include "copy_loops.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

using jaxkv::CopyLoop;
using jaxkv::FindCopyLoop;
using jaxkv::Run;
using jaxkv::Stores;

namespace {

constexpr int64_t kArenaBytes = 256 << 10;

int64_t Upto(int64_t most, std::mt19937& rng) { return std::uniform_int_distribution<int64_t>(0, most)(rng); }

using Bytes = std::vector<uint8_t>;

Bytes RandomArena(std::mt19937& rng) {
  Bytes bytes(kArenaBytes);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
  return bytes;
}

// What a test copies: lengths up to `most_bytes`, all of it or any, at multiples of `alignment` with gaps of
// up to `most_gap`.
struct Kind {
  int64_t count;
  int64_t most_bytes;
  bool equal_lengths;
  int64_t alignment;
  int64_t most_gap;
};

void CheckRuns(const CopyLoop& loop, Stores stores, const Kind& kind, std::mt19937& rng) {
  static const Bytes source = RandomArena(rng);
  static const Bytes source_before = source;
  static const Bytes target_before = RandomArena(rng);
  Bytes target = target_before;
  Bytes wanted = target_before;
  std::vector<Run> runs;
  int64_t at = Upto(kind.most_gap, rng);
  for (int64_t i = 0; i < kind.count; ++i) {
    const int64_t num_bytes = kind.equal_lengths ? kind.most_bytes : Upto(kind.most_bytes, rng);
    at = (at + kind.alignment - 1) / kind.alignment * kind.alignment;
    if (at + num_bytes > kArenaBytes) break;
    const int64_t from = Upto((kArenaBytes - num_bytes) / kind.alignment, rng) * kind.alignment;
    std::copy_n(source.begin() + from, num_bytes, wanted.begin() + at);
    runs.push_back({target.data() + at, source.data() + from, num_bytes});
    at += num_bytes + Upto(kind.most_gap, rng);
  }
  std::shuffle(runs.begin(), runs.end(), rng);
  loop.copy(runs.data(), static_cast<int64_t>(runs.size()), stores);
  assert(target == wanted);
  assert(source == source_before);
}

void CheckLoop(const CopyLoop& loop) {
  std::mt19937 rng(0);
  for (Stores stores : {Stores::kCached, Stores::kStreaming}) {
    for (int64_t count : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 40}) {
      for (bool equal_lengths : {false, true}) {
        CheckRuns(loop, stores, {count, 4096, equal_lengths, 64, 4096}, rng);
        CheckRuns(loop, stores, {count, 20000, equal_lengths, 1, 70}, rng);
        CheckRuns(loop, stores, {count, 300, equal_lengths, 1, 70}, rng);
        CheckRuns(loop, stores, {count, 64 * (1 + Upto(12, rng)), equal_lengths, 64, 0}, rng);
      }
    }
    for (int64_t num_bytes = 1; num_bytes < 400; ++num_bytes) {
      CheckRuns(loop, stores, {3, num_bytes, true, 1, 64}, rng);
    }
  }
}

void CheckChoice() {
  assert(std::strcmp(FindCopyLoop("portable")->name, "portable") == 0);
  assert(FindCopyLoop("sse9") == nullptr);
  assert(FindCopyLoop("") == nullptr);
  assert(FindCopyLoop(nullptr) == FindCopyLoop(FindCopyLoop(nullptr)->name));
  for (const CopyLoop& loop : jaxkv::CopyLoops()) {
    assert(FindCopyLoop(loop.name) == (loop.runs_here() ? &loop : nullptr));
  }
}

}  // namespace

int main() {
  for (const CopyLoop& loop : jaxkv::CopyLoops()) {
    if (loop.runs_here()) {
      CheckLoop(loop);
    } else {
      std::printf("copy_loops_test: %s skipped, this CPU does not have it\n", loop.name);
    }
  }
  CheckChoice();
  std::puts("copy_loops_test: ok");
}
