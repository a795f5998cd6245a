#include "cuda/record_copies.h"

#include <algorithm>

namespace jaxkv::cuda {
namespace {

// Copies of a record that are still worth giving to the copy engines one by one.
constexpr int64_t kMostRanges = 64;

struct Range {
  int64_t begin;
  int64_t num_bytes;
};

// The bytes of a record that `plans` cover, in order; nothing where they are too scattered.
std::vector<Range> RecordRanges(const std::vector<PagePlan>& plans) {
  int64_t num_runs = 0;
  for (const PagePlan& plan : plans) num_runs += plan.outer_count * plan.inner_count;
  if (num_runs > kMostRanges) return {};
  std::vector<Range> ranges;
  for (const PagePlan& plan : plans) {
    for (int64_t o = 0; o < plan.outer_count; ++o) {
      for (int64_t i = 0; i < plan.inner_count; ++i) {
        const int64_t begin = plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride;
        ranges.push_back({begin, plan.run_bytes});
      }
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](Range a, Range b) { return a.begin < b.begin; });
  return ranges;
}

// Adds a copy, or makes the last one longer where this one follows it on both sides.
void Append(std::vector<HostCopy>& copies, const HostCopy& copy) {
  if (!copies.empty()) {
    HostCopy& last = copies.back();
    if (last.host + last.num_bytes == copy.host && last.device + last.num_bytes == copy.device) {
      last.num_bytes += copy.num_bytes;
      return;
    }
  }
  copies.push_back(copy);
}

}  // namespace

PagePlan WholeRecord(int64_t num_records, int64_t record_bytes) {
  PagePlan plan = {};
  plan.num_blocks = num_records;
  plan.block_stride = record_bytes;
  plan.run_bytes = record_bytes;
  plan.outer_count = plan.inner_count = plan.num_rows = 1;
  return plan;
}

std::vector<PagePlan> RecordPlans(const PageSet& pages, int64_t num_records) {
  if (pages.fills_records()) return {WholeRecord(num_records, pages.record_bytes)};
  std::vector<PagePlan> plans;
  for (PagePlan plan : pages.plans) {
    plan.leaf = 0;
    plan.num_blocks = num_records;
    plan.block_stride = pages.record_bytes;
    plan.leaf_offset = plan.record_offset;
    plan.outer_leaf_stride = plan.outer_page_stride;
    plan.inner_leaf_stride = plan.inner_page_stride;
    plan.num_rows = 1;
    plan.row_stride = 0;
    plans.push_back(plan);
  }
  if (pages.clear_from < pages.record_bytes) {
    PagePlan padding = WholeRecord(num_records, pages.record_bytes);
    padding.leaf_offset = padding.record_offset = pages.clear_from;
    padding.run_bytes = pages.record_bytes - pages.clear_from;
    plans.push_back(padding);
  }
  return plans;
}

std::vector<HostCopy> ListCopies(const BlockMove* moves, size_t count, uint8_t* staged,
                                 const RecordCopy& record) {
  const auto ranges = RecordRanges(record.plans);
  std::vector<HostCopy> copies;
  for (size_t k = 0; k < count && !ranges.empty(); ++k) {
    uint8_t* from = staged + static_cast<int64_t>(k) * record.record_bytes;
    for (const Range& range : ranges) {
      Append(copies, {moves[k].record + range.begin, from + range.begin, range.num_bytes});
    }
  }
  return copies;
}

bool AreLong(const std::vector<HostCopy>& copies, int64_t least_bytes) {
  int64_t total = 0;
  for (const HostCopy& copy : copies) total += copy.num_bytes;
  return !copies.empty() && total / static_cast<int64_t>(copies.size()) >= least_bytes;
}

}  // namespace jaxkv::cuda
