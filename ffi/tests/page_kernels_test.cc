// The bodies of the kernels that move pages, on the host, by grids of several sizes, against loops over the
// same plans. Run it under the sanitizers.
#include "cuda/page_kernels.h"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/page_moves.h"
#include "transfer_bench.h"

namespace jaxkv::cuda {
namespace {

struct Grid {
  int32_t num_groups;
  int32_t num_lanes;
};

// 1, 32 and 256 threads, and some in between.
constexpr Grid kGrids[] = {{1, 1}, {5, 1}, {1, 32}, {8, 32}, {3, 7}, {256, 1}};

// Memory with a guard before and after it, at any distance from an aligned address.
class Guarded {
 public:
  Guarded(Rng& rng, Bytes values) : size_(values.size()), skew_(static_cast<size_t>(Draw(rng, 0, 31))) {
    bytes_.resize(size_ + 2 * kGuard + skew_, kMark);
    std::copy(values.begin(), values.end(), bytes_.begin() + static_cast<std::ptrdiff_t>(kGuard + skew_));
  }

  uint8_t* data() { return bytes_.data() + kGuard + skew_; }
  bool guards_hold() const {
    const auto is_mark = [](uint8_t byte) { return byte == kMark; };
    const auto begin = bytes_.begin();
    const auto end = begin + static_cast<std::ptrdiff_t>(kGuard + skew_);
    return std::all_of(begin, end, is_mark) &&
           std::all_of(end + static_cast<std::ptrdiff_t>(size_), bytes_.end(), is_mark);
  }

 private:
  static constexpr size_t kGuard = 64;
  static constexpr uint8_t kMark = 0xa7;
  const size_t size_;
  const size_t skew_;
  std::vector<uint8_t> bytes_;
};

template <typename Body>
void RunGrid(Grid grid, Rng& rng, const Body& body) {
  std::vector<Lane> lanes;
  for (int32_t group = 0; group < grid.num_groups; ++group) {
    for (int32_t lane = 0; lane < grid.num_lanes; ++lane) {
      lanes.push_back({group, grid.num_groups, lane, grid.num_lanes});
    }
  }
  std::shuffle(lanes.begin(), lanes.end(), rng);
  for (const Lane& lane : lanes) body(lane);
}

// -- entries, judged by a model -----------------------------------------------------------------------------

struct Entries {
  std::vector<int32_t> ids;
  std::vector<int32_t> addresses;  // empty: records stand one after another
  std::vector<int32_t> refused;    // empty: nothing was marked
  int32_t token;
  int32_t generation;
  bool has_token;
  StatusEntry refusal;
  int32_t num_blocks;
  int64_t area_bytes;
  int64_t record_bytes;

  EntryList list(uint8_t* area) const {
    return {ids.data(),
            addresses.empty() ? nullptr : addresses.data(),
            refused.empty() ? nullptr : refused.data(),
            has_token ? &token : nullptr,
            generation,
            refusal,
            static_cast<int32_t>(ids.size()),
            num_blocks,
            area,
            area_bytes,
            record_bytes};
  }

  // Where the record of entry j begins in the area; -1 where that is not inside.
  int64_t At(size_t j) const {
    const int64_t at =
        addresses.empty() ? static_cast<int64_t>(j) * record_bytes : int64_t{512} * addresses[j];
    return at < 0 || at + record_bytes > area_bytes ? -1 : at;
  }

  // -1 where the entry asks for nothing.
  int Fate(size_t j) const {
    if (ids[j] == -1) return -1;
    if (refusal != kMoved) return refusal;
    if (has_token && token != generation) return kNoPool;
    if (ids[j] < 0 || ids[j] >= num_blocks) return kBadBlock;
    if (At(j) < 0) return kBadAddress;
    return !refused.empty() && refused[j] != 0 ? kRepeated : kMoved;
  }
};

// Entries of all fates; those that move have records of their own, and blocks of their own unless `repeats`.
Entries DrawEntries(Rng& rng, int32_t num_blocks, int64_t record_bytes, bool has_addresses, bool repeats) {
  Entries entries = {};
  const int64_t count = Draw(rng, 1, 14);
  std::vector<int32_t> places(20);
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), rng);
  std::vector<int32_t> blocks(static_cast<size_t>(num_blocks));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), rng);
  for (int64_t j = 0; j < count; ++j) {
    const int32_t bad[] = {-1, -1, -2, num_blocks, INT32_MAX, INT32_MIN};
    const bool is_bad = Chance(rng, 0.3) || (blocks.empty() && !repeats);
    if (is_bad) {
      entries.ids.push_back(bad[Draw(rng, 0, 5)]);
    } else if (repeats) {
      entries.ids.push_back(static_cast<int32_t>(Draw(rng, 0, num_blocks - 1)));
    } else {
      entries.ids.push_back(blocks.back());
      blocks.pop_back();
    }
    const auto units = static_cast<int32_t>((record_bytes + 511) / 512);
    const int32_t bad_places[] = {-1, 20 * units, INT32_MAX, INT32_MIN};
    const int32_t place =
        Chance(rng, 0.1) ? bad_places[Draw(rng, 0, 3)] : places[static_cast<size_t>(j)] * units;
    if (has_addresses) entries.addresses.push_back(place);
    if (Chance(rng, 0.5)) entries.refused.resize(static_cast<size_t>(count));
  }
  for (int32_t& refused : entries.refused) refused = Chance(rng, 0.2) ? 1 : 0;
  entries.area_bytes = has_addresses ? 20 * ((record_bytes + 511) / 512 * 512) : count * record_bytes;
  if (Chance(rng, 0.2)) entries.area_bytes -= 1;  // the last record does not fit
  entries.refusal = Chance(rng, 0.1) ? kNotPinned : kMoved;
  entries.has_token = Chance(rng, 0.3);
  entries.generation = static_cast<int32_t>(Draw(rng, 1, 100));
  entries.token = Chance(rng, 0.8) ? entries.generation : entries.generation - 1;
  entries.num_blocks = num_blocks;
  entries.record_bytes = record_bytes;
  return entries;
}

