// What every op is given, read from XLA's buffers: leaves as bytes, and the copies of their pages.
#ifndef JAXKV_OP_ARGUMENTS_H_
#define JAXKV_OP_ARGUMENTS_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "copy.h"
#include "xla/ffi/api/ffi.h"

namespace jaxkv {

using IdBuffer = ::xla::ffi::BufferR1<::xla::ffi::S32>;
using IdResult = ::xla::ffi::ResultBufferR1<::xla::ffi::S32>;
using ByteBuffer = ::xla::ffi::BufferR2<::xla::ffi::U8>;
using ByteResult = ::xla::ffi::ResultBufferR2<::xla::ffi::U8>;
using PlanRows = ::xla::ffi::Span<const int64_t>;

struct Leaves {
  std::vector<uint8_t*> data;
  std::vector<int64_t> num_bytes;
};

// What the caller says of records, in bytes, and of the copies.
struct Geometry {
  int64_t record_bytes;
  int64_t clear_from;
  PlanRows plans;
};

// Bytes of a buffer as it lies in memory.
int64_t NumBytes(const ::xla::ffi::AnyBuffer& buffer);

// The leaves of an op that only reads them.
std::optional<Leaves> ReadLeaves(const ::xla::ffi::RemainingArgs& args);

// The leaves of an op that hands them on. A result is the operand's own buffer where the alias was kept;
// where it was not, `copy(to, from, num_bytes)` copies the operand, so that the op means the same.
template <typename Copy>
std::optional<Leaves> HandOnLeaves(const ::xla::ffi::RemainingArgs& args,
                                   const ::xla::ffi::RemainingRets& results, const Copy& copy) {
  if (args.size() != results.size()) return std::nullopt;
  Leaves leaves;
  for (size_t i = 0; i < args.size(); ++i) {
    auto leaf = args.get<::xla::ffi::AnyBuffer>(i);
    auto result = results.get<::xla::ffi::AnyBuffer>(i);
    if (!leaf.has_value() || !result.has_value()) return std::nullopt;
    const int64_t num_bytes = NumBytes(*leaf);
    if (NumBytes(**result) != num_bytes) return std::nullopt;
    auto* data = static_cast<uint8_t*>((*result)->untyped_data());
    const auto* from = static_cast<const uint8_t*>(leaf->untyped_data());
    if (data != from) copy(data, from, num_bytes);
    leaves.data.push_back(data);
    leaves.num_bytes.push_back(num_bytes);
  }
  return leaves;
}

// The plans of a call, or nothing where they and the leaves contradict each other.
std::optional<std::vector<PagePlan>> ParsePlans(const Geometry& geometry, const Leaves& leaves);

}  // namespace jaxkv

#endif  // JAXKV_OP_ARGUMENTS_H_
