// Keeps things in the order of their last use, so that the coldest one nobody is using is found at once.
#ifndef JAXKV_RANKED_LIST_H_
#define JAXKV_RANKED_LIST_H_

#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>

#include "stable_array.h"

namespace jaxkv {

constexpr uint32_t kNobody = UINT32_MAX;

// Where a thing stands. Ranks grow with time; no two things of a list have the same.
struct RankNode {
  enum Where : uint64_t { kNowhere = 0, kInLine, kAside, kSetApart };

  uint64_t rank : 58;
  uint64_t list : 4;
  uint64_t where : 2;
  uint32_t before;  // Neighbours in line.
  uint32_t after;
};

using RankNodes = StableArray<RankNode>;

// What a search for the coldest member does with one.
enum class Verdict { kTake, kSkip, kInUse };

// One list among those that share `nodes`; a thing is in at most one of them. Members stand in line, coldest
// first. One that a search finds in use is set apart, and once it is idle it waits aside, sorted by rank: so
// every use of a member costs searches one step at most, however long it lasts.
class RankedList {
  using RankAndId = std::pair<uint64_t, uint32_t>;

 public:
  RankedList(RankNodes* nodes, unsigned list) : nodes_(nodes), list_(list) {}

  // A new member, with a rank above all others.
  void Append(uint32_t id, uint64_t rank) {
    RankNode& node = (*nodes_)[id];
    node.rank = rank;
    node.list = list_;
    node.where = RankNode::kInLine;
    node.before = last_;
    node.after = kNobody;
    (last_ == kNobody ? first_ : (*nodes_)[last_].after) = id;
    last_ = id;
    ++size_;
  }

  void Remove(uint32_t id) {
    RankNode& node = (*nodes_)[id];
    if (node.where == RankNode::kInLine) Unlink(node);
    if (node.where == RankNode::kAside) aside_.erase(Key(node.rank, id));
    node.where = RankNode::kNowhere;
    --size_;
  }

  // The last use of a member ended. Its rank stays.
  void EndUse(uint32_t id) {
    RankNode& node = (*nodes_)[id];
    if (node.where != RankNode::kSetApart) return;
    aside_.insert(Key(node.rank, id));
    node.where = RankNode::kAside;
  }

  bool Has(uint32_t id) const {
    const RankNode& node = (*nodes_)[id];
    return node.where != RankNode::kNowhere && node.list == list_;
  }
  size_t size() const { return size_; }
  // Ends of the line.
  uint32_t first() const { return first_; }
  uint32_t last() const { return last_; }

  // A search from the coldest member on. Until its last step nothing may be appended, removed or become idle.
  struct Search {
    uint32_t in_line;
    std::set<RankAndId>::iterator aside;
  };
  Search Begin() { return {first_, aside_.begin()}; }

  // The coldest member that `judge(id)` takes, or kNobody. It stays the next one until it is judged
  // otherwise.
  template <typename Judge>
  uint32_t Next(Search* search, const Judge& judge) {
    while (search->in_line != kNobody) {
      RankNode& node = (*nodes_)[search->in_line];
      const Verdict verdict = judge(search->in_line);
      if (verdict == Verdict::kTake) break;
      search->in_line = node.after;
      if (verdict == Verdict::kInUse) SetApart(node);
    }
    while (search->aside != aside_.end()) {
      const uint32_t id = search->aside->second;
      const Verdict verdict = judge(id);
      if (verdict == Verdict::kTake) {
        const bool colder =
            search->in_line == kNobody || search->aside->first < (*nodes_)[search->in_line].rank;
        return colder ? id : search->in_line;
      }
      if (verdict == Verdict::kInUse) {
        (*nodes_)[id].where = RankNode::kSetApart;
        search->aside = aside_.erase(search->aside);
      } else {
        ++search->aside;
      }
    }
    return search->in_line;
  }

 private:
  static RankAndId Key(uint64_t rank, uint32_t id) { return {rank, id}; }

  void Unlink(const RankNode& node) {
    (node.before == kNobody ? first_ : (*nodes_)[node.before].after) = node.after;
    (node.after == kNobody ? last_ : (*nodes_)[node.after].before) = node.before;
  }

  void SetApart(RankNode& node) {
    Unlink(node);
    node.where = RankNode::kSetApart;
  }

  RankNodes* nodes_;
  const unsigned list_;
  uint32_t first_ = kNobody;
  uint32_t last_ = kNobody;
  size_t size_ = 0;
  std::set<RankAndId> aside_;
};

}  // namespace jaxkv

#endif  // JAXKV_RANKED_LIST_H_
