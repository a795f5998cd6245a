#include "op_arguments.h"

#include <algorithm>
#include <cstring>

namespace jaxkv {
namespace {

namespace ffi = ::xla::ffi;

// FFI counts an element of less than a byte as a whole byte, while buffers hold them packed.
int64_t BitWidth(ffi::DataType type) {
  switch (type) {
    case ffi::S1:
    case ffi::U1:
      return 1;
    case ffi::S2:
    case ffi::U2:
      return 2;
    case ffi::S4:
    case ffi::U4:
    case ffi::F4E2M1FN:
      return 4;
    default: {
      // Types these headers do not know yet, of six bits, take a byte each.
      const auto num_bytes = static_cast<int64_t>(ffi::ByteWidth(type));
      return 8 * std::max<int64_t>(num_bytes, 1);
    }
  }
}

}  // namespace

int64_t NumBytes(const ffi::AnyBuffer& buffer) {
  return (BitWidth(buffer.element_type()) * static_cast<int64_t>(buffer.element_count()) + 7) / 8;
}

std::optional<Leaves> ReadLeaves(const ffi::RemainingArgs& args) {
  Leaves leaves;
  for (size_t i = 0; i < args.size(); ++i) {
    auto leaf = args.get<ffi::AnyBuffer>(i);
    if (!leaf.has_value()) return std::nullopt;
    leaves.data.push_back(static_cast<uint8_t*>(leaf->untyped_data()));
    leaves.num_bytes.push_back(NumBytes(*leaf));
  }
  return leaves;
}

std::optional<std::vector<PagePlan>> ParsePlans(const Geometry& geometry, const Leaves& leaves) {
  const auto& [record_bytes, clear_from, rows] = geometry;
  if (record_bytes < 1 || rows.size() == 0 || rows.size() % kPagePlanFields != 0) return std::nullopt;
  if (clear_from < 0 || clear_from > record_bytes) return std::nullopt;
  std::vector<PagePlan> plans(rows.size() / kPagePlanFields);
  std::memcpy(plans.data(), rows.begin(), rows.size() * sizeof(int64_t));
  int64_t free_bytes = record_bytes;
  for (const PagePlan& plan : plans) {
    if (plan.leaf < 0 || static_cast<size_t>(plan.leaf) >= leaves.data.size()) return std::nullopt;
    if (!FitsInside(plan, leaves.num_bytes[static_cast<size_t>(plan.leaf)], record_bytes))
      return std::nullopt;
    if (plan.page_bytes() > free_bytes) return std::nullopt;  // Pages of one record share no byte.
    free_bytes -= plan.page_bytes();
  }
  return plans;
}

}  // namespace jaxkv
