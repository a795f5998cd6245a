// The part of ChunkIndex that makes room for what is stored.
#include <utility>

#include "chunk_index.h"

namespace jaxkv {

// The keys of one call, each once. While it lives they have numbers and are marked, so that none of them is
// given up.
class ChunkIndex::Offer {
 public:
  struct Key {
    KeyId id;
    uint32_t place;  // In the batch.
    Position position;
    bool to_store = false;
    std::optional<SlotRef> slot;
  };

  Offer(KeyTable* table, KeyBatch batch) : table_(table), ids_(batch.size) {
    table->Intern(batch.keys, batch.size, ids_.data());
    keys.reserve(batch.size);
    for (size_t i = 0; i < batch.size; ++i) {
      bool& marked = (*table)[ids_[i]].marked;
      if (!marked)
        keys.push_back({ids_[i], static_cast<uint32_t>(i), batch.positions[i], false, std::nullopt});
      marked = true;
    }
  }
  ~Offer() {
    for (const KeyId id : ids_) (*table_)[id].marked = false;
    for (const KeyId id : ids_) table_->Unref(id);
  }
  Offer(const Offer&) = delete;
  Offer& operator=(const Offer&) = delete;

  std::vector<Key> keys;
  bool unsure = false;  // A key to store is that of a forgotten chunk somebody uses.

 private:
  KeyTable* table_;
  std::vector<KeyId> ids_;
};

StoreOutcome ChunkIndex::PrepareStore(const std::string& request, KeyBatch batch) {
  CheckGroups(batch);
  LearnCut();
  Offer offer(&keys_, batch);
  nodes_.Reach(keys_.end());
  SelectToStore(&offer);
  NoteOffer(request, offer);
  StoreOutcome outcome;
  outcome.accepted = !offer.unsure && MakeRoom(&offer, &outcome);
  if (outcome.accepted) Admit(request, offer, &outcome);
  return outcome;
}

void ChunkIndex::SelectToStore(Offer* offer) {
  if (tracker_) {
    std::vector<KeyId> ids;
    for (const Offer::Key& key : offer->keys) ids.push_back(key.id);
    tracker_->Offer(ids);
  }
  for (Offer::Key& key : offer->keys) {
    const Chunk& chunk = keys_[key.id];
    if (chunk.resident()) continue;
    key.to_store = !tracker_ || tracker_->Count(key.id) >= store_threshold_;
    counts_.num_below_threshold += !key.to_store;
    offer->unsure |= key.to_store && chunk.state == ChunkState::kForgotten;
  }
}

void ChunkIndex::NoteOffer(const std::string& request, const Offer& offer) {
  RequestRecord& record = log_[request];
  std::vector<KeyId> missed;
  for (const Offer::Key& key : offer.keys) {
    if (!key.to_store && keys_[key.id].state != ChunkState::kReadable) continue;
    Access& access = record.See(key.id, key.position, &keys_);
    if (!key.to_store) {
      access.reused |= !access.inserted;
    } else if (!access.missed) {
      access.missed = true;
      missed.push_back(key.id);
    }
  }
  for (size_t i = missed.size(); i-- > 0;) PolicyOf(missed[i]).MissStore(missed[i]);
}

bool ChunkIndex::MakeRoom(Offer* offer, StoreOutcome* outcome) {
  if (TakeFreeSlots(offer)) return true;
  std::vector<KeyId> victims;
  if (PlanRoom(*offer, &victims)) {
    Evict(victims, outcome);
    // A slot that somebody still views does not come back when it is freed, so this can fail once more.
    if (TakeFreeSlots(offer)) return true;
  }
  for (const Offer::Key& key : offer->keys) {
    if (key.slot) pool_->Free(*key.slot);
  }
  return false;
}

bool ChunkIndex::TakeFreeSlots(Offer* offer) {
  std::vector<bool> full(sizes_.size());
  bool all = true;
  for (Offer::Key& key : offer->keys) {
    if (!key.to_store || key.slot) continue;
    const size_t size = SizeOf(key.id);
    if (!full[size]) key.slot = pool_->Reserve(slot_bytes_[keys_[key.id].key.group()]);
    full[size] = !key.slot;
    all &= key.slot.has_value();
  }
  return all;
}

bool ChunkIndex::PlanRoom(const Offer& offer, std::vector<KeyId>* victims) {
  for (SizeClass& size : sizes_) size.policy->BeginPlan();
  slabs_.BeginPlan();
  for (const Offer::Key& key : offer.keys) {
    if (keys_[key.id].resident()) slabs_.Close(SlabOf(keys_[key.id].slot));
    if (key.slot) slabs_.Close(SlabOf(*key.slot));
  }
  std::vector<int64_t> spare(sizes_.size());
  bool possible = true;
  for (const Offer::Key& key : offer.keys) {
    if (key.to_store && !key.slot) possible = possible && PlanSlot(SizeOf(key.id), &spare, victims);
  }
  for (SizeClass& size : sizes_) size.policy->EndPlan();
  slabs_.EndPlan();
  for (const KeyId id : *victims) keys_[id].marked = false;
  return possible;
}

bool ChunkIndex::PlanSlot(size_t size, std::vector<int64_t>* spare, std::vector<KeyId>* victims) {
  int64_t& num_spare = (*spare)[size];
  if (num_spare > 0) {
    --num_spare;
    return true;
  }
  const KeyId victim = sizes_[size].policy->NextVictim();
  const SlabId slab = sizes_[size].slots_per_slab > 0 ? slabs_.ColdestOutside(size) : kNoSlab;
  if (slab != kNoSlab && (victim == kNoKey || slabs_.rank(slab) < nodes_[victim].rank)) {
    slabs_.ForEachChunk(slab, [&](KeyId id) { PlanToEvict(id, victims); });
    slabs_.Close(slab);
    num_spare = sizes_[size].slots_per_slab - 1;
    return true;
  }
  if (victim == kNoKey) return false;
  slabs_.Close(SlabOf(keys_[victim].slot));
  PlanToEvict(victim, victims);
  return true;
}

void ChunkIndex::PlanToEvict(KeyId id, std::vector<KeyId>* victims) {
  keys_[id].marked = true;
  PolicyOf(id).PlanToEvict(id);
  victims->push_back(id);
}

void ChunkIndex::Evict(const std::vector<KeyId>& victims, StoreOutcome* outcome) {
  for (const KeyId id : victims) {
    outcome->evicted.push_back(keys_[id].key);
    PolicyOf(id).Evict(id);
    ReleaseSlot(id);
  }
  counts_.num_chunks -= static_cast<int64_t>(victims.size());
  counts_.num_evicted += static_cast<int64_t>(victims.size());
  for (SizeClass& size : sizes_) size.policy->EndEviction();
}

void ChunkIndex::Admit(const std::string& request, const Offer& offer, StoreOutcome* outcome) {
  RequestRecord& record = log_[request];
  for (const Offer::Key& key : offer.keys) {
    if (!key.to_store) continue;
    Chunk& chunk = keys_[key.id];
    chunk.state = ChunkState::kWriting;
    chunk.slot = *key.slot;
    keys_.Ref(key.id);
    PolicyOf(key.id).Insert(key.id, ++clock_);
    slabs_.Add(SlabOf(chunk.slot), SizeOf(key.id), key.id, clock_);
    BeginUse(key.id);
    ++counts_.num_chunks;
    record.See(key.id, key.position, &keys_).inserted = true;
    outcome->to_store.push_back(key.place);
    outcome->slots.push_back(chunk.slot);
  }
}

}  // namespace jaxkv
