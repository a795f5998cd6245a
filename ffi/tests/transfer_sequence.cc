#include "transfer_sequence.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace jaxkv::cuda {
namespace {

constexpr int64_t kPoolId = 3;
constexpr size_t kMostTransfers = 8;

Schedule DrawSchedule(Rng& rng) { return Chance(rng, 0.5) ? Schedule::kAny : Schedule::kLate; }

Paths DrawPaths(Rng& rng) {
  const int64_t limits[] = {0, 300, 3000, int64_t{1} << 40};
  return {limits[Draw(rng, 0, 3)], limits[Draw(rng, 0, 3)], static_cast<int32_t>(Draw(rng, 1, 3))};
}

EngineOptions DrawOptions(Rng& rng) {
  EngineOptions options;
  options.slot_bytes = 512 * Draw(rng, 1, 5);
  options.staging_bytes = options.slot_bytes * Draw(rng, 1, 7);
  options.paths = DrawPaths(rng);
  return options;
}

}  // namespace

Sequence::Sequence(uint64_t seed, Happenings& happenings)
    : seed_(seed),
      happenings_(happenings),
      rng_(seed),
      device_(seed, DrawSchedule(rng_)),
      options_(DrawOptions(rng_)),
      engine_(new Engine(device_, options_)) {
  const bool has_many_plans = Chance(rng_, 0.02);
  const LayoutLimits limits = {3, has_many_plans ? 150 : 3, has_many_plans ? 8 : 120,
                               2, Chance(rng_, 0.5),        8};
  Layout layout = DrawLayout(rng_, limits);
  for (int64_t i = Draw(rng_, 1, 2); i > 0; --i) {
    leaves_.push_back(std::make_unique<Leaves>(device_, layout, rng_));
    record_step_ = std::max(record_step_, layout.record_bytes);
    if (Chance(rng_, 0.9)) Fit(layout.record_bytes);
    if (i == 1 || Chance(rng_, 0.5)) continue;
    layout = DrawLayout(rng_, limits);
    num_groups_ = 2;
  }
  OpenPool();
}

void Sequence::Require(bool holds, const std::string& what) const {
  if (!holds) Check(false, "sequence " + std::to_string(seed_) + ": " + what);
}

void Sequence::Run() {
  for (int64_t i = Draw(rng_, 20, 60); i > 0; --i) Step();
  End();
}

void Sequence::Step() {
  const int64_t choice = Draw(rng_, 0, 99);
  const bool any = !transfers_.empty();
  const size_t which = any ? static_cast<size_t>(rng_() % transfers_.size()) : 0;
  Leaves& leaves = *leaves_[static_cast<size_t>(rng_() % leaves_.size())];
  if (choice < 20) {
    if (transfers_.size() < kMostTransfers) StartTransfer();
  } else if (choice < 50) {
    if (any) RunProgram(which);
  } else if (choice < 62) {
    if (any) CloseTransfer(which);
  } else if (choice < 70) {
    if (any) Poll(which);
  } else if (choice < 80) {
    leaves.Overwrite(rng_);
  } else if (choice < 84) {
    leaves.Compare();
  } else if (choice < 88) {
    device_.RunSome();
  } else if (choice < 91) {
    CancelOrForget();
  } else if (choice < 94) {
    ClosePool();
  } else if (choice < 96) {
    Fit(record_step_ + 512 * Draw(rng_, 0, 8));
  } else if (choice < 97) {
    engine_->set_paths(DrawPaths(rng_));
  } else {
    InjectFailure();
  }
}

// -- pools --------------------------------------------------------------------------------------------------

void Sequence::OpenPool() {
  device_.RefuseHost(Chance(rng_, 0.3));
  pool_ = std::make_shared<PoolUse>();
  const int64_t num_bytes = num_records() * record_step_;
  pool_->pool = std::make_unique<HostPool>(device_, PoolKey{kPoolId, ++generation_}, num_bytes, rng_);
  pool_->readers.resize(static_cast<size_t>(num_records()));
  pool_->is_written.resize(static_cast<size_t>(num_records()));
  ++happenings_[pool_->pool->is_pinned() ? "pools pinned" : "pools not pinned"];
}

// Programs that have not run will find the pool gone; those that have keep it.
void Sequence::ClosePool() {
  pool_->pool->Close();
  pool_->is_open = false;
  Require(pool_->pool->is_alive() == (pool_->num_holders > 0), "a pool stays as long as it is used");
  if (pool_->num_holders > 0) ++happenings_["pools closed while in use"];
  OpenPool();
}

// -- transfers ----------------------------------------------------------------------------------------------

