#include "eviction_policy.h"

#include <algorithm>

namespace jaxkv {

bool LruPolicy::Touch(KeyId id, uint64_t rank) {
  if (!chunks_.Has(id)) return false;
  chunks_.Remove(id);
  chunks_.Append(id, rank);
  return true;
}

ArcPolicy::ArcPolicy(PolicyContext context)
    : EvictionPolicy(context),
      t1_(context.nodes, 0),
      t2_(context.nodes, 1),
      b1_(context.nodes, 2),
      b2_(context.nodes, 3) {}

void ArcPolicy::Insert(KeyId id, uint64_t rank) {
  for (RankedList* ghosts : {&b1_, &b2_}) {
    if (ghosts->Has(id)) ForgetGhost(ghosts, id);
  }
  t1_.Append(id, rank);
}

void ArcPolicy::Remove(KeyId id) { (t1_.Has(id) ? t1_ : t2_).Remove(id); }

void ArcPolicy::Evict(KeyId id) {
  RankedList* ghosts = t1_.Has(id) ? &b1_ : &b2_;
  Remove(id);
  Haunt(ghosts, id);
}

void ArcPolicy::EndUse(KeyId id) { (t1_.Has(id) ? t1_ : t2_).EndUse(id); }

bool ArcPolicy::Touch(KeyId id, uint64_t rank) {
  if (t1_.Has(id)) {
    // A chunk that is still being written was used once.
    const bool again = (*context_.keys)[id].state == ChunkState::kReadable;
    Move(&t1_, again ? &t2_ : &t1_, id, rank);
    return true;
  }
  if (t2_.Has(id)) {
    Move(&t2_, &t2_, id, rank);
    return true;
  }
  AdaptToGhost(id);
  return false;
}

bool ArcPolicy::EndRequest(KeyId id, AccessKind kind, uint64_t rank) {
  RankedList* list = t1_.Has(id) ? &t1_ : t2_.Has(id) ? &t2_ : nullptr;
  if (list == nullptr || kind == AccessKind::kSeen) return false;
  Move(list, kind == AccessKind::kReused ? &t2_ : list, id, rank);
  return true;
}

void ArcPolicy::Clear() {
  for (RankedList* ghosts : {&b1_, &b2_}) {
    while (ghosts->size() != 0) ForgetGhost(ghosts, ghosts->first());
  }
  target_ = 0;
}

void ArcPolicy::BeginPlan() {
  t1_search_ = t1_.Begin();
  t2_search_ = t2_.Begin();
  num_planned_t1_ = 0;
}

KeyId ArcPolicy::NextVictim() {
  const auto judge = [this](KeyId id) { return Judge(id); };
  const int64_t t1_size = static_cast<int64_t>(t1_.size()) - num_planned_t1_;
  KeyId victim = kNoKey;
  if (t1_size >= static_cast<int64_t>(target_)) victim = t1_.Next(&t1_search_, judge);
  if (victim == kNoKey) victim = t2_.Next(&t2_search_, judge);
  if (victim == kNoKey) victim = t1_.Next(&t1_search_, judge);
  return victim;
}

void ArcPolicy::EndEviction() {
  for (RankedList* ghosts : {&b1_, &b2_}) {
    while (static_cast<int64_t>(ghosts->size()) > capacity_) ForgetGhost(ghosts, ghosts->first());
  }
}

void ArcPolicy::AdaptToGhost(KeyId id) {
  const auto size1 = static_cast<double>(b1_.size());
  const auto size2 = static_cast<double>(b2_.size());
  if (b1_.Has(id)) {
    target_ = std::min(target_ + std::max(1.0, size2 / size1), static_cast<double>(capacity_));
    Move(&b1_, &b1_, id, 0);
  } else if (b2_.Has(id)) {
    target_ = std::max(target_ - std::max(1.0, size1 / size2), 0.0);
    Move(&b2_, &b2_, id, 0);
  }
}

void ArcPolicy::Haunt(RankedList* ghosts, KeyId id) {
  context_.keys->Ref(id);
  ghosts->Append(id, 0);
}

void ArcPolicy::ForgetGhost(RankedList* ghosts, KeyId id) {
  ghosts->Remove(id);
  context_.keys->Unref(id);
}

void ArcPolicy::Move(RankedList* from, RankedList* to, KeyId id, uint64_t rank) {
  from->Remove(id);
  to->Append(id, rank);
}

}  // namespace jaxkv
