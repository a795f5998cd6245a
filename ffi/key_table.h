// Finds chunks by key. Every key that somebody still asks about has a number; knows neither requests nor
// order.
#ifndef JAXKV_KEY_TABLE_H_
#define JAXKV_KEY_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "slots.h"
#include "stable_array.h"

namespace jaxkv {

// The name of a chunk: a block hash, then the number of its group, most significant byte first.
struct OffloadKey {
  static constexpr size_t kMaxBytes = 36;
  static constexpr size_t kGroupBytes = 4;

  uint8_t bytes[kMaxBytes];  // Those from `size` on are zero.
  uint8_t size;              // At least kGroupBytes.

  uint32_t group() const {
    const uint8_t* at = bytes + size - kGroupBytes;
    return uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | at[3];
  }
  std::string ToHex() const;
};

inline bool operator==(const OffloadKey& a, const OffloadKey& b) {
  return std::memcmp(&a, &b, sizeof(OffloadKey)) == 0;
}

// What is held under a key.
enum class ChunkState : uint8_t {
  kAbsent,     // Nothing.
  kWriting,    // A slot that a store fills.
  kReadable,   // A chunk.
  kForgotten,  // A slot that a job still uses and nobody finds.
};

// A key and what is held under it; fills one line of the CPU's cache.
struct alignas(64) Chunk {
  OffloadKey key;
  ChunkState state;
  bool marked;    // During one call: named by it, or to be given up.
  uint32_t uses;  // The store that fills the slot and the loads that read it.
  uint32_t refs;  // Who knows the number of this key.
  SlotRef slot;   // Unless it is absent.

  bool resident() const { return state == ChunkState::kWriting || state == ChunkState::kReadable; }
};
static_assert(sizeof(Chunk) == 64, "a lookup reads one line of a chunk");

using KeyId = uint32_t;
constexpr KeyId kNoKey = UINT32_MAX;

class KeyTable {
 public:
  // Makes room for `num_expected` keys; there may be more.
  explicit KeyTable(size_t num_expected);

  // The numbers of `n` keys, kNoKey where a key has none.
  void Find(const OffloadKey* keys, size_t n, KeyId* ids) const;
  // Numbers `n` keys and counts one more reference to each.
  void Intern(const OffloadKey* keys, size_t n, KeyId* ids);
  void Ref(KeyId id) { ++chunks_[id].refs; }
  // The number is given to another key once nobody refers to it.
  void Unref(KeyId id);

  Chunk& operator[](KeyId id) { return chunks_[id]; }
  const Chunk& operator[](KeyId id) const { return chunks_[id]; }
  // Numbers below this were given to keys at some time.
  KeyId end() const { return end_; }
  size_t num_keys() const { return num_keys_; }

 private:
  struct Place {
    uint32_t tag;  // Part of the key's hash; says where the search begins.
    uint32_t id_plus_one;
  };
  struct FreePlaces {
    void operator()(Place* places) const { std::free(places); }
  };
  using Places = std::unique_ptr<Place[], FreePlaces>;

  static Places NewPlaces(size_t count);
  uint32_t Hash(const OffloadKey& key) const;
  KeyId FindTagged(const OffloadKey& key, uint32_t tag) const;
  void PrefetchAll(const OffloadKey* keys, size_t n, uint32_t* tags) const;
  KeyId Add(const OffloadKey& key, uint32_t tag);
  void Erase(KeyId id);
  void Grow();

  const uint64_t seed_;
  size_t mask_;
  Places places_;
  size_t num_keys_ = 0;
  KeyId end_ = 0;
  StableArray<Chunk> chunks_;
  KeyId first_free_ = kNoKey;  // The next one stands where a key in use counts its uses.
};

}  // namespace jaxkv

#endif  // JAXKV_KEY_TABLE_H_