void Sequence::StartTransfer() {
  Transfer transfer = {};
  transfer.request.direction = Chance(rng_, 0.5) ? Direction::kToRecords : Direction::kToLeaves;
  transfer.request.pool = pool_->pool->key();
  transfer.request.number = next_number_++;
  transfer.use = pool_;
  transfer.leaves = static_cast<size_t>(rng_() % leaves_.size());
  transfer.is_prefetch = transfer.request.direction == Direction::kToLeaves && Chance(rng_, 0.4);
  transfer.has_geometry = transfer.is_prefetch || !Chance(rng_, 0.02);
  AddEntries(transfer);
  try {
    transfer.tag = OpenCall(*engine_, transfer.request);
  } catch (const CudaError&) {
    ++happenings_["tags refused"];
    return Unpin(transfer);
  }
  transfers_.push_back(std::move(transfer));
}

// Entries most of which can move, each with a record that it holds until it is closed.
void Sequence::AddEntries(Transfer& transfer) {
  const bool writes = transfer.request.direction == Direction::kToRecords;
  const int64_t num_blocks = leaves_[transfer.leaves]->layout().num_blocks();
  const auto step = static_cast<int32_t>(record_step_ / 512);
  for (int64_t i = Draw(rng_, 1, 7); i > 0; --i) {
    // A record is written before another group reads it, so each group has its own.
    const int64_t turn = Draw(rng_, 0, num_records() / num_groups_ - 1);
    auto record =
        static_cast<int32_t>(turn * num_groups_ + static_cast<int64_t>(transfer.leaves) % num_groups_);
    const auto k = static_cast<size_t>(record);
    const bool is_free = !transfer.use->is_written[k] && (!writes || transfer.use->readers[k] == 0);
    auto block = static_cast<int32_t>(Draw(rng_, 0, num_blocks - 1));
    int32_t address = record * step;
    if (!is_free || Chance(rng_, 0.03)) {
      record = -1;
      const int32_t end = static_cast<int32_t>(num_records()) * step;
      const int32_t bad[] = {-1, end, INT32_MAX, INT32_MIN};
      address = bad[Draw(rng_, 0, 3)];
    } else if (Chance(rng_, 0.03)) {
      const int32_t bad[] = {-2, static_cast<int32_t>(num_blocks), INT32_MAX, INT32_MIN};
      block = bad[Draw(rng_, 0, 3)];
    }
    if (Chance(rng_, 0.1)) block = -1;
    if (record >= 0 && writes) transfer.use->is_written[k] = true;
    if (record >= 0 && !writes) ++transfer.use->readers[k];
    transfer.request.blocks.push_back(block);
    transfer.request.addresses.push_back(address);
    transfer.records.push_back(record);
  }
}

StatusEntry Sequence::Judge(const Transfer& transfer, size_t j, const std::vector<int32_t>& seen) const {
  const Request& request = transfer.request;
  const int32_t block = request.blocks[j];
  const int64_t num_blocks =
      transfer.is_prefetch ? INT32_MAX : leaves_[transfer.leaves]->layout().num_blocks();
  const bool writes_leaves = request.direction == Direction::kToLeaves && !transfer.is_prefetch;
  if (std::count(cancelled_.begin(), cancelled_.end(), request.number) > 0) return kCancelled;
  if (!transfer.holds_pool) return kNoPool;
  if (!transfer.has_geometry) return kBadGeometry;
  if (block < 0 || block >= num_blocks) return kBadBlock;
  if (transfer.records[j] < 0) return kBadAddress;
  return writes_leaves && std::count(seen.begin(), seen.end(), block) > 0 ? kRepeated : kMoved;
}

// Works out what the status should be, when the program runs.
void Sequence::Expect(Transfer& transfer) {
  transfer.holds_pool = transfer.use->is_open;
  std::vector<int32_t> seen;
  bool any_refused = false;
  for (size_t j = 0; j < transfer.records.size(); ++j) {
    const int32_t block = transfer.request.blocks[j];
    if (block == -1) continue;
    const StatusEntry fate = Judge(transfer, j, seen);
    ++transfer.wanted[fate];
    ++happenings_["entries of fate " + std::to_string(fate)];
    if (fate == kMoved) {
      seen.push_back(block);
      continue;
    }
    transfer.records[j] = -2 - transfer.records[j];  // held, but not moved
    if (!any_refused) transfer.wanted[kFirstRefused] = static_cast<int32_t>(j);
    any_refused = true;
  }
}

bool Sequence::HasStaging(const Transfer& transfer) const {
  return leaves_[transfer.leaves]->layout().record_bytes <= staged_bytes_;
}

