// Which slabs could change owner: the chunks in each slab, and the slabs of a size in the order of their use.
#ifndef JAXKV_SLAB_ORDER_H_
#define JAXKV_SLAB_ORDER_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "key_table.h"
#include "ranked_list.h"

namespace jaxkv {

using SlabId = uint32_t;
constexpr SlabId kNoSlab = kNobody;

// A slab ranks as high as the highest rank that a chunk was given in it since its first chunk came. Where all
// slots have one size nothing can change owner, and nothing is kept.
class SlabOrder {
 public:
  explicit SlabOrder(size_t num_sizes);

  // Slots of `size` number 0 .. num_sizes - 1; a slab holds slots of one of them at a time.
  void Add(SlabId slab, size_t size, KeyId id, uint64_t rank);
  void Remove(SlabId slab, KeyId id);
  // A chunk of the slab is in use now, or no longer.
  void BeginUse(SlabId slab);
  void EndUse(SlabId slab);
  // A chunk of the slab was given a rank above all others.
  void Rank(SlabId slab, uint64_t rank);

  // A plan: what it closes stays closed until it ends.
  void BeginPlan();
  void Close(SlabId slab);
  // The coldest open slab of another size, in which nothing is in use; or kNoSlab.
  SlabId ColdestOutside(size_t size);
  void EndPlan();

  uint64_t rank(SlabId slab) const { return nodes_[slab].rank; }
  template <typename Visit>
  void ForEachChunk(SlabId slab, const Visit& visit) const {
    for (KeyId id = slabs_[slab].first; id != kNoKey; id = links_[id].after) visit(id);
  }

 private:
  struct Slab {
    KeyId first, last;
    uint32_t num_chunks, num_in_use;
    uint32_t size;
    bool closed;
  };
  struct Link {
    KeyId before, after;
  };

  RankedList& ListOf(SlabId slab) { return lists_[slabs_[slab].size]; }

  StableArray<Slab> slabs_;
  RankNodes nodes_;                // By SlabId.
  StableArray<Link> links_;        // By KeyId.
  std::vector<RankedList> lists_;  // By size; none if there is one size.
  std::vector<RankedList::Search> searches_;
  std::vector<SlabId> closed_;
};

}  // namespace jaxkv

#endif  // JAXKV_SLAB_ORDER_H_
