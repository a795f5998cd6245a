#include "transfer_model.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace jaxkv::cuda {
namespace {

// Visits the runs of a page: where each begins in the leaf and in the record.
template <typename Visit>
void ForEachRun(const PagePlan& plan, int64_t block, const Visit& visit) {
  const int64_t blocks_per_row = plan.num_blocks / plan.num_rows;
  const int64_t page = plan.leaf_offset + block / blocks_per_row * plan.row_stride +
                       block % blocks_per_row * plan.block_stride;
  for (int64_t o = 0; o < plan.outer_count; ++o) {
    for (int64_t i = 0; i < plan.inner_count; ++i) {
      visit(page + o * plan.outer_leaf_stride + i * plan.inner_leaf_stride,
            plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride);
    }
  }
}

// Lays out loops of these counts one inside the other, in any order. Returns their strides and adds to `end`.
std::array<int64_t, 4> DrawStrides(Rng& rng, const std::array<int64_t, 4>& counts, int64_t run_bytes,
                                   int64_t& end) {
  std::array<size_t, 4> order = {0, 1, 2, 3};
  std::shuffle(order.begin(), order.end(), rng);
  std::array<int64_t, 4> strides;
  int64_t extent = run_bytes;
  for (size_t dimension : order) {
    strides[dimension] = extent + (Chance(rng, 0.2) ? Draw(rng, 0, 20) : 0);
    extent += (counts[dimension] - 1) * strides[dimension];
  }
  end += extent;
  return strides;
}

PagePlan DrawPlan(Rng& rng, const LayoutLimits& limits, int64_t num_blocks, Layout& layout, int64_t& cursor) {
  PagePlan plan = {};
  plan.leaf = Draw(rng, 0, static_cast<int64_t>(layout.leaf_bytes.size()) - 1);
  plan.num_blocks = num_blocks;
  plan.num_rows = num_blocks % 3 == 0 && Chance(rng, 0.3)   ? 3
                  : num_blocks % 2 == 0 && Chance(rng, 0.3) ? 2
                                                            : 1;
  const int64_t granule = Chance(rng, 0.5) ? 16 : Chance(rng, 0.5) ? 4 : 1;
  plan.run_bytes = granule * Draw(rng, 1, std::max<int64_t>(limits.most_run_bytes / granule, 1));
  plan.outer_count = Draw(rng, 1, limits.most_loops);
  plan.inner_count = Draw(rng, 1, limits.most_loops);
  const int64_t gap = limits.has_holes && Chance(rng, 0.5) ? granule * Draw(rng, 0, 8) : 0;
  plan.record_offset = cursor + gap;
  plan.inner_page_stride = plan.run_bytes + gap;
  plan.outer_page_stride = plan.inner_count * plan.inner_page_stride;
  cursor = plan.record_offset + plan.outer_count * plan.outer_page_stride - gap;
  int64_t& end = layout.leaf_bytes[static_cast<size_t>(plan.leaf)];
  plan.leaf_offset = end += granule * Draw(rng, 0, 3);
  const auto strides =
      DrawStrides(rng, {plan.num_rows, num_blocks / plan.num_rows, plan.outer_count, plan.inner_count},
                  plan.run_bytes, end);
  plan.row_stride = strides[0];
  plan.block_stride = strides[1];
  plan.outer_leaf_stride = strides[2];
  plan.inner_leaf_stride = strides[3];
  return plan;
}

}  // namespace

int64_t Draw(Rng& rng, int64_t first, int64_t last) {
  return first + static_cast<int64_t>(rng() % static_cast<uint64_t>(last - first + 1));
}

bool Chance(Rng& rng, double probability) {
  return static_cast<double>(rng() >> 11) < probability * static_cast<double>(uint64_t{1} << 53);
}

Bytes RandomBytes(Rng& rng, int64_t count) {
  Bytes bytes(static_cast<size_t>(count + 7));
  for (size_t i = 0; i + 8 <= bytes.size(); i += 8) {
    const uint64_t word = rng();
    std::memcpy(&bytes[i], &word, 8);
  }
  bytes.resize(static_cast<size_t>(count));
  return bytes;
}

