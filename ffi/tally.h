// Which entries of a call move, which are refused, and why. Knows ids and records, no bytes.
#ifndef JAXKV_TALLY_H_
#define JAXKV_TALLY_H_

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "copy.h"
#include "status.h"

namespace jaxkv {

// What one call found out and will report.
class Tally {
 public:
  Tally(const int32_t* ids, size_t num_ids) : ids_(ids), num_ids_(num_ids) {}

  // Every usable (block, record) pair. `record_of(j)` is the place of entry j's record, or null. An op that
  // writes leaves refuses repeats: two threads would write one page.
  template <typename RecordOf>
  std::vector<BlockMove> Collect(int64_t num_blocks, bool writes_leaves, const RecordOf& record_of) {
    std::vector<BlockMove> moves(num_ids_);
    const size_t num_moves = writes_leaves
                                 ? Collect(num_blocks, record_of, OnceEach(num_blocks), moves.data())
                                 : Collect(num_blocks, record_of, [](int32_t) { return true; }, moves.data());
    moves.resize(num_moves);
    counts_[kMoved] = static_cast<int64_t>(num_moves);
    return moves;
  }

  // Nothing moves; every entry that asked for something is refused for the same reason.
  void RefuseAll(StatusEntry reason) {
    counts_.fill(0);
    any_refused_ = false;
    for (size_t j = 0; j < num_ids_; ++j) {
      if (ids_[j] != -1) Refuse(j, reason);
    }
  }

  // The first `size` entries of the status, with the time since this was made.
  void WriteTo(int32_t* status, size_t size) {
    const auto elapsed = std::chrono::steady_clock::now() - started_;
    counts_[kElapsedUs] = std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count();
    for (size_t i = 0; i < std::min<size_t>(kStatusSize, size); ++i) {
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
      status[i] = static_cast<int32_t>(std::min(counts_[i], kMost));
    }
  }

 private:
  // Says whether a block was not asked about before.
  class OnceEach {
   public:
    explicit OnceEach(int64_t num_blocks) : seen_((static_cast<size_t>(num_blocks) + 63) / 64) {}

    bool operator()(int32_t block) {
      uint64_t& word = seen_[static_cast<uint32_t>(block) / 64];
      const uint64_t before = word;
      word |= uint64_t{1} << (block % 64);
      return word != before;
    }

   private:
    std::vector<uint64_t> seen_;
  };

  // As above, to room for all of them. Takes copies, so that nothing is read again for every entry.
  template <typename RecordOf, typename IsFirst>
  size_t Collect(int64_t num_blocks, const RecordOf record_of, IsFirst is_first, BlockMove* moves) {
    const int32_t* const ids = ids_;
    const size_t num_ids = num_ids_;
    BlockMove* next = moves;
    for (size_t j = 0; j < num_ids; ++j) {
      const int32_t block = ids[j];
      if (block == -1) continue;
      uint8_t* const record = record_of(static_cast<int64_t>(j));
      if (block < 0 || block >= num_blocks) {
        Refuse(j, kBadBlock);
      } else if (record == nullptr) {
        Refuse(j, kBadAddress);
      } else if (!is_first(block)) {
        Refuse(j, kRepeated);
      } else {
        *next++ = {block, record};
      }
    }
    return static_cast<size_t>(next - moves);
  }

  void Refuse(size_t entry, StatusEntry reason) {
    ++counts_[reason];
    if (!std::exchange(any_refused_, true)) counts_[kFirstRefused] = static_cast<int64_t>(entry);
  }

  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  const int32_t* const ids_;
  const size_t num_ids_;
  std::array<int64_t, kStatusSize> counts_{};
  bool any_refused_ = false;
};

}  // namespace jaxkv

#endif  // JAXKV_TALLY_H_