// -- moves --------------------------------------------------------------------------------------------------

template <Direction kDirection>
void Launch(const PageSet& pages, const EntryList& entries, bool clears_skipped, Rng& rng) {
  const Grid grid = kGrids[Draw(rng, 0, 5)];
  for (const MoveArgs& args : CutMove(pages, entries, clears_skipped)) {
    RunGrid(grid, rng, [&](Lane at) { MovePages<kDirection>(args, at); });
  }
}

// As a program marks blocks that are named more than once, before it moves them.
void Mark(Entries& entries, Rng& rng) {
  entries.refused.clear();
  std::vector<int32_t> repeats(entries.ids.size(), 0);
  uint8_t area = 0;
  RunGrid(kGrids[Draw(rng, 0, 5)], rng,
          [&](Lane at) { MarkRepeats(entries.list(&area), repeats.data(), at); });
  entries.refused = repeats;
}

void CheckMove(Rng& rng, const LayoutLimits& limits, Direction direction) {
  const Layout layout = DrawLayout(rng, limits);
  const bool has_addresses = limits.unit_bytes == 512 && Chance(rng, 0.7);
  const bool marks = Chance(rng, 0.5);
  Entries entries = DrawEntries(rng, static_cast<int32_t>(layout.num_blocks()), layout.record_bytes,
                                has_addresses, marks || direction == Direction::kToRecords);
  if (marks) Mark(entries, rng);
  std::vector<Known> leaves;
  std::vector<Guarded> leaf_memory;
  PageSet pages = {layout.plans, {}, layout.record_bytes, layout.clear_from};
  for (int64_t num_bytes : layout.leaf_bytes) {
    leaves.emplace_back(RandomBytes(rng, num_bytes));
    leaf_memory.emplace_back(rng, leaves.back().bytes);
  }
  for (Guarded& leaf : leaf_memory) pages.leaf_data.push_back(leaf.data());
  Known records(RandomBytes(rng, std::max<int64_t>(entries.area_bytes, 1)));
  Guarded area(rng, records.bytes);
  const bool clears_skipped = Chance(rng, 0.5);
  const bool to_records = direction == Direction::kToRecords;
  for (size_t j = 0; j < entries.ids.size(); ++j) {
    const int64_t at = entries.At(j);
    const bool moves = entries.Fate(j) == kMoved;
    if (!moves && clears_skipped && to_records && at >= 0) records.Clear(at, layout.record_bytes);
    if (moves && to_records) ModelOffload(layout, leaves, entries.ids[j], records, at);
    if (moves && !to_records) ModelRestore(layout, leaves, entries.ids[j], records, at);
  }
  if (to_records) Launch<Direction::kToRecords>(pages, entries.list(area.data()), clears_skipped, rng);
  if (!to_records) Launch<Direction::kToLeaves>(pages, entries.list(area.data()), clears_skipped, rng);
  Check(records.Matches(area.data()) && area.guards_hold(), "records hold what was moved to them");
  for (size_t i = 0; i < leaves.size(); ++i) {
    Check(leaves[i].Matches(leaf_memory[i].data()), "leaves hold what was moved to them");
    Check(leaf_memory[i].guards_hold(), "nothing is written beside a leaf");
  }
}

