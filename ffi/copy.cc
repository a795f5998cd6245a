#include "copy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "thread_pool.h"

namespace jaxkv {
namespace {

// Below this a hand-off to other threads costs more than it saves: 30 us until one has started, measured on
// two CPUs under KVM, where 1 MiB takes one thread 50 to 75 us and two threads 60 to 75.
constexpr int64_t kInlineBytes = 1 << 20;
// Threads take portions of this size, of more where there is much to copy: the last ones then end together.
constexpr int64_t kPortionBytes = 128 << 10;
constexpr int64_t kMostPortionBytes = 1 << 20;
constexpr int64_t kPortionsPerThread = 16;
// Runs are cut to this length.
constexpr int64_t kPieceBytes = 64 << 10;
// Runs given to the copy loop at a time.
constexpr int64_t kBatchRuns = 96;
// What a restore writes is read next. Through the caches, writing is slower and reading faster; measured on a
// Zen 4 with L2 caches of 1 MiB, both together gain below this and lose above it.
constexpr int64_t kCachedBytes = 1 << 20;

struct Piece {
  uint8_t* leaf;
  uint8_t* record;
  int64_t num_bytes;
};

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

int64_t NumBlocks(const std::vector<PagePlan>& plans) {
  int64_t least = plans[0].num_blocks;
  for (const PagePlan& plan : plans) least = std::min(least, plan.num_blocks);
  return least;
}

PageCopier::PageCopier(std::vector<PagePlan> plans, std::vector<uint8_t*> leaf_data, RecordExtent record,
                       const CopyLoop& loop)
    : plans_(std::move(plans)), leaf_data_(std::move(leaf_data)), record_(record), loop_(loop) {
  for (const PagePlan& plan : plans_) moved_bytes_ += plan.page_bytes();
}

// The runs of all moves in order, their bytes numbered from 0: record after record, plan after plan. Runs
// longer than kPieceBytes come in pieces, so that several threads and streams share one.
class PageCopier::Pieces {
 public:
  // Stands before the first piece that begins at byte `begin` or behind it.
  Pieces(const PageCopier& copier, const std::vector<BlockMove>& moves, int64_t begin)
      : copier_(copier),
        plan_(copier.plans_.data()),
        move_(moves.data() + begin / copier.moved_bytes_),
        last_move_(moves.data() + moves.size()),
        position_(begin) {
    int64_t rest = begin % copier.moved_bytes_;
    for (; rest >= plan_->page_bytes(); ++plan_) rest -= plan_->page_bytes();
    outer_ = rest / plan_->run_bytes / plan_->inner_count;
    inner_ = rest / plan_->run_bytes % plan_->inner_count;
    in_run_ = rest % plan_->run_bytes;
    BeginPage();
    const int64_t into_piece = in_run_ % kPieceBytes;
    if (into_piece > 0) Skip(kPieceBytes - into_piece);
  }

  // The number of the byte that comes next.
  int64_t position() const { return position_; }

  // The piece that comes next, of which there must be one.
  Piece Take() {
    const int64_t num_bytes = std::min(kPieceBytes, plan_->run_bytes - in_run_);
    const Piece piece = {
        leaf_ + outer_ * plan_->outer_leaf_stride + inner_ * plan_->inner_leaf_stride + in_run_,
        record_ + outer_ * plan_->outer_page_stride + inner_ * plan_->inner_page_stride + in_run_, num_bytes};
    Skip(num_bytes);
    return piece;
  }

 private:
  // Goes on by num_bytes, or to the next run where that is nearer.
  void Skip(int64_t num_bytes) {
    num_bytes = std::min(num_bytes, plan_->run_bytes - in_run_);
    position_ += num_bytes;
    in_run_ += num_bytes;
    if (in_run_ < plan_->run_bytes) return;
    in_run_ = 0;
    if (++inner_ < plan_->inner_count) return;
    inner_ = 0;
    if (++outer_ < plan_->outer_count) return;
    outer_ = 0;
    if (++plan_ == copier_.plans_.data() + copier_.plans_.size()) {
      plan_ = copier_.plans_.data();
      ++move_;
    }
    if (move_ != last_move_) BeginPage();
  }

  void BeginPage() {
    leaf_ = copier_.leaf_data_[static_cast<size_t>(plan_->leaf)] + plan_->block_start(move_->block);
    record_ = move_->record + plan_->record_offset;
  }

  const PageCopier& copier_;
  const PagePlan* plan_;
  const BlockMove* move_;
  const BlockMove* const last_move_;
  uint8_t* leaf_;
  uint8_t* record_;
  int64_t outer_;
  int64_t inner_;
  int64_t in_run_;
  int64_t position_;
};

// Copies the pieces that begin before byte `end`.
void PageCopier::MovePortion(Pieces pieces, int64_t end, Direction direction, Stores stores) const {
  Run runs[kBatchRuns];
  while (pieces.position() < end) {
    int64_t count = 0;
    for (; count < kBatchRuns && pieces.position() < end; ++count) {
      const Piece piece = pieces.Take();
      runs[count] = direction == Direction::kToRecords ? Run{piece.record, piece.leaf, piece.num_bytes}
                                                       : Run{piece.leaf, piece.record, piece.num_bytes};
    }
    loop_.copy(runs, count, stores);
  }
}

void PageCopier::Move(const std::vector<BlockMove>& moves, Direction direction) const {
  const int64_t total = moved_bytes_ * static_cast<int64_t>(moves.size());
  if (total == 0) return;
  const Stores stores =
      direction == Direction::kToLeaves && total < kCachedBytes ? Stores::kCached : Stores::kStreaming;
  if (total < kInlineBytes) return MovePortion(Pieces(*this, moves, 0), total, direction, stores);
  ThreadPool& threads = ThreadPool::Global();
  const int64_t portion =
      std::clamp(total / (threads.num_threads() * kPortionsPerThread), kPortionBytes, kMostPortionBytes);
  threads.ParallelFor((total + portion - 1) / portion, [&](int64_t i) {
    MovePortion(Pieces(*this, moves, i * portion), std::min(total, (i + 1) * portion), direction, stores);
  });
}

void PageCopier::Gather(const std::vector<BlockMove>& moves) const {
  const auto padding = static_cast<size_t>(record_.num_bytes - record_.clear_from);
  if (padding > 0) {
    for (const BlockMove& move : moves) std::memset(move.record + record_.clear_from, 0, padding);
  }
  Move(moves, Direction::kToRecords);
}

void PageCopier::Scatter(const std::vector<BlockMove>& moves) const { Move(moves, Direction::kToLeaves); }

}  // namespace jaxkv
