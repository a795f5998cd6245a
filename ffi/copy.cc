#include "copy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "thread_pool.h"

namespace jaxkv {
namespace {

// Below this a hand-off to other threads costs more than it saves.
constexpr int64_t kInlineBytes = 256 << 10;
// Pages are handed to threads in portions of about this size.
constexpr int64_t kPortionBytes = 128 << 10;

// end += (count - 1) * stride, with every term checked.
bool Extend(int64_t count, int64_t stride, int64_t* end) {
  int64_t span;
  return count >= 1 && stride >= 0 && !__builtin_mul_overflow(count - 1, stride, &span) &&
         !__builtin_add_overflow(*end, span, end);
}

bool PageEnd(const PagePlan& plan, int64_t* end) {
  *end = plan.record_offset;
  return plan.record_offset >= 0 && plan.run_bytes >= 1 &&
         !__builtin_add_overflow(*end, plan.run_bytes, end) &&
         Extend(plan.outer_count, plan.outer_page_stride, end) &&
         Extend(plan.inner_count, plan.inner_page_stride, end);
}

// Steps shorter than a run would let two blocks share bytes.
bool StepsApart(int64_t count, int64_t stride, int64_t run_bytes) {
  return count == 1 || stride >= run_bytes;
}

bool LeafEnd(const PagePlan& plan, int64_t* end) {
  *end = plan.leaf_offset;
  return plan.leaf_offset >= 0 && plan.run_bytes >= 1 && !__builtin_add_overflow(*end, plan.run_bytes, end) &&
         plan.num_rows >= 1 && plan.num_blocks % plan.num_rows == 0 &&
         StepsApart(plan.num_rows, plan.row_stride, plan.run_bytes) &&
         StepsApart(plan.num_blocks / plan.num_rows, plan.block_stride, plan.run_bytes) &&
         Extend(plan.num_rows, plan.row_stride, end) &&
         Extend(plan.num_blocks / plan.num_rows, plan.block_stride, end) &&
         Extend(plan.outer_count, plan.outer_leaf_stride, end) &&
         Extend(plan.inner_count, plan.inner_leaf_stride, end);
}

void CopyRuns(const PagePlan& plan, uint8_t* to, int64_t to_outer, int64_t to_inner, const uint8_t* from,
              int64_t from_outer, int64_t from_inner) {
  for (int64_t o = 0; o < plan.outer_count; ++o) {
    for (int64_t i = 0; i < plan.inner_count; ++i) {
      std::memcpy(to + o * to_outer + i * to_inner, from + o * from_outer + i * from_inner,
                  static_cast<size_t>(plan.run_bytes));
    }
  }
}

}  // namespace

bool FitsInside(const PagePlan& plan, int64_t leaf_bytes, int64_t record_bytes) {
  int64_t leaf_end;
  int64_t page_end;
  int64_t page_bytes;
  return LeafEnd(plan, &leaf_end) && leaf_end <= leaf_bytes && PageEnd(plan, &page_end) &&
         page_end <= record_bytes &&
         !__builtin_mul_overflow(plan.outer_count, plan.inner_count, &page_bytes) &&
         !__builtin_mul_overflow(page_bytes, plan.run_bytes, &page_bytes) && page_bytes <= record_bytes;
}

PageCopier::PageCopier(std::vector<PagePlan> plans, std::vector<uint8_t*> leaf_data, RecordExtent record)
    : plans_(std::move(plans)), leaf_data_(std::move(leaf_data)), record_(record) {
  for (const PagePlan& plan : plans_) moved_bytes_ += plan.page_bytes();
}

// Calls copy_page(plan, leaf bytes of the block, record) for all pages: a record at a time, spread over
// threads by bytes. The unit of work is a range of pages, so that a loop over several pages at once can take
// its place.
template <typename CopyPage>
void PageCopier::ForEachPage(const std::vector<BlockMove>& moves, const CopyPage& copy_page) const {
  const int64_t num_plans = static_cast<int64_t>(plans_.size());
  const int64_t num_pages = num_plans * static_cast<int64_t>(moves.size());
  if (num_pages == 0) return;
  const int64_t page_bytes = std::max<int64_t>(moved_bytes_ / num_plans, 1);
  auto leaf_page = [&](int64_t page) {
    const PagePlan& plan = plans_[page % num_plans];
    return leaf_data_[plan.leaf] + plan.block_start(moves[page / num_plans].block);
  };
  auto copy_range = [&](int64_t begin, int64_t end) {
    for (int64_t page = begin; page < end; ++page) {
      if (page + 1 < end) __builtin_prefetch(leaf_page(page + 1));
      copy_page(plans_[page % num_plans], leaf_page(page), moves[page / num_plans].record);
    }
  };
  if (page_bytes * num_pages < kInlineBytes) return copy_range(0, num_pages);
  const int64_t portion = std::max<int64_t>(kPortionBytes / page_bytes, 1);
  ThreadPool::Global().ParallelFor((num_pages + portion - 1) / portion, [&](int64_t i) {
    copy_range(i * portion, std::min(num_pages, (i + 1) * portion));
  });
}

void PageCopier::Gather(const std::vector<BlockMove>& moves) const {
  for (const BlockMove& move : moves) {
    std::memset(move.record + record_.clear_from, 0,
                static_cast<size_t>(record_.num_bytes - record_.clear_from));
  }
  ForEachPage(moves, [](const PagePlan& plan, const uint8_t* leaf, uint8_t* record) {
    CopyRuns(plan, record + plan.record_offset, plan.outer_page_stride, plan.inner_page_stride, leaf,
             plan.outer_leaf_stride, plan.inner_leaf_stride);
  });
}

void PageCopier::Scatter(const std::vector<BlockMove>& moves) const {
  ForEachPage(moves, [](const PagePlan& plan, uint8_t* leaf, const uint8_t* record) {
    CopyRuns(plan, leaf, plan.outer_leaf_stride, plan.inner_leaf_stride, record + plan.record_offset,
             plan.outer_page_stride, plan.inner_page_stride);
  });
}

}  // namespace jaxkv