bool Sequence::Moves(const Transfer& transfer, size_t j) const {
  return transfer.request.blocks[j] != -1 && transfer.records[j] >= 0;
}

void Sequence::Model(const Transfer& transfer, bool fails) {
  Leaves& leaves = *leaves_[transfer.leaves];
  Known& records = transfer.use->pool->model();
  for (size_t j = 0; j < transfer.records.size(); ++j) {
    if (!Moves(transfer, j)) continue;
    const int64_t at = record_step_ * transfer.records[j];
    const int32_t block = transfer.request.blocks[j];
    const bool to_records = transfer.request.direction == Direction::kToRecords;
    if (fails && to_records) ForgetOffload(leaves.layout(), records, at);
    if (fails && !to_records) ForgetRestore(leaves.layout(), leaves.model(), block);
    if (!fails && to_records) ModelOffload(leaves.layout(), leaves.model(), block, records, at);
    if (!fails && !to_records) ModelRestore(leaves.layout(), leaves.model(), block, records, at);
  }
}

void Sequence::RunProgram(size_t which) {
  Transfer& transfer = transfers_[which];
  if (transfer.has_run) return;
  transfer.has_run = true;
  Expect(transfer);
  if (transfer.holds_pool) ++transfer.use->num_holders;
  transfer.has_copies = transfer.wanted[kMoved] > 0 && (!transfer.is_prefetch || HasStaging(transfer));
  if (transfer.is_prefetch) return RunPrefetch(transfer);
  RunMove(transfer);
  // The program's next steps, which may use the leaves as they please.
  Leaves& leaves = *leaves_[transfer.leaves];
  if (Chance(rng_, 0.5)) leaves.Compare();
  if (Chance(rng_, 0.5)) leaves.Overwrite(rng_);
}

void Sequence::RunPrefetch(Transfer& transfer) {
  const int64_t failed_before = device_.num_failed();
  engine_->Prefetch(transfer.tag, kPoolId, leaves_[transfer.leaves]->layout().record_bytes);
  transfer.fails_to_move = device_.num_failed() > failed_before || device_.is_lost();
  ++happenings_[transfer.fails_to_move ? "prefetches that failed" : "prefetches"];
}

void Sequence::RunMove(Transfer& transfer) {
  Leaves& leaves = *leaves_[transfer.leaves];
  std::optional<PageSet> pages;
  if (transfer.has_geometry) pages = leaves.pages();
  const int64_t failed_before = device_.num_failed();
  engine_->Move(transfer.request.direction, transfer.tag, kPoolId, pages, leaves.compute());
  transfer.fails_to_move = device_.num_failed() > failed_before || device_.is_lost();
  const bool is_stuck =
      !transfer.use->pool->is_pinned() && !HasStaging(transfer) && transfer.wanted[kMoved] > 0;
  if (!is_stuck) Model(transfer, transfer.fails_to_move);
  if (is_stuck) ++happenings_["moves that were stuck"];
  transfer.fails_to_move = transfer.fails_to_move || is_stuck;
  if (!transfer.fails_to_move) return;
  ++happenings_["moves that failed"];
  for (size_t j = 0; j < transfer.records.size(); ++j) {
    if (!Moves(transfer, j) || transfer.request.direction == Direction::kToLeaves) continue;
    const uint8_t* record = transfer.use->pool->data() + record_step_ * transfer.records[j];
    Require(!device_.IsAwaited(record, record_step_), "nothing uses the records of a failed transfer");
  }
}

void Sequence::CancelOrForget() {
  const auto number = static_cast<int32_t>(Draw(rng_, std::max(0, next_number_ - 4), next_number_));
  const auto found = std::find(cancelled_.begin(), cancelled_.end(), number);
  if (found == cancelled_.end()) {
    engine_->Cancel(number);
    cancelled_.push_back(number);
  } else {
    engine_->Forget(number);
    cancelled_.erase(found);
  }
}

void Sequence::Poll(size_t which) {
  const Transfer& transfer = transfers_[which];
  const int64_t failed_before = device_.num_failed();
  const bool has_ended = engine_->HasEnded(transfer.tag);
  const bool fails = transfer.fails_to_move || device_.is_lost() || device_.num_failed() > failed_before;
  Require(has_ended || transfer.has_run, "a call whose program has not run need not be waited for");
  if (!transfer.has_run) return;
  ++happenings_[has_ended ? "polls of what had ended" : "polls of what had not"];
  if (!has_ended) return;
  for (size_t j = 0; j < transfer.records.size() && !fails; ++j) {
    if (!Moves(transfer, j) || transfer.request.direction == Direction::kToLeaves) continue;
    const bool matches = transfer.use->pool->Matches(record_step_ * transfer.records[j], record_step_);
    Require(matches, "an offload that has ended has filled its records");
  }
  CloseTransfer(which);
}

