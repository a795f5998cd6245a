// Checks the copy loops against a byte-by-byte copy. Run it under the sanitizers.
#include "copy.h"

#include <cassert>
#include <cstdio>
#include <limits>
#include <random>
#include <thread>
#include <vector>

using jaxkv::BlockMove;
using jaxkv::FitsInside;
using jaxkv::PageCopier;
using jaxkv::PagePlan;

namespace {

using Bytes = std::vector<uint8_t>;

Bytes RandomBytes(int64_t count, std::mt19937& rng) {
  Bytes bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(rng());
  return bytes;
}

constexpr int64_t kRowGap = 7;

// A head-major leaf [outer, blocks, run] next to one with its blocks in rows, [rows, blocks / rows, run] and
// a gap behind each row, as a group would hold them.
std::vector<PagePlan> TwoPlans(int64_t blocks, int64_t rows, int64_t outer, int64_t run) {
  return {
      {0, blocks, run, run, 0, 0, outer, blocks * run, run, 1, 0, 0, 1, 0},
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
void ForEachByte(const PagePlan& plan, int64_t block, const Visit& visit) {
  const int64_t start = BlockStart(plan, block);
  for (int64_t o = 0; o < plan.outer_count; ++o) {
    for (int64_t i = 0; i < plan.inner_count; ++i) {
      for (int64_t b = 0; b < plan.run_bytes; ++b) {
        visit(start + o * plan.outer_leaf_stride + i * plan.inner_leaf_stride + b,
              plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride + b);
      }
    }
  }
}

void CheckRoundTrip(int64_t blocks, int64_t rows, int64_t outer, int64_t run, std::mt19937& rng) {
  const auto plans = TwoPlans(blocks, rows, outer, run);
  const int64_t record_bytes = (outer + 1) * run + 13;
  const jaxkv::RecordExtent extent = {record_bytes, (outer + 1) * run};
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
      ForEachByte(plan, moves[j].block, [&](int64_t at_leaf, int64_t at_record) {
        record[at_record] = (*leaves[plan.leaf])[static_cast<size_t>(at_leaf)];
      });
    }
  }
  PageCopier(plans, {first.data(), second.data()}, extent).Gather(moves);
  assert(records == expected);

  Bytes other_first = RandomBytes(static_cast<int64_t>(first.size()), rng);
  Bytes other_second = RandomBytes(static_cast<int64_t>(second.size()), rng);
  Bytes wanted_first = other_first;
  Bytes wanted_second = other_second;
  Bytes* wanted[] = {&wanted_first, &wanted_second};
  for (const BlockMove& move : moves) {
    for (const PagePlan& plan : plans) {
      ForEachByte(plan, move.block, [&](int64_t at_leaf, int64_t at_record) {
        (*wanted[plan.leaf])[static_cast<size_t>(at_leaf)] = move.record[at_record];
      });
    }
  }
  PageCopier(plans, {other_first.data(), other_second.data()}, extent).Scatter(moves);
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

void CheckManyThreads() {
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) {
    threads.emplace_back([seed] {
      std::mt19937 rng(seed);
      for (int i = 0; i < 20; ++i) CheckRoundTrip(33, 3, 3, 8192, rng);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  for (int64_t run : {1, 3, 16, 100, 4096, 70000}) {
    for (int64_t outer : {1, 2, 5}) CheckRoundTrip(17, 1, outer, run, rng);
    CheckRoundTrip(18, 3, 2, run, rng);
  }
  CheckRoundTrip(1, 1, 1, 1, rng);
  CheckSharedRecords();
  CheckBounds();
  CheckManyThreads();
  std::puts("copy_test: ok");
}
