// Checks the index of chunks and its parts. Run it under the sanitizers. Python tests compare its decisions
// with a model.
#include "chunk_index.h"

#include <algorithm>
#include <cassert>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

using namespace jaxkv;

namespace {

OffloadKey Key(uint32_t number, uint8_t group = 0, uint8_t hash_bytes = 16) {
  OffloadKey key{};
  std::memcpy(key.bytes, &number, sizeof(number));
  key.bytes[hash_bytes + 3] = group;
  key.size = static_cast<uint8_t>(hash_bytes + 4);
  return key;
}

struct Batch {
  explicit Batch(std::vector<OffloadKey> keys) : keys(std::move(keys)), positions(this->keys.size()) {
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<Position>(i);
  }
  operator KeyBatch() const { return {keys.data(), positions.data(), keys.size()}; }

  std::vector<OffloadKey> keys;
  std::vector<Position> positions;
};

Batch Numbers(uint32_t first, uint32_t count, uint8_t group = 0) {
  std::vector<OffloadKey> keys;
  for (uint32_t i = 0; i < count; ++i) keys.push_back(Key(first + i, group));
  return Batch(keys);
}

template <typename Function>
bool Refuses(const Function& function) {
  try {
    function();
  } catch (const KeyStateError&) {
    return true;
  }
  return false;
}

template <typename Policy>
std::unique_ptr<EvictionPolicy> Make(PolicyContext context) {
  return std::make_unique<Policy>(context);
}

KeyId FindOne(const KeyTable& table, const OffloadKey& key) {
  KeyId id;
  table.Find(&key, 1, &id);
  return id;
}

// Keys come and go, numbers are used again, and each key is found as long as somebody refers to it.
void CheckTable() {
  KeyTable table(8);
  std::map<uint32_t, KeyId> expected;
  std::mt19937 random(1);
  for (int step = 0; step < 60000; ++step) {
    const uint32_t number = random() % 3000;
    const OffloadKey key = Key(number, number % 3, number % 2 ? 16 : 32);
    const auto found = expected.find(number);
    assert(FindOne(table, key) == (found == expected.end() ? kNoKey : found->second));
    if (found == expected.end()) {
      table.Intern(&key, 1, &expected[number]);
    } else {
      assert(table[found->second].key == key && key.group() == number % 3);
      table.Ref(found->second);
      table.Unref(found->second);
      assert(FindOne(table, key) == found->second);
      table.Unref(found->second);
      expected.erase(found);
    }
    assert(table.num_keys() == expected.size());
  }
  assert(table.end() <= 3000);
}

// Among so many keys some share all that the table keeps of their hashes.
void CheckKeysThatCollide() {
  constexpr uint32_t kMany = 400000;
  KeyTable table(8);
  for (uint32_t number = 0; number < kMany; ++number) {
    const OffloadKey key = Key(number);
    KeyId id;
    table.Intern(&key, 1, &id);
    assert(id == number);
  }
  for (uint32_t number = 0; number < kMany; ++number) assert(FindOne(table, Key(number)) == number);
}

void CheckRankedList() {
  RankNodes nodes;
  nodes.Reach(8);
  RankedList list(&nodes, 0);
  for (uint32_t id = 0; id < 6; ++id) list.Append(id, id + 1);
  std::set<uint32_t> in_use{0, 1, 4};
  std::set<uint32_t> skipped{2};
  const auto judge = [&](uint32_t id) {
    if (in_use.count(id)) return Verdict::kInUse;
    return skipped.count(id) ? Verdict::kSkip : Verdict::kTake;
  };
  RankedList::Search search = list.Begin();
  assert(list.Next(&search, judge) == 3 && list.first() == 2);  // 0 and 1 were set apart.
  skipped.insert(3);
  assert(list.Next(&search, judge) == 5);
  in_use.clear();
  for (uint32_t id : {4, 0, 2}) list.EndUse(id);
  skipped.clear();
  search = list.Begin();
  for (uint32_t id : {0, 2, 3, 4, 5}) {  // 1 is still set apart.
    assert(list.Next(&search, judge) == id);
    skipped.insert(id);
  }
  assert(list.Next(&search, judge) == kNobody);
  list.Remove(1);  // Set apart, aside and in line.
  list.Remove(0);
  list.Remove(3);
  list.Append(4, 9);
  assert(list.size() == 4 && list.last() == 4 && !list.Has(0) && list.Has(5));
}

// However many members are in use, and however long: a search meets each of them once.
void CheckSearchesAreShort() {
  constexpr uint32_t kMany = 5000;
  RankNodes nodes;
  nodes.Reach(kMany);
  RankedList list(&nodes, 0);
  for (uint32_t id = 0; id < kMany; ++id) list.Append(id, id + 1);
  uint32_t num_judged = 0;
  uint32_t num_in_use = kMany - 1;
  const auto judge = [&](uint32_t id) {
    ++num_judged;
    return id < num_in_use ? Verdict::kInUse : Verdict::kTake;
  };
  for (const uint32_t expected : {kMany, uint32_t{1}, uint32_t{1}}) {
    num_judged = 0;
    RankedList::Search search = list.Begin();
    assert(list.Next(&search, judge) == kMany - 1 && num_judged == expected);
  }
  num_in_use = 0;
  for (uint32_t id = 0; id < kMany - 1; ++id) list.EndUse(id);
  num_judged = 0;
  RankedList::Search search = list.Begin();
  assert(list.Next(&search, judge) == 0 && num_judged == 2);  // The first in line, and the first aside.
}

// Ghosts move the target of T1, are forgotten oldest first, and a touched ghost is young again.
void CheckArcGhosts() {
  KeyTable table(8);
  RankNodes nodes;
  nodes.Reach(64);
  ArcPolicy policy({&table, &nodes});
  policy.SetCapacity(2);
  KeyId ids[6];
  const Batch keys = Numbers(0, 6);
  table.Intern(keys.keys.data(), 6, ids);
  uint64_t rank = 0;
  const auto pass = [&](KeyId id) {
    policy.Insert(id, ++rank);
    policy.Evict(id);
  };
  pass(ids[0]);
  pass(ids[1]);
  policy.EndEviction();
  assert(!policy.Touch(ids[0], 99) && policy.target() == 1);
  pass(ids[2]);
  policy.EndEviction();  // Forgets 1, since 0 was touched.
  policy.MissStore(ids[1]);
  assert(policy.target() == 1);
  policy.MissStore(ids[0]);
  policy.MissStore(ids[2]);
  assert(policy.target() == 2);  // No more than the capacity.
  policy.Insert(ids[3], ++rank);
  table[ids[3]].state = ChunkState::kWriting;
  assert(policy.Touch(ids[3], ++rank));  // Stays in T1: it is being written.
  policy.Evict(ids[3]);
  policy.EndEviction();
  policy.Insert(ids[4], ++rank);
  assert(policy.EndRequest(ids[4], AccessKind::kReused, ++rank));
  assert(!policy.EndRequest(ids[5], AccessKind::kReused, ++rank));
  policy.Evict(ids[4]);  // From T2; two ghosts of T1 weigh against it.
  policy.MissStore(ids[4]);
  assert(policy.target() == 0);
  policy.Clear();
  for (const KeyId id : ids) table.Unref(id);
  assert(table.num_keys() == 0);
}

void CheckTracker() {
  KeyTable table(8);
  KeyId ids[5];
  const Batch keys = Numbers(0, 5);
  table.Intern(keys.keys.data(), 5, ids);
  StoreTracker tracker(3, &table);
  tracker.Offer({ids[0], ids[1], ids[2]});
  tracker.Offer({ids[0], ids[3]});  // Forgets 1, offered longest ago.
  assert(tracker.Count(ids[0]) == 2 && tracker.Count(ids[1]) == 0 && tracker.Count(ids[3]) == 1);
  tracker.Offer({ids[0], ids[2], ids[3], ids[4]});  // Forgets none of this offer, and has no room for 4.
  assert(tracker.Count(ids[2]) == 2 && tracker.Count(ids[4]) == 0);
  for (const KeyId id : ids) table.Unref(id);
  assert(table.num_keys() == 3);
}

void CheckRecord() {
  KeyTable table(8);
  RequestLog log(&table);
  const std::vector<OffloadKey> keys{Key(0, 1), Key(1, 0), Key(2, 0), Key(3, 1)};
  KeyId ids[4];
  table.Intern(keys.data(), 4, ids);
  const auto order = [&](std::vector<Position> positions) {
    for (size_t i = 0; i < 4; ++i) log["r"].See(ids[i], positions[i], &table);
    for (size_t i = 0; i < 4; ++i) log["r"].See(ids[i], 77, &table);
    RequestRecord record = log.Take("r");
    record.Sort();
    std::vector<int> found;
    for (const Access& access : record.accesses()) {
      found.push_back(static_cast<int>(std::find(ids, ids + 4, access.id) - ids));
    }
    log.Release(record);
    return found;
  };
  assert((order({5, 5, 4, 3}) == std::vector<int>{3, 2, 1, 0}));
  // 0 gets position 77 when it is seen again.
  assert((order({kNoPosition, 5, 4, 3}) == std::vector<int>{3, 2, 1, 0}));
  RequestRecord& record = log["half"];
  for (size_t i = 0; i < 4; ++i)
    record.See(ids[i], i == 0 ? kNoPosition : static_cast<Position>(9 - i), &table);
  RequestRecord half = log.Take("half");
  half.Sort();
  assert(half.accesses()[0].id == ids[2] && half.accesses()[2].id == ids[0]);
  log.Release(half);
  assert(log.size() == 0);
}

void CheckRefusals() {
  auto pool = std::make_shared<SlotPool>(1 << 16, 1 << 12);
  ChunkIndex index(pool, {512, 2048}, {Make<LruPolicy>});
  const Batch two = Numbers(0, 2);
  std::vector<SlotRef> slots(4);
  assert(Refuses([&] { index.PrepareLoad("r", two, slots.data()); }));
  assert(Refuses([&] { index.CompleteStore(two, true); }));
  assert(Refuses([&] { index.PrepareStore("r", Numbers(0, 1, 9)); }));
  assert(index.PrepareStore("r", two).accepted);
  assert(Refuses([&] { index.PrepareLoad("r", two, slots.data()); }));
  assert(Refuses([&] { index.CompleteLoad(two, true); }));
  assert(Refuses([&] { index.CompleteStore(Numbers(0, 3), true); }));
  assert(Refuses([&] { index.CompleteStore(Batch({Key(0), Key(0)}), true); }));
  assert(index.counts().num_in_use == 2);
  assert(index.CompleteStore(two, true).size() == 2);
  assert(Refuses([&] { index.CompleteStore(two, true); }));
  index.PrepareLoad("r", Batch({Key(0), Key(0), Key(1)}), slots.data());
  assert(slots[0] == slots[1] && slots[1] != slots[2] && index.InUse().size() == 2);
  assert(Refuses([&] { index.CompleteLoad(Batch({Key(0), Key(1), Key(1)}), true); }));
  assert(index.CompleteLoad(Batch({Key(0), Key(1), Key(0)}), false).size() == 2);
  assert(index.counts().num_chunks == 0 && pool->used_bytes() == 0);
}

// A pool that is cut anew while the index is empty.
void CheckNewCut() {
  auto pool = std::make_shared<SlotPool>(1 << 16, 1 << 12);
  ChunkIndex index(pool, {2048, 4096}, {Make<ArcPolicy>});
  assert(pool->Cut(1 << 13));
  assert(index.PrepareStore("r", Numbers(0, 32)).accepted);
  index.CompleteStore(Numbers(0, 32), true);
  assert(index.PrepareStore("r", Numbers(0, 3, 1)).evicted.size() == 8);
}

struct Walk {
  explicit Walk(MakeEvictionPolicy policy, int64_t threshold)
      : index(pool, {512, 2048, 4096}, {std::move(policy), threshold, 40}) {}