// Runs of every size about the sizes of vectors and pieces, at every misalignment.
void CheckRuns(Rng& rng) {
  for (int64_t run_bytes :
       {1,   2,   3,   4,   5,    7,    8,    15,   16,   17,   31,   33,   63,   64,   65,
        255, 511, 512, 513, 1023, 2048, 4095, 4096, 4097, 4999, 5000, 8192, 8193, 12289}) {
    for (int64_t skew = 0; skew < 17; ++skew) {
      Layout layout;
      layout.plans = {{0, 3, run_bytes + 5, run_bytes, skew, 3 * skew % 16, 1, 0, 0, 1, 0, 0, 1, 0}};
      layout.record_bytes = run_bytes + 100;
      layout.clear_from = run_bytes + 16 + skew;
      const std::vector<int32_t> ids = {2, 0};
      std::vector<Known> leaves = {Known(RandomBytes(rng, 4 * run_bytes + 40))};
      Known records(RandomBytes(rng, 2 * layout.record_bytes));
      Guarded leaf(rng, leaves[0].bytes);
      Guarded area(rng, records.bytes);
      const PageSet pages = {layout.plans, {leaf.data()}, layout.record_bytes, layout.clear_from};
      Entries entries = {};
      entries.ids = ids;
      entries.num_blocks = 3;
      entries.record_bytes = layout.record_bytes;
      entries.area_bytes = 2 * layout.record_bytes;
      for (size_t j = 0; j < 2; ++j) {
        ModelOffload(layout, leaves, ids[j], records, static_cast<int64_t>(j) * layout.record_bytes);
      }
      Launch<Direction::kToRecords>(pages, entries.list(area.data()), false, rng);
      Check(records.Matches(area.data()) && area.guards_hold(), "runs of any size reach records");
      std::swap(entries.ids[0], entries.ids[1]);
      for (size_t j = 0; j < 2; ++j) {
        ModelRestore(layout, leaves, entries.ids[j], records, static_cast<int64_t>(j) * layout.record_bytes);
      }
      Launch<Direction::kToLeaves>(pages, entries.list(area.data()), false, rng);
      Check(leaves[0].Matches(leaf.data()) && leaf.guards_hold(), "runs of any size reach leaves");
    }
  }
}

// -- repeats and the status ---------------------------------------------------------------------------------

void CheckRepeats(Rng& rng) {
  Entries entries = DrawEntries(rng, static_cast<int32_t>(Draw(rng, 1, 5)), 512, Chance(rng, 0.5), true);
  entries.refused.clear();
  std::vector<int32_t> wanted(entries.ids.size(), 0);
  for (size_t j = 0; j < wanted.size(); ++j) {
    for (size_t k = 0; k < j; ++k) {
      const bool both_move = entries.Fate(j) == kMoved && entries.Fate(k) == kMoved;
      if (both_move && entries.ids[j] == entries.ids[k]) wanted[j] = 1;
    }
  }
  std::vector<int32_t> repeats(wanted.size() + 2, 0);
  repeats.front() = repeats.back() = 77;
  uint8_t area = 0;
  RunGrid(kGrids[Draw(rng, 0, 5)], rng,
          [&](Lane at) { MarkRepeats(entries.list(&area), repeats.data() + 1, at); });
  Check(std::equal(wanted.begin(), wanted.end(), repeats.begin() + 1), "blocks named before are marked");
  Check(repeats.front() == 77 && repeats.back() == 77, "nothing is written beside the marks");
}

void CheckTally(Rng& rng) {
  const Entries entries =
      DrawEntries(rng, static_cast<int32_t>(Draw(rng, 1, 5)), 512, Chance(rng, 0.5), true);
  std::vector<int32_t> wanted(kStatusSize, 0);
  bool any_refused = false;
  for (size_t j = 0; j < entries.ids.size(); ++j) {
    const int fate = entries.Fate(j);
    if (fate < 0) continue;
    ++wanted[static_cast<size_t>(fate)];
    if (fate != kMoved && !any_refused) wanted[kFirstRefused] = static_cast<int32_t>(j);
    any_refused = any_refused || fate != kMoved;
  }
  uint8_t area = 0;
  for (int32_t num_threads : {1, 32, 256}) {
    std::vector<int32_t> counts(kStatusSize, -1);
    std::vector<int32_t> status(kStatusSize + 2, 77);
    const EntryList list = entries.list(&area);
    for (int32_t t = num_threads; t-- > 0;) BeginTally(counts.data(), t, num_threads);
    for (int32_t t = num_threads; t-- > 0;) TallyEntries(list, counts.data(), t, num_threads);
    for (int32_t t = num_threads; t-- > 0;) EndTally(counts.data(), status.data() + 1, t, num_threads);
    Check(std::equal(wanted.begin(), wanted.end(), status.begin() + 1), "the status counts every fate");
    Check(status.front() == 77 && status.back() == 77, "nothing is written beside the status");
  }
}

constexpr LayoutLimits kLimits[] = {
    {3, 4, 100, 3, false, 12, 512, 1},  // several leaves, two loops, rows
    {2, 3, 5000, 2, false, 5, 512, 1},  // runs longer than a piece
    {2, 4, 60, 9, true, 5, 1, 1},       // holes, odd records
    {9, 200, 30, 3, false, 4, 512, 1},  // more plans than a launch takes
    {1, 1, 16, 40, false, 4, 1, 1},     // many short runs
};

}  // namespace
}  // namespace jaxkv::cuda

int main() {
  using namespace jaxkv::cuda;
  Rng rng(5);
  CheckRuns(rng);
  for (const LayoutLimits& limits : kLimits) {
    for (int i = 0; i < 60; ++i) {
      CheckMove(rng, limits, Direction::kToRecords);
      CheckMove(rng, limits, Direction::kToLeaves);
    }
  }
  for (int i = 0; i < 1000; ++i) CheckRepeats(rng);
  for (int i = 0; i < 1000; ++i) CheckTally(rng);
  std::puts("page_kernels_test: ok");
}
