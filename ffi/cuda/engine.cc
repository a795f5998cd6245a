#include "cuda/engine.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "cuda/batch.h"
#include "cuda/record_copies.h"
#include "tally.h"

namespace jaxkv::cuda {
namespace {

constexpr int64_t kLeastSlots = 2;

Stream MakeSecondStream(Runtime& runtime, Stream first) {
  try {
    return runtime.MakeStream();
  } catch (const CudaError&) {
    runtime.FreeStream(first);
    throw;
  }
}

}  // namespace

Engine::Engine(Runtime& runtime, const EngineOptions& options)
    : runtime_(runtime),
      options_(options),
      out_(runtime.MakeStream()),
      in_(MakeSecondStream(runtime, out_)),
      calls_(runtime),
      paths_(options.paths) {}

Engine::~Engine() {
  Drain(nullptr);
  try {
    runtime_.FreeStream(out_);
    runtime_.FreeStream(in_);
  } catch (const CudaError&) {
    // The device is lost.
  }
}

void Engine::Fit(int64_t record_bytes) {
  const std::lock_guard<std::mutex> begin_lock(begin_mutex_);
  const int64_t slot_bytes = std::max(options_.slot_bytes, record_bytes);
  if (ring_out_ != nullptr && ring_out_->slot_bytes() >= slot_bytes) return;
  const int64_t num_slots = std::max(options_.staging_bytes / slot_bytes, kLeastSlots);
  std::string refusal;
  try {
    // What is there serves on until there is something larger.
    auto ring_out = std::make_unique<StagingRing>(runtime_, num_slots, slot_bytes);
    auto ring_in = std::make_unique<StagingRing>(runtime_, num_slots, slot_bytes);
    auto counting = std::make_unique<PinnedNumbers>(runtime_);
    const auto most_records = static_cast<size_t>(slot_bytes / kAddressUnitBytes);
    counting->Reserve(most_records);
    for (size_t i = 0; i < most_records; ++i) counting->host()[i] = static_cast<int32_t>(i);
    Drain(nullptr);
    prefetches_ = {};
    ring_out_ = std::move(ring_out);
    ring_in_ = std::move(ring_in);
    counting_ = std::move(counting);
    bounce_ = nullptr;  // Is made anew as large.
  } catch (const CudaError& error) {
    refusal = error.what();
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  staging_refusal_ = refusal;
}

std::string Engine::staging_refusal() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return staging_refusal_;
}

Paths Engine::paths() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return paths_;
}

void Engine::set_paths(const Paths& paths) {
  const std::lock_guard<std::mutex> lock(mutex_);
  paths_ = paths;
}

WayCounts Engine::way_counts() {
  const std::lock_guard<std::mutex> lock(begin_mutex_);
  return way_counts_;
}

// -- copies -------------------------------------------------------------------------------------------------

void Engine::Move(Direction direction, const void* tag, int64_t pool_id, const std::optional<PageSet>& pages,
                  Stream compute) {
  const std::lock_guard<std::mutex> lock(begin_mutex_);
  Call* call = calls_.Find(tag);
  if (call == nullptr || call->state.load(std::memory_order_acquire) != CallState::kOpen) return;
  try {
    const auto moves = Admit(direction, *call, pool_id, pages);
    if (moves && !moves->empty()) Begin(direction, *call, *pages, *moves, compute);
  } catch (const std::exception& error) {
    // Whatever was begun ends before anyone may let go of what it uses.
    Drain(compute);
    call->AwaitHost();
    call->has_copies = false;
    call->error = error.what();
  }
  call->state.store(CallState::kBegun, std::memory_order_release);
}

void Engine::Abandon(const void* tag) {
  {
    const std::lock_guard<std::mutex> lock(begin_mutex_);
    if (calls_.GiveUp(tag)) return;
  }
  calls_.Close(tag);
}

