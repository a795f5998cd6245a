#include "cuda/page_moves.h"

namespace jaxkv::cuda {
namespace {

constexpr int32_t kWarp = 32;
constexpr int64_t kVectorBytes = 16;
// Short runs a lane copies one after another in a unit, so that finding the unit does not cost more than it.
constexpr int32_t kRunsPerLane = 4;

// Lanes that copy a run together: one for each of its vectors, in a power of two.
int32_t RunLanes(int64_t run_bytes) {
  int32_t lanes = 1;
  while (lanes < kWarp && lanes * kVectorBytes < run_bytes) lanes *= 2;
  return lanes;
}

KernelPlan ShareOut(const PagePlan& plan, uint8_t* leaf, int64_t first_unit) {
  const int32_t run_lanes = RunLanes(plan.run_bytes);
  const auto pieces = static_cast<int32_t>((plan.run_bytes + kPieceBytes - 1) / kPieceBytes);
  const int32_t runs_per_unit = run_lanes == kWarp ? 1 : kRunsPerLane * kWarp / run_lanes;
  return {plan, leaf, first_unit, pieces, runs_per_unit, run_lanes};
}

int64_t UnitsOfPage(const KernelPlan& plan) {
  const int64_t num_runs = plan.plan.outer_count * plan.plan.inner_count;
  return (num_runs + plan.runs_per_unit - 1) / plan.runs_per_unit * plan.pieces_per_run;
}

}  // namespace

int64_t PageSet::block_bytes() const {
  int64_t total = 0;
  for (const PagePlan& plan : plans) total += plan.page_bytes();
  return total;
}

// Pages of one record share no byte.
bool PageSet::fills_records() const {
  for (const PagePlan& plan : plans) {
    const int64_t last_run =
        (plan.outer_count - 1) * plan.outer_page_stride + (plan.inner_count - 1) * plan.inner_page_stride;
    if (plan.record_offset + last_run + plan.run_bytes > clear_from) return false;
  }
  return block_bytes() == clear_from;
}

std::vector<MoveArgs> CutMove(const PageSet& pages, const EntryList& entries, bool clears_skipped) {
  std::vector<MoveArgs> launches;
  for (size_t i = 0; i < pages.plans.size(); ++i) {
    if (i % kMostPlans == 0) {
      launches.emplace_back();
      launches.back().entries = entries;
      launches.back().clear_from = pages.clear_from;
      launches.back().clears = i == 0;
      launches.back().clears_skipped = clears_skipped;
    }
    MoveArgs& args = launches.back();
    const PagePlan& plan = pages.plans[i];
    KernelPlan& shared = args.plans[args.num_plans++];
    shared = ShareOut(plan, pages.leaf_data[static_cast<size_t>(plan.leaf)], args.units_per_entry);
    args.units_per_entry += UnitsOfPage(shared);
  }
  return launches;
}

int64_t NumUnits(const MoveArgs& args) { return args.units_per_entry * args.entries.num_entries; }

}  // namespace jaxkv::cuda
