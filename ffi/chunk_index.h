// Which chunks a pool holds, who uses them, and which go when room is needed. Moves no bytes, knows no
// Python.
#ifndef JAXKV_CHUNK_INDEX_H_
#define JAXKV_CHUNK_INDEX_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "eviction_policy.h"
#include "key_table.h"
#include "request_log.h"
#include "slab_order.h"
#include "slots.h"
#include "store_tracker.h"

namespace jaxkv {

// A call that does not fit what the index holds: nothing was changed.
class KeyStateError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// Keys of one call, `size` of each array. Positions are those within the request.
struct KeyBatch {
  const OffloadKey* keys;
  const Position* positions;
  size_t size;
};

enum class Found : uint8_t { kMiss, kReadable, kPending };

struct StoreOutcome {
  bool accepted = false;           // False: there is no room for the keys now.
  std::vector<uint32_t> to_store;  // Of the offered keys, those that must be written, in their order.
  std::vector<SlotRef> slots;      // One for each of them.
  std::vector<OffloadKey> evicted;
};

struct IndexOptions {
  MakeEvictionPolicy make_policy;
  int64_t store_threshold = 1;  // A key is stored from this offer on.
  size_t max_tracked_keys = 64000;
};

struct IndexCounts {
  int64_t num_chunks = 0;     // Readable or being written.
  int64_t num_in_use = 0;     // Slots that jobs use, those of forgotten chunks included.
  int64_t num_forgotten = 0;  // Slots of forgotten chunks.
  int64_t num_evicted = 0;
  int64_t num_below_threshold = 0;  // Keys not stored because they were offered too seldom.
};

// The slots of chunks have one size per group; groups of one stride share a policy. Every call takes time in
// proportion to the keys it names and the chunks it evicts, but for Reset and those that list what is held.
//
// A chunk forgotten while jobs use it keeps its slot until the last of them ends; until then its key is not
// found and not stored anew, so that a late completion is never taken for that of a newer job.
class ChunkIndex {
 public:
  // `slot_bytes` by group. Throws SizeError for sizes no slot can have, std::length_error for too many
  // groups.
  ChunkIndex(std::shared_ptr<SlotPool> pool, std::vector<int64_t> slot_bytes, IndexOptions options);
  ~ChunkIndex() = default;
  ChunkIndex(const ChunkIndex&) = delete;
  ChunkIndex& operator=(const ChunkIndex&) = delete;

  size_t num_groups() const { return size_of_group_.size(); }

  void Lookup(const OffloadKey* keys, size_t n, Found* found) const;
  // Throws KeyStateError for a key of a group there is not, as PrepareStore does.
  void CheckGroups(KeyBatch batch) const;

  // A request exists. Optional: the first call that names it does the same.
  void BeginRequest(const std::string& request) { log_[request]; }
  // Ranks what the request asked for anew, last token first.
  void EndRequest(const std::string& request);

  // Uses readable chunks until CompleteLoad and writes their slots. Throws KeyStateError.
  void PrepareLoad(const std::string& request, KeyBatch batch, SlotRef* slots);
  // Ends uses. Without success the chunks are forgotten. Answers which of the keys were held until now and
  // are no more. Throws KeyStateError.
  std::vector<uint32_t> CompleteLoad(KeyBatch batch, bool success);

  // Makes room for those keys that are not held. All or nothing, but for chunks evicted in vain because
  // others keep their slots.
  StoreOutcome PrepareStore(const std::string& request, KeyBatch batch);
  // Ends stores. Answers which of the keys became readable. Throws KeyStateError.
  std::vector<uint32_t> CompleteStore(KeyBatch batch, bool success);

  // The first key becomes the hottest.
  void Touch(KeyBatch batch);

  // Forgets everything, and answers the keys that were readable.
  std::vector<OffloadKey> Reset();
  // Gives every slot back, also those in use.
  void Abandon();

  IndexCounts counts() const { return counts_; }
  std::vector<std::pair<OffloadKey, uint32_t>> InUse() const;
  size_t num_requests() const { return log_.size(); }
  // Keys that have a number: those of chunks, of requests that have not ended, ghosts and tracked keys.
  size_t num_keys() const { return keys_.num_keys(); }

 private:
  // Sizes that share a stride, and with it slabs and a policy.
  struct SizeClass {
    int64_t stride;
    int64_t slots_per_slab;
    std::unique_ptr<EvictionPolicy> policy;
  };
  class Offer;

  size_t SizeOf(KeyId id) const { return size_of_group_[keys_[id].key.group()]; }
  EvictionPolicy& PolicyOf(KeyId id) { return *sizes_[SizeOf(id)].policy; }
  SlabId SlabOf(SlotRef slot) const { return static_cast<SlabId>(slot.offset / slab_bytes_); }

  void PrefetchChunk(KeyId id) const {
    Prefetch(&keys_[id]);
    Prefetch(&nodes_[id]);
  }

  void LearnCut();
  std::vector<KeyId> FindAll(KeyBatch batch) const;
  void CheckUses(KeyBatch batch, const std::vector<KeyId>& ids, ChunkState wanted);

  void BeginUse(KeyId id);
  void EndUse(KeyId id);
  void Forget(KeyId id);
  void ReleaseSlot(KeyId id);
  // What a policy answered that was offered the next rank for a chunk.
  void NoteRank(KeyId id, bool was_given);

  void SelectToStore(Offer* offer);
  void NoteOffer(const std::string& request, const Offer& offer);
  bool MakeRoom(Offer* offer, StoreOutcome* outcome);
  bool TakeFreeSlots(Offer* offer);
  bool PlanRoom(const Offer& offer, std::vector<KeyId>* victims);
  bool PlanSlot(size_t size, std::vector<int64_t>* spare, std::vector<KeyId>* victims);
  void PlanToEvict(KeyId id, std::vector<KeyId>* victims);
  void Evict(const std::vector<KeyId>& victims, StoreOutcome* outcome);
  void Admit(const std::string& request, const Offer& offer, StoreOutcome* outcome);

  std::shared_ptr<SlotPool> pool_;
  std::vector<int64_t> slot_bytes_;      // By group.
  std::vector<uint32_t> size_of_group_;  // Indices of sizes_.
  KeyTable keys_;
  RankNodes nodes_;
  std::vector<SizeClass> sizes_;
  SlabOrder slabs_;
  RequestLog log_;
  std::optional<StoreTracker> tracker_;
  const int64_t store_threshold_;
  int64_t slab_bytes_ = 0;
  uint64_t clock_ = 0;
  IndexCounts counts_;
};

}  // namespace jaxkv

#endif  // JAXKV_CHUNK_INDEX_H_