void Sequence::CloseTransfer(size_t which) {
  const Transfer transfer = std::move(transfers_[which]);
  transfers_.erase(transfers_.begin() + static_cast<std::ptrdiff_t>(which));
  const int64_t failed_before = device_.num_failed();
  const bool was_lost = device_.is_lost();
  const Outcome outcome = engine_->Close(transfer.tag);
  if (transfer.holds_pool) --transfer.use->num_holders;
  JudgeOutcome(transfer, outcome, was_lost, device_.num_failed() > failed_before);
  Unpin(transfer);
  const bool is_held = transfer.use->is_open || transfer.use->num_holders > 0;
  Require(transfer.use->pool->is_alive() == is_held, "the last transfer lets go of a closed pool");
}

void Sequence::JudgeOutcome(const Transfer& transfer, const Outcome& outcome, bool was_lost, bool failed) {
  ++happenings_[transfer.has_run ? "transfers closed" : "transfers closed whose program never ran"];
  const bool has_error = !outcome.error.empty();
  if (!transfer.has_run) {
    const auto& status = outcome.status;
    Require(std::count(status.begin(), status.end(), 0) == kStatusSize, "what never ran has moved nothing");
    return Require(has_error, "a program that never ran is told");
  }
  const bool moves = transfer.has_copies;
  if (has_error) ++happenings_["transfers that failed"];
  if (!moves || (!transfer.fails_to_move && !failed && !device_.is_lost())) {
    Require(!has_error, "no failure is told but what happened: " + outcome.error);
  }
  if (moves && (transfer.fails_to_move || failed || was_lost)) Require(has_error, "every failure is told");
  if (has_error) return;
  for (size_t entry = 0; entry < kElapsedUs; ++entry) {
    Require(outcome.status[entry] == transfer.wanted[entry],
            "entry " + std::to_string(entry) + " of the status");
  }
}

// What the transfer read and wrote is the host's again.
void Sequence::Unpin(const Transfer& transfer) {
  const bool writes = transfer.request.direction == Direction::kToRecords;
  for (int32_t record : transfer.records) {
    if (record < -1) record = -2 - record;
    if (record < 0) continue;
    const auto k = static_cast<size_t>(record);
    if (writes) transfer.use->is_written[k] = false;
    if (!writes) --transfer.use->readers[k];
    if (!transfer.use->pool->is_alive() || device_.is_lost() || transfer.use->readers[k] > 0) continue;
    HostPool& pool = *transfer.use->pool;
    Require(pool.Matches(record_step_ * record, record_step_), "records hold their bytes");
    if (!Chance(rng_, 0.3)) continue;
    pool.Write(record_step_ * record, RandomBytes(rng_, record_step_));
    const auto address = static_cast<int32_t>(record_step_ / 512) * record;
    engine_->ForgetPrefetched(pool.key().generation, &address, 1);
  }
}

// -- disturbances -------------------------------------------------------------------------------------------

void Sequence::Fit(int64_t record_bytes) {
  engine_->Fit(record_bytes);
  const bool fits = engine_->staging_refusal().empty();
  if (fits) staged_bytes_ = std::max({staged_bytes_, record_bytes, options_.slot_bytes});
  ++happenings_[fits ? "growths" : "growths refused"];
}

void Sequence::InjectFailure() {
  if (Chance(rng_, 0.03)) {
    device_.LoseAfter(Draw(rng_, 0, 20));
    ++happenings_["devices lost"];
  } else {
    device_.FailCall(Draw(rng_, 1, 15));
  }
}

void Sequence::End() {
  device_.FailCall(0);
  while (!transfers_.empty()) {
    const auto which = static_cast<size_t>(rng_() % transfers_.size());
    if (Chance(rng_, 0.9)) RunProgram(which);
    CloseTransfer(which);
  }
  for (const auto& leaves : leaves_) leaves->Compare();
  device_.RunAll();
  for (const auto& leaves : leaves_) Require(leaves->Findings().empty(), leaves->Findings());
  pool_->pool->Close();
  Require(!pool_->pool->is_alive(), "a pool that was closed and is not used ends");
  if (Chance(rng_, 0.5)) leaves_.clear();
  engine_.reset();
  leaves_.clear();
  Require(device_.Violations().empty(), device_.Violations());
  Require(device_.Leaks().empty(), device_.Leaks());
}

}  // namespace jaxkv::cuda
