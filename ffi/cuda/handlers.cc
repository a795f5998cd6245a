#include "cuda/handlers.h"

#include <exception>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cuda/devices.h"
#include "cuda/engine.h"
#include "cuda/page_moves.h"
#include "cuda/pinned_pool.h"
#include "op_arguments.h"

namespace jaxkv::cuda {
namespace {

namespace ffi = ::xla::ffi;

// Where a program runs.
struct Place {
  Runtime& runtime;
  Stream stream;
};

void CopyTo(const Place& place, void* to, const void* from, int64_t num_bytes) {
  if (to == from) return;
  place.runtime.CopyOnDevice(static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), num_bytes,
                             place.stream);
}

std::optional<Leaves> HandOn(const Place& place, const ffi::RemainingArgs& args,
                             const ffi::RemainingRets& results) {
  return HandOnLeaves(args, results, [&](uint8_t* to, const uint8_t* from, int64_t num_bytes) {
    CopyTo(place, to, from, num_bytes);
  });
}

// The copies of an op, or nothing where leaves and plans contradict each other.
std::optional<PageSet> MakePages(const Geometry& geometry, std::optional<Leaves> leaves) {
  if (!leaves) return std::nullopt;
  auto plans = ParsePlans(geometry, *leaves);
  if (!plans) return std::nullopt;
  return PageSet{std::move(*plans), std::move(leaves->data), geometry.record_bytes, geometry.clear_from};
}

EntryList ListEntries(const IdBuffer& ids, const Geometry& geometry, const std::optional<PageSet>& pages) {
  EntryList entries = {};
  entries.ids = ids.typed_data();
  entries.num_entries = static_cast<int32_t>(ids.element_count());
  entries.record_bytes = geometry.record_bytes;
  if (pages) {
    entries.num_blocks = static_cast<int32_t>(NumBlocks(pages->plans));
  } else {
    entries.refusal = kBadGeometry;
  }
  return entries;
}

// Moves what may move and reports. An op that writes leaves is given room for one number an entry.
void MoveEntries(const Place& place, const std::optional<PageSet>& pages, EntryList entries,
                 IdResult* repeats, IdResult& status, int32_t most_blocks, bool clears_skipped) {
  const Direction direction = repeats == nullptr ? Direction::kToRecords : Direction::kToLeaves;
  if (repeats != nullptr && entries.refusal == kMoved) {
    int32_t* marks = (*repeats)->typed_data();
    place.runtime.Zero(marks, static_cast<int64_t>(sizeof(int32_t)) * entries.num_entries, place.stream);
    place.runtime.MarkRepeats(entries, marks, place.stream);
    entries.refused = marks;
  }
  if (entries.refusal == kMoved) {
    for (const MoveArgs& args : CutMove(*pages, entries, clears_skipped)) {
      place.runtime.MovePages(direction, args, most_blocks, place.stream);
    }
  }
  place.runtime.Tally(entries, status->typed_data(), place.stream);
}

// Runs what gives work to a device. What CUDA refuses costs the program its results, and with them leaves
// that were donated: nothing less would be the truth, since their bytes are unknown.
template <typename Work>
ffi::Error Run(int32_t ordinal, Stream stream, const Work& work) {
  try {
    work(Place{RuntimeOf(ordinal), stream});
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("jaxkv: ") + error.what());
  }
  return ffi::Error::Success();
}

ffi::Error GatherPages(Stream stream, int32_t ordinal, int64_t record_bytes, int64_t clear_from,
                       PlanRows rows, IdBuffer ids, ffi::RemainingArgs args, ByteResult staging,
                       IdResult status) {
  return Run(ordinal, stream, [&](const Place& place) {
    const Geometry geometry{record_bytes, clear_from, rows};
    const auto pages = MakePages(geometry, ReadLeaves(args));
    EntryList entries = ListEntries(ids, geometry, pages);
    const auto dimensions = staging->dimensions();
    entries.area = staging->typed_data();
    entries.area_bytes = dimensions[1] == record_bytes ? dimensions[0] * record_bytes : 0;
    const bool covers_all =
        pages && pages->fills_records() && entries.area_bytes == entries.num_entries * record_bytes;
    if (!covers_all) {
      place.runtime.Zero(staging->typed_data(), static_cast<int64_t>(staging->element_count()), stream);
    }
    MoveEntries(place, pages, entries, nullptr, status, place.runtime.most_blocks(), /*clears_skipped=*/true);
  });
}

ffi::Error ScatterPages(Stream stream, int32_t ordinal, int64_t record_bytes, int64_t clear_from,
                        PlanRows rows, ByteBuffer staging, IdBuffer ids, ffi::RemainingArgs args,
                        IdResult status, IdResult repeats, ffi::RemainingRets results) {
  return Run(ordinal, stream, [&](const Place& place) {
    const Geometry geometry{record_bytes, clear_from, rows};
    const auto pages = MakePages(geometry, HandOn(place, args, results));
    EntryList entries = ListEntries(ids, geometry, pages);
    const auto dimensions = staging.dimensions();
    entries.area = staging.typed_data();
    entries.area_bytes = dimensions[1] == record_bytes ? dimensions[0] * record_bytes : 0;
    MoveEntries(place, pages, entries, &repeats, status, place.runtime.most_blocks(), false);
  });
}

// What the two ops share that reach a pool from inside a larger program: ids and addresses are known on the
// device alone, so a kernel goes straight to host memory.
struct PoolOp {
  int64_t pool_id;
  Geometry geometry;
  IdBuffer ids;
  IdBuffer addresses;
  IdBuffer token;
};

