#include "slab_order.h"

namespace jaxkv {

SlabOrder::SlabOrder(size_t num_sizes) {
  if (num_sizes < 2) return;
  lists_.reserve(num_sizes);
  for (size_t size = 0; size < num_sizes; ++size) lists_.emplace_back(&nodes_, 0);
}

void SlabOrder::Add(SlabId slab, size_t size, KeyId id, uint64_t rank) {
  if (lists_.empty()) return;
  slabs_.Reach(slab + size_t{1});
  nodes_.Reach(slab + size_t{1});
  links_.Reach(id + size_t{1});
  Slab& entry = slabs_[slab];
  if (entry.num_chunks == 0) {
    entry = {kNoKey, kNoKey, 0, 0, static_cast<uint32_t>(size), entry.closed};
    ListOf(slab).Append(slab, rank);
  }
  links_[id] = {entry.last, kNoKey};
  (entry.last == kNoKey ? entry.first : links_[entry.last].after) = id;
  entry.last = id;
  ++entry.num_chunks;
  Rank(slab, rank);
}

void SlabOrder::Remove(SlabId slab, KeyId id) {
  if (lists_.empty()) return;
  Slab& entry = slabs_[slab];
  const Link link = links_[id];
  (link.before == kNoKey ? entry.first : links_[link.before].after) = link.after;
  (link.after == kNoKey ? entry.last : links_[link.after].before) = link.before;
  if (--entry.num_chunks == 0) ListOf(slab).Remove(slab);
}

void SlabOrder::BeginUse(SlabId slab) {
  if (!lists_.empty()) ++slabs_[slab].num_in_use;
}

void SlabOrder::EndUse(SlabId slab) {
  if (!lists_.empty() && --slabs_[slab].num_in_use == 0) ListOf(slab).EndUse(slab);
}

void SlabOrder::Rank(SlabId slab, uint64_t rank) {
  if (lists_.empty()) return;
  RankedList& list = ListOf(slab);
  if (list.last() == slab) {
    nodes_[slab].rank = rank;
  } else {
    list.Remove(slab);
    list.Append(slab, rank);
  }
}

void SlabOrder::BeginPlan() {
  searches_.clear();
  for (RankedList& list : lists_) searches_.push_back(list.Begin());
}

void SlabOrder::Close(SlabId slab) {
  if (lists_.empty()) return;
  slabs_.Reach(slab + size_t{1});
  slabs_[slab].closed = true;
  closed_.push_back(slab);
}

SlabId SlabOrder::ColdestOutside(size_t size) {
  const auto judge = [this](SlabId slab) {
    if (slabs_[slab].num_in_use != 0) return Verdict::kInUse;
    return slabs_[slab].closed ? Verdict::kSkip : Verdict::kTake;
  };
  SlabId coldest = kNoSlab;
  for (size_t other = 0; other < lists_.size(); ++other) {
    if (other == size) continue;
    const SlabId slab = lists_[other].Next(&searches_[other], judge);
    if (slab != kNoSlab && (coldest == kNoSlab || rank(slab) < rank(coldest))) coldest = slab;
  }
  return coldest;
}

void SlabOrder::EndPlan() {
  for (const SlabId slab : closed_) slabs_[slab].closed = false;
  closed_.clear();
}

}  // namespace jaxkv
