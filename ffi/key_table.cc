#include "key_table.h"

#include <algorithm>
#include <new>
#include <random>
#include <stdexcept>

namespace jaxkv {
namespace {

// Keys whose memory is asked for ahead of its use.
constexpr size_t kAhead = 16;
constexpr size_t kMostExpected = size_t{1} << 22;
constexpr size_t kFewestPlaces = 64;

uint64_t Mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t Word(const uint8_t* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

uint64_t RandomSeed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

std::string OffloadKey::ToHex() const {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < size; ++i) {
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

KeyTable::KeyTable(size_t num_expected) : seed_(RandomSeed()) {
  const size_t wanted = std::min(num_expected, kMostExpected) / 2 * 3;
  size_t count = kFewestPlaces;
  while (count < wanted) count *= 2;
  places_ = NewPlaces(count);
  mask_ = count - 1;
}

KeyTable::Places KeyTable::NewPlaces(size_t count) {
  // Zeroed lazily by the system: what no key reaches takes no memory.
  Places places(static_cast<Place*>(std::calloc(count, sizeof(Place))));
  if (places == nullptr) throw std::bad_alloc();
  return places;
}

uint32_t KeyTable::Hash(const OffloadKey& key) const {
  const uint8_t* bytes = key.bytes;
  uint32_t rest;
  std::memcpy(&rest, bytes + 32, sizeof(rest));
  const uint64_t low = Mix(Word(bytes) ^ seed_, Word(bytes + 8) ^ 0x9e3779b97f4a7c15);
  const uint64_t high = Mix(Word(bytes + 16) ^ 0xd1b54a32d192ed03, Word(bytes + 24) ^ ~seed_);
  const uint64_t hash = Mix(low ^ 0x8ebc6af09c88c6e3, high ^ (uint64_t{rest} << 8 | key.size) ^ seed_);
  return static_cast<uint32_t>(hash ^ hash >> 32);
}

KeyId KeyTable::FindTagged(const OffloadKey& key, uint32_t tag) const {
  for (size_t at = tag & mask_; places_[at].id_plus_one != 0; at = (at + 1) & mask_) {
    const KeyId id = places_[at].id_plus_one - 1;
    if (places_[at].tag == tag && chunks_[id].key == key) return id;
  }
  return kNoKey;
}

void KeyTable::PrefetchAll(const OffloadKey* keys, size_t n, uint32_t* tags) const {
  for (size_t i = 0; i < n; ++i) {
    tags[i] = Hash(keys[i]);
    Prefetch(&places_[tags[i] & mask_]);
  }
  for (size_t i = 0; i < n; ++i) {
    size_t at = tags[i] & mask_;
    while (places_[at].id_plus_one != 0 && places_[at].tag != tags[i]) at = (at + 1) & mask_;
    if (places_[at].id_plus_one != 0) Prefetch(&chunks_[places_[at].id_plus_one - 1]);
  }
}

void KeyTable::Find(const OffloadKey* keys, size_t n, KeyId* ids) const {
  uint32_t tags[kAhead];
  for (size_t first = 0; first < n; first += kAhead) {
    const size_t count = std::min(kAhead, n - first);
    PrefetchAll(keys + first, count, tags);
    for (size_t i = 0; i < count; ++i) ids[first + i] = FindTagged(keys[first + i], tags[i]);
  }
}

void KeyTable::Intern(const OffloadKey* keys, size_t n, KeyId* ids) {
  uint32_t tags[kAhead];
  for (size_t first = 0; first < n; first += kAhead) {
    const size_t count = std::min(kAhead, n - first);
    PrefetchAll(keys + first, count, tags);
    for (size_t i = 0; i < count; ++i) {
      const OffloadKey& key = keys[first + i];
      KeyId id = FindTagged(key, tags[i]);
      if (id == kNoKey) id = Add(key, tags[i]);
      ++chunks_[id].refs;
      ids[first + i] = id;
    }
  }
}

void KeyTable::Unref(KeyId id) {
  if (--chunks_[id].refs == 0) Erase(id);
}

KeyId KeyTable::Add(const OffloadKey& key, uint32_t tag) {
  if ((num_keys_ + 1) * 4 > (mask_ + 1) * 3) Grow();
  KeyId id = first_free_;
  if (id != kNoKey) {
    first_free_ = chunks_[id].uses;
  } else {
    if (end_ == kNoKey - 1) throw std::length_error("the index holds as many keys as it can number");
    id = end_;
    chunks_.Reach(id + size_t{1});
    ++end_;
  }
  chunks_[id] = Chunk{};
  chunks_[id].key = key;
  size_t at = tag & mask_;
  while (places_[at].id_plus_one != 0) at = (at + 1) & mask_;
  places_[at] = {tag, id + 1};
  ++num_keys_;
  return id;
}

void KeyTable::Erase(KeyId id) {
  size_t gap = Hash(chunks_[id].key) & mask_;
  while (places_[gap].id_plus_one != id + 1) gap = (gap + 1) & mask_;
  // Moves those behind the gap into it that a search would no longer reach.
  for (size_t at = (gap + 1) & mask_; places_[at].id_plus_one != 0; at = (at + 1) & mask_) {
    const size_t distance = (at - places_[at].tag) & mask_;
    if (distance >= ((at - gap) & mask_)) {
      places_[gap] = places_[at];
      gap = at;
    }
  }
  places_[gap] = {0, 0};
  --num_keys_;
  chunks_[id].uses = first_free_;
  first_free_ = id;
}

void KeyTable::Grow() {
  const size_t count = (mask_ + 1) * 2;
  Places places = NewPlaces(count);
  for (size_t i = 0; i <= mask_; ++i) {
    if (places_[i].id_plus_one == 0) continue;
    size_t at = places_[i].tag & (count - 1);
    while (places[at].id_plus_one != 0) at = (at + 1) & (count - 1);
    places[at] = places_[i];
  }
  places_ = std::move(places);
  mask_ = count - 1;
}

}  // namespace jaxkv
