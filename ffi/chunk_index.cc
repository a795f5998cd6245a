#include "chunk_index.h"

#include <algorithm>
#include <limits>

namespace jaxkv {
namespace {

constexpr size_t kAhead = 8;
constexpr size_t kMaxGroups = std::numeric_limits<uint16_t>::max();

// The strides of slots, each once, in the order of their first group.
std::vector<int64_t> DistinctStrides(const std::vector<int64_t>& slot_bytes) {
  std::vector<int64_t> strides;
  for (const int64_t bytes : slot_bytes) {
    const int64_t stride = SlotStride(bytes);
    if (std::find(strides.begin(), strides.end(), stride) == strides.end()) strides.push_back(stride);
  }
  return strides;
}

size_t MostChunks(const SlotPool& pool, const std::vector<int64_t>& slot_bytes) {
  const std::vector<int64_t> strides = DistinctStrides(slot_bytes);
  if (strides.empty()) return 0;
  return static_cast<size_t>(pool.capacity_bytes() / *std::min_element(strides.begin(), strides.end()));
}

}  // namespace

ChunkIndex::ChunkIndex(std::shared_ptr<SlotPool> pool, std::vector<int64_t> slot_bytes, IndexOptions options)
    : pool_(std::move(pool)),
      slot_bytes_(std::move(slot_bytes)),
      keys_(MostChunks(*pool_, slot_bytes_)),
      slabs_(DistinctStrides(slot_bytes_).size()),
      log_(&keys_),
      store_threshold_(options.store_threshold) {
  if (slot_bytes_.size() > kMaxGroups) throw std::length_error("an index serves at most 65535 groups");
  const std::vector<int64_t> strides = DistinctStrides(slot_bytes_);
  for (const int64_t stride : strides) {
    sizes_.push_back({stride, 0, options.make_policy(PolicyContext{&keys_, &nodes_})});
  }
  for (const int64_t bytes : slot_bytes_) {
    const auto found = std::find(strides.begin(), strides.end(), SlotStride(bytes));
    size_of_group_.push_back(static_cast<uint32_t>(found - strides.begin()));
  }
  if (store_threshold_ > 1) tracker_.emplace(options.max_tracked_keys, &keys_);
  LearnCut();
}

void ChunkIndex::LearnCut() {
  if (counts_.num_chunks + counts_.num_forgotten != 0) return;
  slab_bytes_ = pool_->slab_bytes();
  for (SizeClass& size : sizes_) {
    size.slots_per_slab = pool_->SlotsPerSlab(size.stride);
    size.policy->SetCapacity(size.slots_per_slab * pool_->num_slabs());
  }
}

// -- what is asked
// --------------------------------------------------------------------------------------------

void ChunkIndex::CheckGroups(KeyBatch batch) const {
  for (size_t i = 0; i < batch.size; ++i) {
    if (batch.keys[i].group() < num_groups()) continue;
    throw KeyStateError("key " + batch.keys[i].ToHex() + " is of group " +
                        std::to_string(batch.keys[i].group()) + ", but the pool serves " +
                        std::to_string(num_groups()) + " groups");
  }
}

std::vector<KeyId> ChunkIndex::FindAll(KeyBatch batch) const {
  std::vector<KeyId> ids(batch.size);
  keys_.Find(batch.keys, batch.size, ids.data());
  return ids;
}

void ChunkIndex::Lookup(const OffloadKey* keys, size_t n, Found* found) const {
  constexpr size_t kAtOnce = 64;
  KeyId ids[kAtOnce];
  for (size_t first = 0; first < n; first += kAtOnce) {
    const size_t count = std::min(kAtOnce, n - first);
    keys_.Find(keys + first, count, ids);
    for (size_t i = 0; i < count; ++i) {
      const ChunkState state = ids[i] == kNoKey ? ChunkState::kAbsent : keys_[ids[i]].state;
      found[first + i] = state == ChunkState::kReadable  ? Found::kReadable
                         : state == ChunkState::kWriting ? Found::kPending
                                                         : Found::kMiss;
    }
  }
}

std::vector<std::pair<OffloadKey, uint32_t>> ChunkIndex::InUse() const {
  std::vector<std::pair<OffloadKey, uint32_t>> in_use;
  for (KeyId id = 0; id < keys_.end() && counts_.num_in_use != 0; ++id) {
    const Chunk& chunk = keys_[id];
    if (chunk.state != ChunkState::kAbsent && chunk.uses != 0) in_use.emplace_back(chunk.key, chunk.uses);
  }
  return in_use;
}

// -- uses
// -----------------------------------------------------------------------------------------------------

void ChunkIndex::BeginUse(KeyId id) {
  Chunk& chunk = keys_[id];
  if (chunk.uses++ != 0) return;
  ++counts_.num_in_use;
  slabs_.BeginUse(SlabOf(chunk.slot));
}

void ChunkIndex::EndUse(KeyId id) {
  Chunk& chunk = keys_[id];
  if (--chunk.uses != 0) return;
  --counts_.num_in_use;
  slabs_.EndUse(SlabOf(chunk.slot));
  if (chunk.resident()) {
    PolicyOf(id).EndUse(id);
  } else {
    --counts_.num_forgotten;
    ReleaseSlot(id);
  }
}

void ChunkIndex::Forget(KeyId id) {
  Chunk& chunk = keys_[id];
  PolicyOf(id).Remove(id);
  --counts_.num_chunks;
  if (chunk.uses != 0) {
    chunk.state = ChunkState::kForgotten;
    ++counts_.num_forgotten;
  } else {
    ReleaseSlot(id);
  }
}

void ChunkIndex::ReleaseSlot(KeyId id) {
  Chunk& chunk = keys_[id];
  slabs_.Remove(SlabOf(chunk.slot), id);
  pool_->Free(chunk.slot);
  chunk.state = ChunkState::kAbsent;
  keys_.Unref(id);
}

void ChunkIndex::NoteRank(KeyId id, bool was_given) {
  if (!was_given) return;
  ++clock_;
  slabs_.Rank(SlabOf(keys_[id].slot), clock_);
}

void ChunkIndex::PrepareLoad(const std::string& request, KeyBatch batch, SlotRef* slots) {
  const std::vector<KeyId> ids = FindAll(batch);
  for (size_t i = 0; i < batch.size; ++i) {
    if (ids[i] != kNoKey && keys_[ids[i]].state == ChunkState::kReadable) continue;
    throw KeyStateError("key " + batch.keys[i].ToHex() +
                        " cannot be loaded; load only what a lookup answered HIT for, in the same step");
  }
  RequestRecord& record = log_[request];
  for (size_t i = 0; i < batch.size; ++i) {
    BeginUse(ids[i]);
    slots[i] = keys_[ids[i]].slot;
    Access& access = record.See(ids[i], batch.positions[i], &keys_);
    if (!access.inserted) access.reused = true;
  }
}

void ChunkIndex::CheckUses(KeyBatch batch, const std::vector<KeyId>& ids, ChunkState wanted) {
  const auto ends = [&](KeyId id) {
    if (id == kNoKey || keys_[id].state == ChunkState::kAbsent) return false;
    return (keys_[id].state == wanted || keys_[id].state == ChunkState::kForgotten) && keys_[id].uses != 0;
  };
  size_t num_ended = 0;
  for (; num_ended < batch.size && ends(ids[num_ended]); ++num_ended) --keys_[ids[num_ended]].uses;
  for (size_t i = 0; i < num_ended; ++i) ++keys_[ids[i]].uses;
  if (num_ended == batch.size) return;
  throw KeyStateError("key " + batch.keys[num_ended].ToHex() +
                      " was not prepared so often; complete each load and store once, with its own keys");
}

std::vector<uint32_t> ChunkIndex::CompleteLoad(KeyBatch batch, bool success) {
  const std::vector<KeyId> ids = FindAll(batch);
  CheckUses(batch, ids, ChunkState::kReadable);
  std::vector<uint32_t> lost;
  for (size_t i = 0; i < batch.size; ++i) {
    if (!success && keys_[ids[i]].resident()) {
      lost.push_back(static_cast<uint32_t>(i));
      Forget(ids[i]);
    }
    EndUse(ids[i]);
  }
  return lost;
}

std::vector<uint32_t> ChunkIndex::CompleteStore(KeyBatch batch, bool success) {
  const std::vector<KeyId> ids = FindAll(batch);
  CheckUses(batch, ids, ChunkState::kWriting);
  std::vector<uint32_t> landed;
  for (size_t i = 0; i < batch.size; ++i) {
    Chunk& chunk = keys_[ids[i]];
    if (chunk.resident() && success) {
      landed.push_back(static_cast<uint32_t>(i));
      chunk.state = ChunkState::kReadable;
    } else if (chunk.resident()) {
      Forget(ids[i]);
    }
    EndUse(ids[i]);
  }
  return landed;
}

// -- recency
// --------------------------------------------------------------------------------------------------

void ChunkIndex::Touch(KeyBatch batch) {
  const std::vector<KeyId> ids = FindAll(batch);
  for (size_t i = batch.size; i-- > 0;) {
    if (ids[i] != kNoKey) NoteRank(ids[i], PolicyOf(ids[i]).Touch(ids[i], clock_ + 1));
  }
}

void ChunkIndex::EndRequest(const std::string& request) {
  RequestRecord record = log_.Take(request);
  record.Sort();
  const std::vector<Access>& accesses = record.accesses();
  for (size_t i = accesses.size(); i-- > 0;) {
    if (i >= kAhead) PrefetchChunk(accesses[i - kAhead].id);
    const KeyId id = accesses[i].id;
    NoteRank(id, PolicyOf(id).EndRequest(id, accesses[i].kind(), clock_ + 1));
  }
  log_.Release(record);
}

// -- everything
// -----------------------------------------------------------------------------------------------

std::vector<OffloadKey> ChunkIndex::Reset() {
  std::vector<OffloadKey> removed;
  for (KeyId id = 0; id < keys_.end(); ++id) {
    const Chunk& chunk = keys_[id];
    if (!chunk.resident()) continue;
    if (chunk.state == ChunkState::kReadable) removed.push_back(chunk.key);
    Forget(id);
  }
  for (SizeClass& size : sizes_) size.policy->Clear();
  log_.Clear();
  return removed;
}

void ChunkIndex::Abandon() {
  Reset();
  for (KeyId id = 0; id < keys_.end(); ++id) {
    if (keys_[id].state != ChunkState::kForgotten) continue;
    keys_[id].uses = 1;
    EndUse(id);
  }
}

}  // namespace jaxkv
