#include "handlers.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "cancellations.h"
#include "copy.h"
#include "pool.h"

namespace jaxkv {
namespace {

namespace ffi = ::xla::ffi;

using IdBuffer = ffi::BufferR1<ffi::S32>;
using IdResult = ffi::ResultBufferR1<ffi::S32>;
using ByteBuffer = ffi::BufferR2<ffi::U8>;
using ByteResult = ffi::ResultBufferR2<ffi::U8>;
using PlanRows = ffi::Span<const int64_t>;
using Int32s = ffi::Span<const int32_t>;

constexpr int64_t kAddressUnit = 512;

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

Int32s Values(const IdBuffer& buffer) { return {buffer.typed_data(), buffer.element_count()}; }

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

int64_t NumBytes(const ffi::AnyBuffer& buffer) {
  return (BitWidth(buffer.element_type()) * static_cast<int64_t>(buffer.element_count()) + 7) / 8;
}

// The leaves of an op that only reads them.
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

// The leaves of an op that hands them on. A result is the operand's own buffer where the alias was kept;
// where it was not, the operand is copied, so that the op means the same.
std::optional<Leaves> HandOnLeaves(const ffi::RemainingArgs& args, const ffi::RemainingRets& results) {
  if (args.size() != results.size()) return std::nullopt;
  Leaves leaves;
  for (size_t i = 0; i < args.size(); ++i) {
    auto leaf = args.get<ffi::AnyBuffer>(i);
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!leaf.has_value() || !result.has_value()) return std::nullopt;
    const int64_t num_bytes = NumBytes(*leaf);
    if (NumBytes(**result) != num_bytes) return std::nullopt;
    auto* data = static_cast<uint8_t*>((*result)->untyped_data());
    if (data != leaf->untyped_data()) std::memcpy(data, leaf->untyped_data(), static_cast<size_t>(num_bytes));
    leaves.data.push_back(data);
    leaves.num_bytes.push_back(num_bytes);
  }
  return leaves;
}

void HandOnToken(const IdBuffer& token, IdResult& result) {
  if (token.typed_data() == result->typed_data()) return;
  const size_t count = std::min(token.element_count(), result->element_count());
  std::memcpy(result->typed_data(), token.typed_data(), count * sizeof(int32_t));
}

// The plans of a call, or nothing where they and the leaves contradict each other.
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

// What one call found out and will report.
class Tally {
 public:
  explicit Tally(Int32s ids) : ids_(ids) {}

  // Every usable (block, record) pair. `record_of(j)` is the place of entry j's record, or null. An op that
  // writes leaves refuses repeats: two threads would write one page.
  template <typename RecordOf>
  std::vector<BlockMove> Collect(const std::vector<PagePlan>& plans, bool writes_leaves,
                                 const RecordOf& record_of) {
    int64_t num_blocks = plans[0].num_blocks;
    for (const PagePlan& plan : plans) num_blocks = std::min(num_blocks, plan.num_blocks);
    std::vector<bool> seen(writes_leaves ? static_cast<size_t>(num_blocks) : 0);
    std::vector<BlockMove> moves;
    moves.reserve(ids_.size());
    for (size_t j = 0; j < ids_.size(); ++j) {
      const int32_t block = ids_[j];
      if (block == -1) continue;
      uint8_t* record = record_of(static_cast<int64_t>(j));
      if (block < 0 || block >= num_blocks) {
        Refuse(j, kBadBlock);
      } else if (record == nullptr) {
        Refuse(j, kBadAddress);
      } else if (writes_leaves && seen[static_cast<size_t>(block)]) {
        Refuse(j, kRepeated);
      } else {
        if (writes_leaves) seen[static_cast<size_t>(block)] = true;
        moves.push_back({block, record});
      }
    }
    counts_[kMoved] = static_cast<int64_t>(moves.size());
    return moves;
  }

  // Nothing moves; every entry that asked for something is refused for the same reason.
  void RefuseAll(StatusEntry reason) {
    counts_.fill(0);
    any_refused_ = false;
    for (size_t j = 0; j < ids_.size(); ++j) {
      if (ids_[j] != -1) Refuse(j, reason);
    }
  }

  void WriteTo(IdResult& status) {
    const auto elapsed = std::chrono::steady_clock::now() - started_;
    counts_[kElapsedUs] = std::chrono::duration_cast<std::chrono::microseconds>(elapsed).count();
    for (size_t i = 0; i < std::min<size_t>(kStatusSize, status->element_count()); ++i) {
      constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
      status->typed_data()[i] = static_cast<int32_t>(std::min(counts_[i], kMost));
    }
  }

