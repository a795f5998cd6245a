// Prints how fast pages move, each figure beside one contiguous copy of as many bytes and beside memcpy page
// by page, with as many threads, in the same run: median of rounds, GB/s. Judges nothing. taskset -c 0 for
// one thread; JAXKV_COPY picks the loop.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "copy.h"
#include "pool.h"
#include "thread_pool.h"

using jaxkv::BlockMove;
using jaxkv::PageCopier;
using jaxkv::PagePlan;
using jaxkv::ThreadPool;

namespace {

constexpr int64_t kMovedBytes = 512 << 20;
constexpr int64_t kLeafBytes = 2 * kMovedBytes;
constexpr int kRounds = 3;

double Seconds(const std::function<void()>& copy) {
  const auto start = std::chrono::steady_clock::now();
  copy();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// The candidates in turn, so that all of them see the same minutes of a shared machine.
std::vector<double> MedianGbPerS(const std::vector<std::function<void()>>& candidates) {
  std::vector<std::vector<double>> seconds(candidates.size());
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i) seconds[i].push_back(Seconds(candidates[i]));
  }
  std::vector<double> rates;
  for (auto& of_one : seconds) {
    std::nth_element(of_one.begin(), of_one.begin() + kRounds / 2, of_one.end());
    rates.push_back(static_cast<double>(kMovedBytes) / of_one[kRounds / 2] / 1e9);
  }
  return rates;
}

void CopyContiguous(uint8_t* to, const uint8_t* from) {
  const int64_t threads = ThreadPool::Global().num_threads();
  const int64_t part = kMovedBytes / threads;
  ThreadPool::Global().ParallelFor(
      threads, [&](int64_t i) { std::memcpy(to + i * part, from + i * part, static_cast<size_t>(part)); });
}

void CopyPageByPage(const PagePlan& plan, uint8_t* leaf, const std::vector<BlockMove>& moves, bool to_leaf) {
  constexpr int64_t kPortion = 1 << 20;
  const auto count = static_cast<int64_t>(moves.size());
  const int64_t step = std::max<int64_t>(kPortion / plan.page_bytes(), 1);
  ThreadPool::Global().ParallelFor((count + step - 1) / step, [&](int64_t part) {
    for (int64_t j = part * step; j < std::min(count, (part + 1) * step); ++j) {
      for (int64_t o = 0; o < plan.outer_count; ++o) {
        uint8_t* of_leaf = leaf + plan.block_start(moves[j].block) + o * plan.outer_leaf_stride;
        uint8_t* of_record = moves[j].record + o * plan.outer_page_stride;
        std::memcpy(to_leaf ? of_leaf : of_record, to_leaf ? of_record : of_leaf,
                    static_cast<size_t>(plan.run_bytes));
      }
    }
  });
}

// Random blocks of a leaf of `num_heads` by blocks by runs, to and from random records.
void Report(int64_t run_bytes, int64_t num_heads, uint8_t* leaf, uint8_t* pool) {
  const int64_t page_bytes = run_bytes * num_heads;
  const int64_t num_blocks = kLeafBytes / page_bytes;
  const PagePlan plan = {0,         num_blocks, run_bytes, run_bytes, 0, 0, num_heads, num_blocks * run_bytes,
                         run_bytes, 1,          0,         0,         1, 0};
  std::vector<int64_t> blocks(static_cast<size_t>(num_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::vector<int64_t> records = blocks;
  std::mt19937_64 rng(0);
  std::shuffle(blocks.begin(), blocks.end(), rng);
  std::shuffle(records.begin(), records.end(), rng);
  std::vector<BlockMove> moves;
  for (int64_t j = 0; j < kMovedBytes / page_bytes; ++j) {
    moves.push_back({blocks[j], pool + records[j] * page_bytes});
  }
  const PageCopier copier({plan}, {leaf}, {page_bytes, page_bytes});
  const auto rates =
      MedianGbPerS({[&] { CopyContiguous(pool, leaf); }, [&] { CopyPageByPage(plan, leaf, moves, false); },
                    [&] { copier.Gather(moves); }, [&] { CopyContiguous(leaf, pool); },
                    [&] { CopyPageByPage(plan, leaf, moves, true); }, [&] { copier.Scatter(moves); }});
  std::printf("%8ld x %3ld", static_cast<long>(run_bytes), static_cast<long>(num_heads));
  for (size_t i = 0; i < rates.size(); i += 3) {
    std::printf("   roof %4.1f memcpy %4.1f copier %4.1f (%.2f of the roof, %.2f times memcpy)", rates[i],
                rates[i + 1], rates[i + 2], rates[i + 2] / rates[i], rates[i + 2] / rates[i + 1]);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace

int main() {
  std::printf("%s, %d threads; run bytes x runs of a page; offload, then restore\n",
              jaxkv::ActiveCopyLoop().name, ThreadPool::Global().num_threads());
  const jaxkv::Arena pool(kLeafBytes);
  const jaxkv::Arena huge(kLeafBytes);
  // As malloc hands it out.
  void* small =
      mmap(nullptr, kLeafBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (small == MAP_FAILED) return 1;
  const std::pair<const char*, uint8_t*> leaves[] = {{"small", static_cast<uint8_t*>(small)},
                                                     {"huge", huge.data()}};
  for (const auto& [name, leaf] : leaves) {
    std::printf("leaf on %s pages of memory\n", name);
    for (int64_t page : {4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20}) Report(page, 1, leaf, pool.data());
    for (int64_t run : {4096, 512, 256, 128, 64}) Report(run, 8, leaf, pool.data());
  }
}