// The blocks that move, and in the status of the call those that do not. Finds and holds the pool.
std::optional<std::vector<BlockMove>> Engine::Admit(Direction direction, Call& call, int64_t pool_id,
                                                    const std::optional<PageSet>& pages) const {
  const std::vector<int32_t>& numbers = call.numbers;
  const size_t count = numbers.size() < 2 ? 0 : (numbers.size() - 2) / 2;
  Tally tally(numbers.data() + 2, count);
  std::optional<std::vector<BlockMove>> moves;
  call.pool = numbers.size() < 2 ? nullptr : PinnedPools::Global().Find({pool_id, numbers[0]});
  if (numbers.size() >= 2 && calls_.IsCancelled(numbers[1])) {
    tally.RefuseAll(kCancelled);
  } else if (call.pool == nullptr) {
    tally.RefuseAll(kNoPool);
  } else if (!pages) {
    tally.RefuseAll(kBadGeometry);
  } else {
    const int32_t* addresses = numbers.data() + 2 + count;
    const PinnedPool& pool = *call.pool;
    moves = tally.Collect(NumBlocks(pages->plans), direction == Direction::kToLeaves, [&](int64_t j) {
      const int64_t offset = kAddressUnitBytes * addresses[j];
      return pool.Contains(offset, pages->record_bytes) ? pool.data() + offset : nullptr;
    });
  }
  tally.WriteTo(call.status.data(), call.status.size());
  return moves;
}

void Engine::Begin(Direction direction, Call& call, const PageSet& pages, const std::vector<BlockMove>& moves,
                   Stream compute) {
  std::vector<Landed> landed;
  const auto names = NameRecords(call, moves);
  if (direction == Direction::kToLeaves) {
    landed = prefetches_.Take(names);
  } else {
    AbandonAll(prefetches_.Forget(names));
  }
  try {
    BeginAs(direction, {call, pages, PutFirst(landed, moves), compute, paths()}, landed);
  } catch (const std::exception&) {
    for (const Landed& part : landed) {
      if (prefetches_.IsEmpty(*part.slot)) ring_in_->Abandon(*part.slot);
    }
    throw;
  }
}

void Engine::BeginAs(Direction direction, const Batch& batch, const std::vector<Landed>& landed) {
  Call& call = batch.call;
  const PageSet& pages = batch.pages;
  ListMoved(batch, landed);
  const bool pinned = batch.pool().device_data() != nullptr;
  const bool has_room = ring_out_ != nullptr && pages.record_bytes <= ring_out_->slot_bytes();
  const auto num_moves = static_cast<int64_t>(batch.moves.size());
  const bool is_small = landed.empty() && pages.block_bytes() * num_moves < batch.paths.direct_below_bytes;
  if (!pinned && !has_room) {
    throw CudaError("the host pool could not be pinned (" + batch.pool().refusal() +
                    ") and the device has no staging memory for its records (" + staging_refusal() + ")");
  }
  runtime_.Record(call.begin, batch.compute);
  if (pinned && (is_small || !has_room)) {
    MoveDirectly(direction, batch);
  } else if (direction == Direction::kToRecords) {
    StageOut(batch);
  } else {
    StageIn(batch, landed);
  }
  call.has_copies = true;
}

void Engine::MoveDirectly(Direction direction, const Batch& batch) {
  ++way_counts_.direct;
  const EntryList entries =
      batch.InPool(batch.device_ids(), 0, batch.moves.size(), NumBlocks(batch.pages.plans));
  Launch(direction, batch.pages, entries, batch.paths.host_blocks, batch.compute);
  runtime_.Record(batch.call.end, batch.compute);
}

void Engine::StageOut(const Batch& batch) {
  const size_t most = batch.records_per_slot(*ring_out_);
  for (size_t first = 0; first < batch.moves.size(); first += most) {
    const size_t count = std::min(most, batch.moves.size() - first);
    StagingRing::Slot& slot = ring_out_->Acquire(batch.compute);
    Launch(Direction::kToRecords, batch.pages, batch.InStaging(slot.data, first, count),
           runtime_.most_blocks(), batch.compute);
    ring_out_->Fill(slot, batch.compute);
    ring_out_->Await(slot, out_);
    FromStaging(batch, slot, first, count);
    ring_out_->Release(slot, out_);
  }
  runtime_.Record(batch.call.end, out_);
}

