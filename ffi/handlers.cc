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
#include "op_arguments.h"
#include "pool.h"
#include "tally.h"

namespace jaxkv {
namespace {

namespace ffi = ::xla::ffi;

using Int32s = ffi::Span<const int32_t>;

Int32s Values(const IdBuffer& buffer) { return {buffer.typed_data(), buffer.element_count()}; }

// The leaves of an op that hands them on.
std::optional<Leaves> HandOn(const ffi::RemainingArgs& args, const ffi::RemainingRets& results) {
  return HandOnLeaves(args, results, [](uint8_t* to, const uint8_t* from, int64_t num_bytes) {
    std::memcpy(to, from, static_cast<size_t>(num_bytes));
  });
}

void HandOnToken(const IdBuffer& token, IdResult& result) {
  if (token.typed_data() == result->typed_data()) return;
  const size_t count = std::min(token.element_count(), result->element_count());
  std::memcpy(result->typed_data(), token.typed_data(), count * sizeof(int32_t));
}

// Runs a copy and reports how it ended, also when memory for its bookkeeping was refused.
template <typename Copy>
void Report(Int32s ids, IdResult& status, const Copy& copy) {
  Tally tally(ids.begin(), ids.size());
  try {
    copy(tally);
  } catch (const std::bad_alloc&) {
    tally.RefuseAll(kNoMemory);
  }
  tally.WriteTo(status->typed_data(), status->element_count());
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
    const int64_t offset = kAddressUnitBytes * addresses_[static_cast<size_t>(j)];
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
  const auto moves = tally.Collect(NumBlocks(*plans), direction == Direction::kFromPool, records);
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
  Report(call.ids, status,
         [&](Tally& tally) { MoveThroughPool(Direction::kToPool, tally, call, HandOn(args, results)); });
  return ffi::Error::Success();
}

ffi::Error Restore(int64_t pool_id, int64_t record_bytes, int64_t clear_from, PlanRows rows, IdBuffer ids,
                   IdBuffer addresses, IdBuffer token, ffi::RemainingArgs args, IdResult token_out,
                   IdResult status, IdResult, ffi::RemainingRets results) {
  HandOnToken(token, token_out);
  const PoolCall call{
      pool_id,          {record_bytes, clear_from, rows}, First(Values(token)), std::nullopt, Values(ids),
      Values(addresses)};
  Report(call.ids, status,
         [&](Tally& tally) { MoveThroughPool(Direction::kFromPool, tally, call, HandOn(args, results)); });
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
  Report(call.ids, status,
         [&](Tally& tally) { MoveThroughPool(Direction::kFromPool, tally, call, HandOn(args, results)); });
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
    const auto moves = tally.Collect(NumBlocks(*plans), /*writes_leaves=*/false, records);
    PageCopier(std::move(*plans), std::move(leaves->data), {record_bytes, clear_from}).Gather(moves);
  });
  return ffi::Error::Success();
}

ffi::Error ScatterPages(int64_t record_bytes, int64_t clear_from, PlanRows rows, ByteBuffer staging,
                        IdBuffer ids, ffi::RemainingArgs args, IdResult status, IdResult,
                        ffi::RemainingRets results) {
  const Geometry geometry{record_bytes, clear_from, rows};
  Report(Values(ids), status, [&](Tally& tally) {
    auto leaves = HandOn(args, results);
    auto plans = leaves ? ParsePlans(geometry, *leaves) : std::nullopt;
    if (!plans) return tally.RefuseAll(kBadGeometry);
    const StagedRecords records(staging.typed_data(), staging.dimensions(), record_bytes);
    const auto moves = tally.Collect(NumBlocks(*plans), /*writes_leaves=*/true, records);
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
      .Ret<IdBuffer>()   // token
      .Ret<IdBuffer>();  // status
}

auto BindPageOp() {
  return ffi::Ffi::Bind().Attr<int64_t>("record_bytes").Attr<int64_t>("clear_from").Attr<PlanRows>("plans");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OffloadHandler, Offload, BindPoolOp().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadBlocksHandler, ReadBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(WriteBlocksHandler, WriteBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>().RemainingRets());
// Ops that write leaves have a result more than there is to tell: room that devices find repeats in.
XLA_FFI_DEFINE_HANDLER_SYMBOL(RestoreHandler, Restore, BindPoolOp().Ret<IdBuffer>().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherPagesHandler, GatherPages,
                              BindPageOp().Arg<IdBuffer>().RemainingArgs().Ret<ByteBuffer>().Ret<IdBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScatterPagesHandler, ScatterPages,
                              BindPageOp()
                                  .Arg<ByteBuffer>()
                                  .Arg<IdBuffer>()
                                  .RemainingArgs()
                                  .Ret<IdBuffer>()
                                  .Ret<IdBuffer>()
                                  .RemainingRets());

}  // namespace jaxkv