void MoveThroughPool(const Place& place, const PoolOp& op, const std::optional<PageSet>& pages,
                     IdResult* repeats, IdResult& status) {
  EntryList entries = ListEntries(op.ids, op.geometry, pages);
  const auto [pool, generation] = PinnedPools::Global().FindAny(op.pool_id);
  entries.token = op.token.typed_data();
  entries.generation = generation;
  entries.addresses = op.addresses.typed_data();
  if (op.addresses.element_count() != op.ids.element_count() || op.token.element_count() == 0) {
    entries.refusal = kBadGeometry;
  } else if (pool == nullptr) {
    entries.refusal = kNoPool;
  } else if (pool->device_data() == nullptr) {
    entries.refusal = kNotPinned;
  } else {
    entries.area = pool->device_data();
    entries.area_bytes = pool->num_bytes();
  }
  try {
    MoveEntries(place, pages, entries, repeats, status, kHostBlocks, false);
  } catch (const std::exception&) {
    if (pool != nullptr) pool->NoteUse(place.runtime, place.stream);  // Some of it may have been launched.
    throw;
  }
  if (pool != nullptr) pool->NoteUse(place.runtime, place.stream);
}

void HandOnToken(const Place& place, const IdBuffer& token, IdResult& result) {
  const size_t count = std::min(token.element_count(), result->element_count());
  CopyTo(place, result->typed_data(), token.typed_data(), static_cast<int64_t>(count * sizeof(int32_t)));
}

ffi::Error Offload(Stream stream, int32_t ordinal, int64_t pool_id, int64_t record_bytes, int64_t clear_from,
                   PlanRows rows, IdBuffer ids, IdBuffer addresses, IdBuffer token, ffi::RemainingArgs args,
                   IdResult token_out, IdResult status, ffi::RemainingRets results) {
  return Run(ordinal, stream, [&](const Place& place) {
    const PoolOp op{pool_id, {record_bytes, clear_from, rows}, ids, addresses, token};
    const auto pages = MakePages(op.geometry, HandOn(place, args, results));
    MoveThroughPool(place, op, pages, nullptr, status);
    HandOnToken(place, token, token_out);
  });
}

ffi::Error Restore(Stream stream, int32_t ordinal, int64_t pool_id, int64_t record_bytes, int64_t clear_from,
                   PlanRows rows, IdBuffer ids, IdBuffer addresses, IdBuffer token, ffi::RemainingArgs args,
                   IdResult token_out, IdResult status, IdResult repeats, ffi::RemainingRets results) {
  return Run(ordinal, stream, [&](const Place& place) {
    const PoolOp op{pool_id, {record_bytes, clear_from, rows}, ids, addresses, token};
    const auto pages = MakePages(op.geometry, HandOn(place, args, results));
    MoveThroughPool(place, op, pages, &repeats, status);
    HandOnToken(place, token, token_out);
  });
}

// What a transfer moves is known to the engine by the address of the tag, and the engine tells how it ended.
// The status of the program is never read: that it is there says that the program has run.
void BeginTransfer(const Place& place, int32_t ordinal, Direction direction, int64_t pool_id,
                   const IdBuffer& tag, const std::optional<PageSet>& pages) {
  Engine* engine = FindEngine(ordinal);
  if (engine != nullptr) engine->Move(direction, tag.typed_data(), pool_id, pages, place.stream);
}

ffi::Error ReadBlocks(Stream stream, int32_t ordinal, int64_t pool_id, int64_t record_bytes,
                      int64_t clear_from, PlanRows rows, IdBuffer tag, ffi::RemainingArgs args, IdResult) {
  return Run(ordinal, stream, [&](const Place& place) {
    const auto pages = MakePages({record_bytes, clear_from, rows}, ReadLeaves(args));
    BeginTransfer(place, ordinal, Direction::kToRecords, pool_id, tag, pages);
  });
}

ffi::Error WriteBlocks(Stream stream, int32_t ordinal, int64_t pool_id, int64_t record_bytes,
                       int64_t clear_from, PlanRows rows, IdBuffer tag, ffi::RemainingArgs args, IdResult,
                       ffi::RemainingRets results) {
  return Run(ordinal, stream, [&](const Place& place) {
    const auto pages = MakePages({record_bytes, clear_from, rows}, HandOn(place, args, results));
    BeginTransfer(place, ordinal, Direction::kToLeaves, pool_id, tag, pages);
  });
}

auto Bind() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<Stream>>().Ctx<ffi::DeviceOrdinal>(); }

auto BindPageOp() {
  return Bind().Attr<int64_t>("record_bytes").Attr<int64_t>("clear_from").Attr<PlanRows>("plans");
}

auto BindPool() {
  return Bind()
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

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(GatherPagesHandler, GatherPages,
                              BindPageOp().Arg<IdBuffer>().RemainingArgs().Ret<ByteBuffer>().Ret<IdBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(ScatterPagesHandler, ScatterPages,
                              BindPageOp()
                                  .Arg<ByteBuffer>()
                                  .Arg<IdBuffer>()
                                  .RemainingArgs()
                                  .Ret<IdBuffer>()  // status
                                  .Ret<IdBuffer>()  // repeats
                                  .RemainingRets(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(OffloadHandler, Offload, BindPoolOp().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(RestoreHandler, Restore, BindPoolOp().Ret<IdBuffer>().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadBlocksHandler, ReadBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(WriteBlocksHandler, WriteBlocks,
                              BindPool().Arg<IdBuffer>().RemainingArgs().Ret<IdBuffer>().RemainingRets());

}  // namespace jaxkv::cuda