int64_t Layout::num_blocks() const {
  int64_t least = plans[0].num_blocks;
  for (const PagePlan& plan : plans) least = std::min(least, plan.num_blocks);
  return least;
}

Layout DrawLayout(Rng& rng, const LayoutLimits& limits) {
  Layout layout;
  layout.leaf_bytes.resize(static_cast<size_t>(Draw(rng, 1, limits.most_leaves)));
  const int64_t num_plans = Draw(rng, 1, limits.most_plans);
  const int64_t num_blocks = Draw(rng, limits.least_blocks, limits.most_blocks);
  int64_t cursor = 0;
  for (int64_t p = 0; p < num_plans; ++p) {
    layout.plans.push_back(DrawPlan(rng, limits, num_blocks, layout, cursor));
  }
  for (int64_t& bytes : layout.leaf_bytes) bytes += Draw(rng, 1, 30);
  layout.record_bytes = (cursor + limits.unit_bytes - 1) / limits.unit_bytes * limits.unit_bytes;
  if (Chance(rng, 0.1)) layout.record_bytes += limits.unit_bytes;
  layout.clear_from = limits.has_holes && Chance(rng, 0.5) ? layout.record_bytes : cursor;
  return layout;
}

void Known::Set(int64_t at, const Bytes& values) {
  std::copy(values.begin(), values.end(), bytes.begin() + at);
  std::fill_n(is_unknown.begin() + at, values.size(), false);
}

void Known::Copy(int64_t at, const Known& from, int64_t from_at, int64_t count) {
  std::copy_n(from.bytes.begin() + from_at, count, bytes.begin() + at);
  std::copy_n(from.is_unknown.begin() + from_at, count, is_unknown.begin() + at);
}

void Known::Clear(int64_t at, int64_t count) {
  std::fill_n(bytes.begin() + at, count, uint8_t{0});
  std::fill_n(is_unknown.begin() + at, count, false);
}

void Known::Forget(int64_t at, int64_t count) { std::fill_n(is_unknown.begin() + at, count, true); }

bool Known::Matches(const uint8_t* found) const {
  if (std::memcmp(found, bytes.data(), bytes.size()) == 0) return true;
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (found[i] != bytes[i] && !is_unknown[i]) return false;
  }
  return true;
}

void ModelOffload(const Layout& layout, const std::vector<Known>& leaves, int64_t block, Known& records,
                  int64_t at) {
  records.Clear(at + layout.clear_from, layout.record_bytes - layout.clear_from);
  for (const PagePlan& plan : layout.plans) {
    ForEachRun(plan, block, [&](int64_t in_leaf, int64_t in_record) {
      records.Copy(at + in_record, leaves[static_cast<size_t>(plan.leaf)], in_leaf, plan.run_bytes);
    });
  }
}

void ModelRestore(const Layout& layout, std::vector<Known>& leaves, int64_t block, const Known& records,
                  int64_t at) {
  for (const PagePlan& plan : layout.plans) {
    ForEachRun(plan, block, [&](int64_t in_leaf, int64_t in_record) {
      leaves[static_cast<size_t>(plan.leaf)].Copy(in_leaf, records, at + in_record, plan.run_bytes);
    });
  }
}

void ForgetOffload(const Layout& layout, Known& records, int64_t at) {
  records.Forget(at + layout.clear_from, layout.record_bytes - layout.clear_from);
  for (const PagePlan& plan : layout.plans) {
    ForEachRun(plan, 0, [&](int64_t, int64_t in_record) { records.Forget(at + in_record, plan.run_bytes); });
  }
}

void ForgetRestore(const Layout& layout, std::vector<Known>& leaves, int64_t block) {
  for (const PagePlan& plan : layout.plans) {
    ForEachRun(plan, block, [&](int64_t in_leaf, int64_t) {
      leaves[static_cast<size_t>(plan.leaf)].Forget(in_leaf, plan.run_bytes);
    });
  }
}

}  // namespace jaxkv::cuda
