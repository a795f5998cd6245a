// Which chunk is given up first. Orders chunks of one slot size; frees and reserves nothing.
//
// Rules as in vLLM 0.32's LRUCachePolicy and ARCCachePolicy: a chunk has the rank of its insertion until a
// request that asked for it ends; that a job uses it changes no rank.
#ifndef JAXKV_EVICTION_POLICY_H_
#define JAXKV_EVICTION_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "key_table.h"
#include "ranked_list.h"

namespace jaxkv {

// What a request that ends had done with a chunk.
enum class AccessKind : uint8_t {
  kSeen,      // Asked for while it was not readable, or not stored for want of room.
  kInserted,  // Stored, and not read but by the request that stored it.
  kReused,    // Found readable.
};

// What all policies of an index share.
struct PolicyContext {
  KeyTable* keys;
  RankNodes* nodes;  // By KeyId.
};

// Ranks given later are higher. Where a method answers whether it gave the chunk `rank`, a chunk that is not
// resident gets none.
class EvictionPolicy {
 public:
  explicit EvictionPolicy(PolicyContext context) : context_(context) {}
  virtual ~EvictionPolicy() = default;
  EvictionPolicy(const EvictionPolicy&) = delete;
  EvictionPolicy& operator=(const EvictionPolicy&) = delete;

  // Slots of this size the pool could hold.
  virtual void SetCapacity(int64_t num_slots) = 0;
  // A chunk got its slot and is being written. Gives it `rank`.
  virtual void Insert(KeyId id, uint64_t rank) = 0;
  // A chunk is forgotten: it was lost or was never there.
  virtual void Remove(KeyId id) = 0;
  // A chunk is given up for another.
  virtual void Evict(KeyId id) = 0;
  // The last use of a chunk ended.
  virtual void EndUse(KeyId id) = 0;
  // Somebody says that a chunk, resident or not, was of use.
  virtual bool Touch(KeyId id, uint64_t rank) = 0;
  // A request ended that had asked for a chunk. Called last token first.
  virtual bool EndRequest(KeyId id, AccessKind kind, uint64_t rank) = 0;
  // A request wants to store a chunk that is not resident.
  virtual void MissStore(KeyId) {}
  // All chunks were removed; forget what else there is.
  virtual void Clear() {}

  // A plan, from BeginPlan to EndPlan: names victims one after another, and changes nothing.
  virtual void BeginPlan() = 0;
  // The next chunk to give up that is neither in use nor marked, or kNoKey.
  virtual KeyId NextVictim() = 0;
  // The caller marked a chunk of this policy, to give it up.
  virtual void PlanToEvict(KeyId) {}
  virtual void EndPlan() {}
  // All victims of a plan were evicted.
  virtual void EndEviction() {}

 protected:
  // For RankedList: whether a chunk can be given up now.
  Verdict Judge(KeyId id) const {
    const Chunk& chunk = (*context_.keys)[id];
    if (chunk.uses != 0) return Verdict::kInUse;
    return chunk.marked ? Verdict::kSkip : Verdict::kTake;
  }

  const PolicyContext context_;
};

using MakeEvictionPolicy = std::function<std::unique_ptr<EvictionPolicy>(PolicyContext)>;

// Gives up the chunk whose rank is lowest.
class LruPolicy final : public EvictionPolicy {
 public:
  explicit LruPolicy(PolicyContext context) : EvictionPolicy(context), chunks_(context.nodes, 0) {}

  void SetCapacity(int64_t) override {}
  void Insert(KeyId id, uint64_t rank) override { chunks_.Append(id, rank); }
  void Remove(KeyId id) override { chunks_.Remove(id); }
  void Evict(KeyId id) override { chunks_.Remove(id); }
  void EndUse(KeyId id) override { chunks_.EndUse(id); }
  bool Touch(KeyId id, uint64_t rank) override;
  bool EndRequest(KeyId id, AccessKind, uint64_t rank) override { return Touch(id, rank); }
  void BeginPlan() override { search_ = chunks_.Begin(); }
  KeyId NextVictim() override {
    return chunks_.Next(&search_, [this](KeyId id) { return Judge(id); });
  }

 private:
  RankedList chunks_;
  RankedList::Search search_;
};

// Adaptive replacement: chunks seen once (T1) and more often (T2), and ghosts, the keys of those given up
// from either (B1, B2). A store of a ghost moves the target size of T1.
class ArcPolicy final : public EvictionPolicy {
 public:
  explicit ArcPolicy(PolicyContext context);

  // Each list of ghosts is as long at most.
  void SetCapacity(int64_t num_slots) override { capacity_ = num_slots; }
  void Insert(KeyId id, uint64_t rank) override;
  void Remove(KeyId id) override;
  void Evict(KeyId id) override;
  void EndUse(KeyId id) override;
  bool Touch(KeyId id, uint64_t rank) override;
  bool EndRequest(KeyId id, AccessKind kind, uint64_t rank) override;
  void MissStore(KeyId id) override { AdaptToGhost(id); }
  void Clear() override;
  void BeginPlan() override;
  KeyId NextVictim() override;
  void PlanToEvict(KeyId id) override { num_planned_t1_ += t1_.Has(id); }
  void EndEviction() override;

  double target() const { return target_; }

 private:
  void AdaptToGhost(KeyId id);
  void Haunt(RankedList* ghosts, KeyId id);
  void ForgetGhost(RankedList* ghosts, KeyId id);
  void Move(RankedList* from, RankedList* to, KeyId id, uint64_t rank);

  int64_t capacity_ = 0;
  double target_ = 0;  // Of the size of T1.
  RankedList t1_, t2_, b1_, b2_;
  RankedList::Search t1_search_, t2_search_;
  int64_t num_planned_t1_ = 0;
};

}  // namespace jaxkv

#endif  // JAXKV_EVICTION_POLICY_H_