  Batch Offer() {
    std::vector<OffloadKey> keys;
    for (uint32_t i = 0, n = 1 + random() % 12; i < n; ++i) keys.push_back(Key(random() % 60, random() % 3));
    return Batch(keys);
  }

  void Store(const std::string& request) {
    const Batch offer = Offer();
    const StoreOutcome outcome = index.PrepareStore(request, offer);
    assert(outcome.accepted || outcome.to_store.empty());
    std::vector<OffloadKey> keys;
    for (const uint32_t place : outcome.to_store) keys.push_back(offer.keys[place]);
    if (outcome.accepted) stores.push_back(Batch(keys));
  }

  void Load(const std::string& request) {
    std::vector<OffloadKey> keys;
    for (const OffloadKey& key : Offer().keys) {
      Found found;
      index.Lookup(&key, 1, &found);
      if (found == Found::kReadable) keys.push_back(key);
    }
    std::vector<SlotRef> slots(keys.size());
    loads.push_back(Batch(keys));
    index.PrepareLoad(request, loads.back(), slots.data());
    for (const SlotRef slot : slots) assert(pool->IsLive(slot));
  }

  void Step() {
    const std::string request(1, static_cast<char>('a' + random() % 3));
    const bool success = random() % 4 != 0;
    switch (random() % 7) {
      case 0:
      case 1:
        return Store(request);
      case 2:
        return Load(request);
      case 3:
        if (!stores.empty()) index.CompleteStore(stores.back(), success), stores.pop_back();
        return;
      case 4:
        if (!loads.empty()) index.CompleteLoad(loads.back(), success), loads.pop_back();
        return;
      case 5:
        return random() % 2 ? index.EndRequest(request) : index.Touch(Offer());
      default:
        if (random() % 20 == 0) index.Reset();
    }
  }

