// Checks what PageCopier copies against a copy run by run, by every loop that runs here. Run it under the
// sanitizers.
#include "copy.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

using jaxkv::BlockMove;
using jaxkv::CopyLoop;
using jaxkv::FitsInside;
using jaxkv::PageCopier;
using jaxkv::PagePlan;

namespace {

using Bytes = std::vector<uint8_t>;

Bytes RandomBytes(int64_t count, std::mt19937& rng) {
  Bytes bytes(static_cast<size_t>(count + 3));
  for (size_t i = 0; i + 4 <= bytes.size(); i += 4) {
    const uint32_t word = static_cast<uint32_t>(rng());
    std::memcpy(&bytes[i], &word, 4);
  }
  bytes.resize(static_cast<size_t>(count));
  return bytes;
}

constexpr int64_t kRowGap = 7;

struct Shape {
  int64_t blocks;
  int64_t rows;
  int64_t outer;
  int64_t run;

  int64_t moved_bytes() const { return (outer + 1) * run; }
};

// A head-major leaf [outer, blocks, run] next to one with its blocks in rows, [rows, blocks / rows, run] and
// a gap behind each row, as a group would hold them. The first is read in two loops where that can be.
std::vector<PagePlan> TwoPlans(const Shape& shape) {
  const auto& [blocks, rows, outer, run] = shape;
  const int64_t inner = outer % 2 == 0 ? 2 : 1;
  const int64_t plane = blocks * run;
  return {
      {0, blocks, run, run, 0, 0, outer / inner, inner * plane, inner * run, inner, plane, run, 1, 0},
      {1, blocks, run, run, 0, outer * run, 1, 0, 0, 1, 0, 0, rows, blocks / rows * run + kRowGap},
  };
}

int64_t BlockStart(const PagePlan& plan, int64_t block) {
  int64_t start = plan.leaf_offset;
  for (int64_t row = 0; row < plan.num_rows; ++row) {
    for (int64_t entry = 0; entry < plan.num_blocks / plan.num_rows; ++entry) {
      if (block-- == 0) return start + row * plan.row_stride + entry * plan.block_stride;
    }
  }
  return -1;
}

template <typename Visit>
void ForEachRun(const PagePlan& plan, int64_t block, const Visit& visit) {
  const int64_t start = BlockStart(plan, block);
  for (int64_t o = 0; o < plan.outer_count; ++o) {
    for (int64_t i = 0; i < plan.inner_count; ++i) {
      visit(start + o * plan.outer_leaf_stride + i * plan.inner_leaf_stride,
            plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride);
    }
  }
}

// Every other block, to records that stand one behind the other and back, with all other bytes watched.
void CheckRoundTrip(const CopyLoop& loop, const Shape& shape, std::mt19937& rng) {
  const auto& [blocks, rows, outer, run] = shape;
  const auto plans = TwoPlans(shape);
  const int64_t record_bytes = shape.moved_bytes() + 13;
  const jaxkv::RecordExtent extent = {record_bytes, shape.moved_bytes()};
  Bytes first = RandomBytes(blocks * outer * run, rng);
  Bytes second = RandomBytes(blocks * run + rows * kRowGap, rng);
  Bytes records = RandomBytes(blocks * record_bytes, rng);
  std::vector<BlockMove> moves;
  for (int64_t block = blocks - 1; block >= 0; block -= 2) {
    moves.push_back({block, records.data() + static_cast<int64_t>(moves.size()) * record_bytes});
  }
  Bytes expected = records;
  Bytes* leaves[] = {&first, &second};
  for (size_t j = 0; j < moves.size(); ++j) {
    uint8_t* record = expected.data() + static_cast<int64_t>(j) * record_bytes;
    std::fill(record, record + record_bytes, uint8_t{0});
    for (const PagePlan& plan : plans) {
      ForEachRun(plan, moves[j].block, [&](int64_t at_leaf, int64_t at_record) {
        std::copy_n(leaves[plan.leaf]->begin() + at_leaf, plan.run_bytes, record + at_record);
      });
    }
  }
  PageCopier(plans, {first.data(), second.data()}, extent, loop).Gather(moves);
  assert(records == expected);

  Bytes other_first = RandomBytes(static_cast<int64_t>(first.size()), rng);
  Bytes other_second = RandomBytes(static_cast<int64_t>(second.size()), rng);
  Bytes wanted_first = other_first;
  Bytes wanted_second = other_second;
  Bytes* wanted[] = {&wanted_first, &wanted_second};
  for (const BlockMove& move : moves) {
    for (const PagePlan& plan : plans) {
      ForEachRun(plan, move.block, [&](int64_t at_leaf, int64_t at_record) {
        std::copy_n(move.record + at_record, plan.run_bytes, wanted[plan.leaf]->begin() + at_leaf);
      });
    }
  }
  PageCopier(plans, {other_first.data(), other_second.data()}, extent, loop).Scatter(moves);
  assert(other_first == wanted_first && other_second == wanted_second);
}

// Copiers of two devices fill interleaved halves of the same records at the same time; one clears the end.
void CheckSharedRecords() {
  constexpr int64_t kBlocks = 64, kRun = 4096, kRuns = 4, kRecord = 2 * kRuns * kRun + 512;
  std::mt19937 rng(7);
  const Bytes leaf[] = {RandomBytes(kBlocks * kRuns * kRun, rng), RandomBytes(kBlocks * kRuns * kRun, rng)};
  Bytes records = RandomBytes(kBlocks * kRecord, rng);
  std::vector<BlockMove> moves;
  for (int64_t block = 0; block < kBlocks; ++block)
    moves.push_back({block, records.data() + block * kRecord});
  std::vector<std::thread> threads;
  for (int64_t half = 0; half < 2; ++half) {
    threads.emplace_back([&, half] {
      const PagePlan plan = {0, kBlocks, kRuns * kRun, kRun, 0,        half * kRun, 1,
                             0, 0,       kRuns,        kRun, 2 * kRun, 1,           0};
      auto* data = const_cast<uint8_t*>(leaf[half].data());
      PageCopier({plan}, {data}, {kRecord, half == 0 ? 2 * kRuns * kRun : kRecord}).Gather(moves);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int64_t block = 0; block < kBlocks; ++block) {
    for (int64_t at = 0; at < kRecord; ++at) {
      const int64_t half = at / kRun % 2, run = at / kRun / 2;
      const int64_t from = (block * kRuns + run) * kRun + at % kRun;
      const uint8_t wanted = at < 2 * kRuns * kRun ? leaf[half][static_cast<size_t>(from)] : 0;
      assert(records[static_cast<size_t>(block * kRecord + at)] == wanted);
    }
  }
}

void CheckBounds() {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const PagePlan fits = {0, 4, 16, 16, 0, 496, 1, 0, 0, 1, 0, 0, 1, 0};
  assert(FitsInside(fits, 64, 512));
  assert(!FitsInside(fits, 63, 512));
  assert(!FitsInside(fits, 64, 511));
  assert(!FitsInside({0, 4, 15, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0}, 64, 512));
  assert(!FitsInside({0, int64_t{1} << 62, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0}, 64, 512));
  assert(FitsInside({0, 1, 0, 16, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0}, 16, 512));
  assert(FitsInside({0, 4, 32, 16, 0, 0, 1, 0, 0, 1, 0, 0, 2, 16}, 64, 512));
  assert(!FitsInside({0, 4, 32, 16, 0, 0, 1, 0, 0, 1, 0, 0, 2, 17}, 64, 512));
  assert(!FitsInside({0, 4, 32, 16, 0, 0, 1, 0, 0, 1, 0, 0, 2, 15}, 64, 512));
  assert(!FitsInside({0, 5, 16, 16, 0, 0, 1, 0, 0, 1, 0, 0, 2, 32}, 512, 512));
  assert(!FitsInside({0, 4, 16, 16, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0}, 512, 512));
  const int64_t bad_values[] = {-1, -kMost, kMost, kMost - 1, kMost / 2, std::numeric_limits<int64_t>::min()};
  for (int field = 1; field < jaxkv::kPagePlanFields; ++field) {
    for (int64_t value : bad_values) {
      PagePlan plan = {0, 4, 16, 16, 0, 0, 2, 0, 16, 2, 0, 32, 2, 32};
      reinterpret_cast<int64_t*>(&plan)[field] = value;
      assert(!FitsInside(plan, 64, 512));
    }
  }
}

void CheckManyThreads(const CopyLoop& loop) {
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&loop, seed] {
      std::mt19937 rng(seed);
      for (int i = 0; i < 5; ++i) CheckRoundTrip(loop, {33, 3, 3, 8192}, rng);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void CheckLoop(const CopyLoop& loop) {
  std::mt19937 rng(0);
  for (int64_t run : {1, 3, 16, 100, 4096, 70000}) {
    for (int64_t outer : {1, 2, 5}) CheckRoundTrip(loop, {17, 1, outer, run}, rng);
    CheckRoundTrip(loop, {18, 3, 2, run}, rng);
  }
  CheckRoundTrip(loop, {1, 1, 1, 1}, rng);
  for (int64_t run : {131072, 262145, 400003}) CheckRoundTrip(loop, {3, 1, 1, run}, rng);
  CheckManyThreads(loop);
}

}  // namespace

int main() {
  for (const CopyLoop& loop : jaxkv::CopyLoops()) {
    if (loop.runs_here()) {
      CheckLoop(loop);
    } else {
      std::printf("copy_test: %s skipped, this CPU does not have it\n", loop.name);
    }
  }
  CheckSharedRecords();
  CheckBounds();
  std::puts("copy_test: ok");
}