void Engine::StageIn(const Batch& batch, const std::vector<Landed>& landed) {
  size_t num_landed = 0;
  for (const Landed& part : landed) {
    EntryList entries = batch.InStaging(part.slot->data, num_landed, part.places.size());
    entries.addresses = batch.device_addresses() + num_landed;
    entries.area_bytes = ring_in_->slot_bytes();
    ring_in_->AwaitPart(*part.slot, batch.compute);
    Launch(Direction::kToLeaves, batch.pages, entries, runtime_.most_blocks(), batch.compute);
    ring_in_->NotePart(*part.slot, batch.compute);
    if (prefetches_.IsEmpty(*part.slot)) ring_in_->Abandon(*part.slot);
    num_landed += part.places.size();
  }
  const size_t most = batch.records_per_slot(*ring_in_);
  for (size_t first = num_landed; first < batch.moves.size(); first += most) {
    const size_t count = std::min(most, batch.moves.size() - first);
    StagingRing::Slot& slot = ring_in_->Acquire(in_);
    ToStaging(batch, slot, first, count);
    ring_in_->Fill(slot, in_);
    ring_in_->Await(slot, batch.compute);
    Launch(Direction::kToLeaves, batch.pages, batch.InStaging(slot.data, first, count),
           runtime_.most_blocks(), batch.compute);
    ring_in_->Release(slot, batch.compute);
  }
  runtime_.Record(batch.call.end, batch.compute);
}

void Engine::FromStaging(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count) {
  const int64_t record_bytes = batch.pages.record_bytes;
  const auto plans = RecordPlans(batch.pages, static_cast<int64_t>(count));
  if (batch.pool().device_data() == nullptr) return Bounce(batch, slot, plans, first, count);
  const auto copies = ListCopies(&batch.moves[first], count, slot.data, {record_bytes, plans});
  if (AreLong(copies, batch.paths.engine_from_bytes)) {
    ++way_counts_.by_engine;
    return runtime_.CopyToHost(copies, out_);
  }
  ++way_counts_.by_kernel;
  const PageSet records = {plans, {slot.data}, record_bytes, record_bytes};
  const EntryList entries = batch.InPool(counting_->device(), first, count, static_cast<int64_t>(count));
  Launch(Direction::kToRecords, records, entries, batch.paths.host_blocks, out_);
}

void Engine::ToStaging(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count) {
  const int64_t record_bytes = batch.pages.record_bytes;
  if (batch.pool().device_data() == nullptr) return Unbounce(batch, slot, first, count);
  const std::vector<PagePlan> whole = {WholeRecord(static_cast<int64_t>(count), record_bytes)};
  const auto copies = ListCopies(&batch.moves[first], count, slot.data, {record_bytes, whole});
  if (AreLong(copies, batch.paths.engine_from_bytes)) {
    ++way_counts_.by_engine;
    return runtime_.CopyToDevice(copies, in_);
  }
  ++way_counts_.by_kernel;
  const PageSet records = {whole, {slot.data}, record_bytes, record_bytes};
  const EntryList entries = batch.InPool(counting_->device(), first, count, static_cast<int64_t>(count));
  Launch(Direction::kToLeaves, records, entries, batch.paths.host_blocks, in_);
}

// Staging memory to a pool that is not pinned.
void Engine::Bounce(const Batch& batch, const StagingRing::Slot& slot, const std::vector<PagePlan>& plans,
                    size_t first, size_t count) {
  BounceRing::Slot& bounce = NextBounce();
  const int64_t record_bytes = batch.pages.record_bytes;
  runtime_.CopyToHost({{bounce.data, slot.data, record_bytes * static_cast<int64_t>(count)}}, out_);
  const auto moves = batch.Renumbered(first, count);
  Call& call = batch.call;
  call.bounce = bounce_;
  call.host_copies.fetch_add(1, std::memory_order_acq_rel);
  auto empty = [&call, plans, moves, data = bounce.data, record_bytes](const char* error) {
    if (error == nullptr) PageCopier(plans, {data}, {record_bytes, record_bytes}).Gather(moves);
    if (error != nullptr) call.error = error;
    call.host_copies.fetch_sub(1, std::memory_order_acq_rel);
  };
  try {
    bounce_->FilledBy(bounce, out_, std::move(empty));
  } catch (const CudaError&) {
    call.host_copies.fetch_sub(1, std::memory_order_acq_rel);
    throw;
  }
}

// A pool that is not pinned to staging memory.
void Engine::Unbounce(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count) {
  BounceRing::Slot& bounce = NextBounce();
  const int64_t record_bytes = batch.pages.record_bytes;
  const auto moves = batch.Renumbered(first, count);
  const PagePlan whole = WholeRecord(static_cast<int64_t>(count), record_bytes);
  PageCopier({whole}, {bounce.data}, {record_bytes, record_bytes}).Scatter(moves);
  runtime_.CopyToDevice({{bounce.data, slot.data, record_bytes * static_cast<int64_t>(count)}}, in_);
  bounce_->ReadBy(bounce, in_);
}