 private:
  void Refuse(size_t entry, StatusEntry reason) {
    ++counts_[reason];
    if (!std::exchange(any_refused_, true)) counts_[kFirstRefused] = static_cast<int64_t>(entry);
  }

  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  const Int32s ids_;
  std::array<int64_t, kStatusSize> counts_{};
  bool any_refused_ = false;
};

// Runs a copy and reports how it ended, also when memory for its bookkeeping was refused.
template <typename Copy>
void Report(Int32s ids, IdResult& status, const Copy& copy) {
  Tally tally(ids);
  try {
    copy(tally);
  } catch (const std::bad_alloc&) {
    tally.RefuseAll(kNoMemory);
  }
  tally.WriteTo(status);
}

// What a pool op is given beside its leaves. Without a generation there is no pool, without a number the call
// cannot be called off.
struct PoolCall {
  int64_t pool_id;
  Geometry geometry;
  std::optional<int32_t> generation;
  std::optional<int32_t> number;
  Int32s ids;
  Int32s addresses;
};

std::optional<int32_t> First(Int32s values) {
  return values.size() == 0 ? std::nullopt : std::optional<int32_t>(values[0]);
}

// The call of an op that takes all numbers as one array: generation, number of the call, ids, addresses. JAX
// takes a microsecond for every array of NumPy's that a program is given.
PoolCall Unpack(int64_t pool_id, const Geometry& geometry, const IdBuffer& call) {
  const Int32s values = Values(call);
  if (values.size() < 2) return {pool_id, geometry, std::nullopt, std::nullopt, {}, {}};
  const size_t n = (values.size() - 2) / 2;
  const int32_t* ids = values.begin() + 2;
  return {pool_id, geometry, values[0], values[1], {ids, n}, {ids + n, n}};
}

// Finds the record of each entry of a call in its pool. Keeps the memory alive while it lives.
class PoolRecords {
 public:
  explicit PoolRecords(const PoolCall& call)
      : addresses_(call.addresses), record_bytes_(call.geometry.record_bytes) {
    if (!call.generation) return;
    arena_ = PoolRegistry::Global().Find({call.pool_id, *call.generation});
    if (arena_ != nullptr && !arena_->owned_by_this_process()) arena_ = nullptr;
  }

  bool has_pool() const { return arena_ != nullptr; }

  uint8_t* operator()(int64_t j) const {
    const int64_t offset = kAddressUnit * addresses_[static_cast<size_t>(j)];
    return arena_->Contains(offset, record_bytes_) ? arena_->data() + offset : nullptr;
  }

 private:
  const Int32s addresses_;
  const int64_t record_bytes_;
  std::shared_ptr<Arena> arena_;
};

enum class Direction { kToPool, kFromPool };

void MoveThroughPool(Direction direction, Tally& tally, const PoolCall& call, std::optional<Leaves> leaves) {
  const auto& geometry = call.geometry;
  if (call.addresses.size() != call.ids.size()) return tally.RefuseAll(kBadGeometry);
  if (call.number && Cancellations::Global().Contains(*call.number)) return tally.RefuseAll(kCancelled);
  const PoolRecords records(call);
  if (!records.has_pool()) return tally.RefuseAll(kNoPool);
  auto plans = leaves ? ParsePlans(geometry, *leaves) : std::nullopt;
  if (!plans) return tally.RefuseAll(kBadGeometry);
  const auto moves = tally.Collect(*plans, direction == Direction::kFromPool, records);
  const PageCopier copier(std::move(*plans), std::move(leaves->data),
                          {geometry.record_bytes, geometry.clear_from});
  direction == Direction::kToPool ? copier.Gather(moves) : copier.Scatter(moves);
}

ffi::Error Offload(int64_t pool_id, int64_t record_bytes, int64_t clear_from, PlanRows rows, IdBuffer ids,
                   IdBuffer addresses, IdBuffer token, ffi::RemainingArgs args, IdResult token_out,
                   IdResult status, ffi::RemainingRets results) {
  HandOnToken(token, token_out);
  const PoolCall call{
      pool_id,          {record_bytes, clear_from, rows}, First(Values(token)), std::nullopt, Values(ids),
      Values(addresses)};
  Report(call.ids, status, [&](Tally& tally) {
    MoveThroughPool(Direction::kToPool, tally, call, HandOnLeaves(args, results));
  });
  return ffi::Error::Success();
}

ffi::Error Restore(int64_t pool_id, int64_t record_bytes, int64_t clear_from, PlanRows rows, IdBuffer ids,
                   IdBuffer addresses, IdBuffer token, ffi::RemainingArgs args, IdResult token_out,
                   IdResult status, ffi::RemainingRets results) {
  HandOnToken(token, token_out);
  const PoolCall call{
      pool_id,          {record_bytes, clear_from, rows}, First(Values(token)), std::nullopt, Values(ids),
      Values(addresses)};
  Report(call.ids, status, [&](Tally& tally) {
    MoveThroughPool(Direction::kFromPool, tally, call, HandOnLeaves(args, results));
  });
  return ffi::Error::Success();
}

// Offload as a plain read: the leaves stay their owner's.
ffi::Error ReadBlocks(int64_t pool_id, int64_t record_bytes, int64_t clear_from, PlanRows rows,
                      IdBuffer numbers, ffi::RemainingArgs args, IdResult status) {
  const PoolCall call = Unpack(pool_id, {record_bytes, clear_from, rows}, numbers);
  Report(call.ids, status,
         [&](Tally& tally) { MoveThroughPool(Direction::kToPool, tally, call, ReadLeaves(args)); });
  return ffi::Error::Success();
}

ffi::Error WriteBlocks(int64_t pool_id, int64_t record_bytes, int64_t clear_from, PlanRows rows,
                       IdBuffer numbers, ffi::RemainingArgs args, IdResult status,
                       ffi::RemainingRets results) {
  const PoolCall call = Unpack(pool_id, {record_bytes, clear_from, rows}, numbers);
  Report(call.ids, status, [&](Tally& tally) {
    MoveThroughPool(Direction::kFromPool, tally, call, HandOnLeaves(args, results));
  });
  return ffi::Error::Success();
}

// The record of entry j in a staging array, or null where the array is too small for it.
class StagedRecords {
 public:
  StagedRecords(uint8_t* data, ByteBuffer::Dimensions dimensions, int64_t record_bytes)
      : data_(data), count_(dimensions[1] == record_bytes ? dimensions[0] : 0), record_bytes_(record_bytes) {}

