#include "store_tracker.h"

namespace jaxkv {

void StoreTracker::Offer(const std::vector<KeyId>& ids) {
  size_t num_known = 0;
  std::vector<KeyId> unknown;
  for (const KeyId id : ids) {
    const auto found = found_.find(id);
    if (found == found_.end()) {
      unknown.push_back(id);
      continue;
    }
    ++found->second->num_offers;
    by_age_.splice(by_age_.end(), by_age_, found->second);
    ++num_known;
  }
  size_t num_forgettable = by_age_.size() - num_known;
  for (const KeyId id : unknown) {
    if (by_age_.size() >= max_keys_) {
      if (num_forgettable == 0) return;
      ForgetOldest();
      --num_forgettable;
    }
    found_[id] = by_age_.insert(by_age_.end(), {id, 1});
    keys_->Ref(id);
  }
}

int64_t StoreTracker::Count(KeyId id) const {
  const auto found = found_.find(id);
  return found == found_.end() ? 0 : found->second->num_offers;
}

void StoreTracker::ForgetOldest() {
  const KeyId id = by_age_.front().id;
  by_age_.pop_front();
  found_.erase(id);
  keys_->Unref(id);
}

}  // namespace jaxkv