BounceRing::Slot& Engine::NextBounce() {
  ++way_counts_.by_host;
  if (bounce_ == nullptr) {
    bounce_ = std::make_shared<BounceRing>(runtime_, kLeastSlots, ring_out_->slot_bytes());
  }
  return bounce_->Acquire();
}

// -- prefetches ---------------------------------------------------------------------------------------------

void Engine::Prefetch(const void* tag, int64_t pool_id, int64_t record_bytes) {
  const std::lock_guard<std::mutex> lock(begin_mutex_);
  Call* call = calls_.Find(tag);
  if (call == nullptr || call->state.load(std::memory_order_acquire) != CallState::kOpen) return;
  try {
    const PageSet records = {{WholeRecord(INT32_MAX, record_bytes)}, {nullptr}, record_bytes, record_bytes};
    const auto moves = Admit(Direction::kToRecords, *call, pool_id, records);
    const bool has_room = ring_in_ != nullptr && record_bytes <= ring_in_->slot_bytes();
    if (moves && !moves->empty() && has_room) Fetch({*call, records, *moves, in_, paths()});
  } catch (const std::exception& error) {
    Drain(nullptr);
    call->has_copies = false;
    call->error = error.what();
  }
  call->state.store(CallState::kBegun, std::memory_order_release);
}

void Engine::ForgetPrefetched(int32_t generation, const int32_t* addresses, size_t count) {
  const std::lock_guard<std::mutex> lock(begin_mutex_);
  std::vector<RecordName> names;
  for (size_t j = 0; j < count; ++j) names.push_back({generation, addresses[j]});
  AbandonAll(prefetches_.Forget(names));
}

// As many records as there is room for, in the order they were named.
void Engine::Fetch(const Batch& batch) {
  ListMoved(batch, {});
  runtime_.Record(batch.call.begin, in_);
  const auto names = NameRecords(batch.call, batch.moves);
  const size_t most = batch.records_per_slot(*ring_in_);
  std::vector<StagingRing::Slot*> filled;
  for (size_t first = 0; first < batch.moves.size(); first += most) {
    const size_t count = std::min(most, batch.moves.size() - first);
    StagingRing::Slot* slot = HoldSlot(filled);
    if (slot == nullptr) break;
    try {
      ToStaging(batch, *slot, first, count);
      ring_in_->Fill(*slot, in_);
    } catch (const std::exception&) {
      ring_in_->Abandon(*slot);
      throw;
    }
    filled.push_back(slot);
    for (size_t k = 0; k < count; ++k) {
      AbandonAll(prefetches_.Add(names[first + k], *slot, static_cast<int32_t>(k)));
    }
  }
  runtime_.Record(batch.call.end, in_);
  batch.call.has_copies = true;
}

// A slot for records to wait in, if need be that of the oldest who do, unless it is one of `kept`.
StagingRing::Slot* Engine::HoldSlot(const std::vector<StagingRing::Slot*>& kept) {
  StagingRing::Slot* slot = ring_in_->AcquireToHold(in_);
  if (slot != nullptr) return slot;
  StagingRing::Slot* oldest = prefetches_.Oldest();
  if (oldest == nullptr || std::find(kept.begin(), kept.end(), oldest) != kept.end()) return nullptr;
  prefetches_.ForgetAll(*oldest);
  ring_in_->Abandon(*oldest);
  return ring_in_->AcquireToHold(in_);
}

void Engine::AbandonAll(const EmptySlots& slots) {
  for (StagingRing::Slot* slot : slots) ring_in_->Abandon(*slot);
}

void Engine::Launch(Direction direction, const PageSet& pages, const EntryList& entries, int32_t most_blocks,
                    Stream stream) {
  for (const MoveArgs& args : CutMove(pages, entries, /*clears_skipped=*/false)) {
    runtime_.MovePages(direction, args, most_blocks, stream);
  }
}

// Waits for everything; a device that fails even so has stopped working.
void Engine::Drain(Stream compute) noexcept {
  for (Stream stream : {compute, out_, in_}) {
    try {
      if (stream != nullptr) runtime_.Synchronize(stream);
    } catch (const CudaError&) {
      // Nothing runs on it any more.
    }
  }
}

}  // namespace jaxkv::cuda
