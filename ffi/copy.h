// Copies pages between cache leaves and block records: which runs of bytes, and which thread copies them.
// Knows raw pointers and strides, neither XLA nor Python.
#ifndef JAXKV_COPY_H_
#define JAXKV_COPY_H_

#include <cstdint>
#include <vector>

#include "copy_loops.h"

namespace jaxkv {

// Mirror of jaxkv.page_plan.PagePlan, with the position of its leaf first. With n = num_blocks / num_rows
// blocks to a row, block b begins at leaf byte
//   leaf_offset + (b / n) * row_stride + (b % n) * block_stride.
// From there run (o, i) starts at o * outer_leaf_stride + i * inner_leaf_stride, and in the record at
//   record_offset + o * outer_page_stride + i * inner_page_stride.
struct PagePlan {
  int64_t leaf;
  int64_t num_blocks;
  int64_t block_stride;
  int64_t run_bytes;
  int64_t leaf_offset;
  int64_t record_offset;
  int64_t outer_count;
  int64_t outer_leaf_stride;
  int64_t outer_page_stride;
  int64_t inner_count;
  int64_t inner_leaf_stride;
  int64_t inner_page_stride;
  int64_t num_rows;
  int64_t row_stride;

  constexpr int64_t page_bytes() const { return outer_count * inner_count * run_bytes; }

  constexpr int64_t block_start(int64_t block) const {
    if (num_rows == 1) return leaf_offset + block * block_stride;
    const int64_t blocks_per_row = num_blocks / num_rows;
    return leaf_offset + block / blocks_per_row * row_stride + block % blocks_per_row * block_stride;
  }
};

constexpr int kPagePlanFields = 14;
static_assert(sizeof(PagePlan) == kPagePlanFields * sizeof(int64_t), "plans travel as rows of int64");

// Records begin at multiples of this, so that 32-bit addresses reach 1 TiB.
constexpr int64_t kAddressUnitBytes = 512;

// One block and the record that holds, or will hold, its pages.
struct BlockMove {
  int64_t block;
  uint8_t* record;
};

// Whether every block of `plan` lies inside `leaf_bytes`, apart from the next one, and its page inside
// `record_bytes`. Safe for any values.
bool FitsInside(const PagePlan& plan, int64_t leaf_bytes, int64_t record_bytes);

// Blocks that every one of `plans` has; there is at least one plan.
int64_t NumBlocks(const std::vector<PagePlan>& plans);

// What of a record a copier may write: plans stay below num_bytes, and gathering clears all from clear_from
// on.
struct RecordExtent {
  int64_t num_bytes;
  int64_t clear_from;
};

// A checked set of plans, ready to copy. `leaf_data[plan.leaf]` is the first byte of a leaf.
class PageCopier {
 public:
  PageCopier(std::vector<PagePlan> plans, std::vector<uint8_t*> leaf_data, RecordExtent record,
             const CopyLoop& loop = ActiveCopyLoop());

  // Leaves to records. Several copiers may fill one record at the same time, where their plans share no byte.
  void Gather(const std::vector<BlockMove>& moves) const;

  // Records to leaves. No block may be named twice.
  void Scatter(const std::vector<BlockMove>& moves) const;

 private:
  class Pieces;
  enum class Direction { kToRecords, kToLeaves };

  void Move(const std::vector<BlockMove>& moves, Direction direction) const;
  void MovePortion(Pieces pieces, int64_t end, Direction direction, Stores stores) const;

  const std::vector<PagePlan> plans_;
  const std::vector<uint8_t*> leaf_data_;
  const RecordExtent record_;
  const CopyLoop& loop_;
  int64_t moved_bytes_ = 0;  // bytes the plans of one record move
};

}  // namespace jaxkv

#endif  // JAXKV_COPY_H_