  void Check() const {
    const IndexCounts counts = index.counts();
    assert(pool->num_live() == counts.num_chunks + counts.num_forgotten);
    assert(static_cast<int64_t>(index.InUse().size()) == counts.num_in_use);
  }

  std::mt19937 random{7};
  std::shared_ptr<SlotPool> pool = std::make_shared<SlotPool>(5 * 4096, 4096);
  ChunkIndex index;
  std::vector<Batch> stores, loads;
};

void CheckRandomWalk(MakeEvictionPolicy policy, int64_t threshold) {
  Walk walk(std::move(policy), threshold);
  for (int step = 0; step < 20000; ++step) {
    walk.Step();
    walk.Check();
  }
  assert(walk.index.counts().num_evicted > 100);
  walk.index.Abandon();
  walk.Check();
  assert(walk.pool->used_bytes() == 0);
  assert(walk.index.num_keys() <= (threshold > 1 ? 40 : 0));  // What the tracker still counts.
}

}  // namespace

int main() {
  CheckTable();
  CheckKeysThatCollide();
  CheckRankedList();
  CheckSearchesAreShort();
  CheckArcGhosts();
  CheckTracker();
  CheckRecord();
  CheckRefusals();
  CheckNewCut();
  for (const int64_t threshold : {1, 2}) {
    CheckRandomWalk(Make<LruPolicy>, threshold);
    CheckRandomWalk(Make<ArcPolicy>, threshold);
  }
  std::puts("ok");
}
