// Counts how often keys were offered, so that those offered too seldom are not stored. Knows no chunks.
#ifndef JAXKV_STORE_TRACKER_H_
#define JAXKV_STORE_TRACKER_H_

#include <cstddef>
#include <cstdint>
#include <list>
#include <unordered_map>
#include <vector>

#include "key_table.h"

namespace jaxkv {

// As vLLM's: the keys offered last, `max_keys` at most.
class StoreTracker {
 public:
  StoreTracker(size_t max_keys, KeyTable* keys) : max_keys_(max_keys), keys_(keys) {}

  // Counts one offer of these keys, each named once. A full tracker forgets those offered longest ago, but
  // none of this offer.
  void Offer(const std::vector<KeyId>& ids);
  // Offers of a key since it is tracked.
  int64_t Count(KeyId id) const;

 private:
  struct Tracked {
    KeyId id;
    int64_t num_offers;
  };

  void ForgetOldest();

  const size_t max_keys_;
  KeyTable* keys_;
  std::list<Tracked> by_age_;  // Offered longest ago first.
  std::unordered_map<KeyId, std::list<Tracked>::iterator> found_;
};

}  // namespace jaxkv

#endif  // JAXKV_STORE_TRACKER_H_