  uint8_t* operator()(int64_t j) const { return j < count_ ? data_ + j * record_bytes_ : nullptr; }

 private:
  uint8_t* const data_;
  const int64_t count_;
  const int64_t record_bytes_;
};

ffi::Error GatherPages(int64_t record_bytes, int64_t clear_from, PlanRows rows, IdBuffer ids,
                       ffi::RemainingArgs args, ByteResult staging, IdResult status) {
  const Geometry geometry{record_bytes, clear_from, rows};
  // What is skipped or refused leaves zeros, never whatever the memory held before.
  std::memset(staging->typed_data(), 0, staging->element_count());
  Report(Values(ids), status, [&](Tally& tally) {
    auto leaves = ReadLeaves(args);
    auto plans = leaves ? ParsePlans(geometry, *leaves) : std::nullopt;
    if (!plans) return tally.RefuseAll(kBadGeometry);
    const StagedRecords records(staging->typed_data(), staging->dimensions(), record_bytes);
    const auto moves = tally.Collect(*plans, /*writes_leaves=*/false, records);
    PageCopier(std::move(*plans), std::move(leaves->data), {record_bytes, clear_from}).Gather(moves);
  });
  return ffi::Error::Success();
}

ffi::Error ScatterPages(int64_t record_bytes, int64_t clear_from, PlanRows rows, ByteBuffer staging,
                        IdBuffer ids, ffi::RemainingArgs args, IdResult status, ffi::RemainingRets results) {
  const Geometry geometry{record_bytes, clear_from, rows};
  Report(Values(ids), status, [&](Tally& tally) {
    auto leaves = HandOnLeaves(args, results);
    auto plans = leaves ? ParsePlans(geometry, *leaves) : std::nullopt;
    if (!plans) return tally.RefuseAll(kBadGeometry);
    const StagedRecords records(staging.typed_data(), staging.dimensions(), record_bytes);
    const auto moves = tally.Collect(*plans, /*writes_leaves=*/true, records);
    PageCopier(std::move(*plans), std::move(leaves->data), {record_bytes, clear_from}).Scatter(moves);
  });
  return ffi::Error::Success();
}

auto BindPool() {
  return ffi::Ffi::Bind()
      .Attr<int64_t>("pool_id")
      .Attr<int64_t>("record_bytes")
      .Attr<int64_t>("clear_from")
      .Attr<PlanRows>("plans");
}

auto BindPoolOp() {
  return BindPool()
      .Arg<IdBuffer>()  // block ids
      .Arg<IdBuffer>()  // addresses
      .Arg<IdBuffer>()  // token
      .RemainingArgs()
      .Ret<IdBuffer>()  // token
      .Ret<IdBuffer>()  // status
      .RemainingRets();
}

auto BindPageOp() {
  return ffi::Ffi::Bind().Attr<int64_t>("record_bytes").Attr<int64_t>("clear_from").Attr<PlanRows>("plans");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OffloadHandler, Offload, BindPoolOp());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadBlocksHandler, ReadBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(WriteBlocksHandler, WriteBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(RestoreHandler, Restore, BindPoolOp());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherPagesHandler, GatherPages,
                              BindPageOp().Arg<IdBuffer>().RemainingArgs().Ret<ByteBuffer>().Ret<IdBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    ScatterPagesHandler, ScatterPages,
    BindPageOp().Arg<ByteBuffer>().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>().RemainingRets());

}  // namespace jaxkv
