#include "cuda/prefetches.h"

#include <algorithm>
#include <iterator>

namespace jaxkv::cuda {

EmptySlots Prefetches::Add(RecordName name, StagingRing::Slot& slot, int32_t place) {
  EmptySlots empty;
  // First of all, so that a record of the same slot does not leave it empty.
  if (num_waiting_[&slot]++ == 0) oldest_first_.push_back(&slot);
  if (const auto found = places_.find(Key(name)); found != places_.end()) Remove(found, empty);
  places_[Key(name)] = {&slot, place};
  return empty;
}

std::vector<Landed> Prefetches::Take(const std::vector<RecordName>& names) {
  std::vector<Landed> landed;
  EmptySlots empty;
  for (size_t j = 0; j < names.size() && !places_.empty(); ++j) {
    const auto found = places_.find(Key(names[j]));
    if (found == places_.end()) continue;
    const Place place = found->second;
    auto same =
        std::find_if(landed.begin(), landed.end(), [&](const Landed& l) { return l.slot == place.slot; });
    if (same == landed.end()) same = landed.insert(landed.end(), {place.slot, {}, {}});
    same->entries.push_back(j);
    same->places.push_back(place.place);
    Remove(found, empty);
  }
  return landed;
}

bool Prefetches::IsEmpty(const StagingRing::Slot& slot) const { return num_waiting_.count(&slot) == 0; }

EmptySlots Prefetches::Forget(const std::vector<RecordName>& names) {
  EmptySlots empty;
  for (const RecordName name : names) {
    if (places_.empty()) break;
    if (const auto found = places_.find(Key(name)); found != places_.end()) Remove(found, empty);
  }
  return empty;
}

void Prefetches::ForgetAll(const StagingRing::Slot& slot) {
  EmptySlots empty;
  for (auto place = places_.begin(); place != places_.end();) {
    const auto next = std::next(place);
    if (place->second.slot == &slot) Remove(place, empty);
    place = next;
  }
}

void Prefetches::Remove(std::unordered_map<int64_t, Place>::iterator found, EmptySlots& empty) {
  StagingRing::Slot* slot = found->second.slot;
  places_.erase(found);
  if (--num_waiting_.at(slot) > 0) return;
  num_waiting_.erase(slot);
  oldest_first_.erase(std::find(oldest_first_.begin(), oldest_first_.end(), slot));
  empty.push_back(slot);
}

}  // namespace jaxkv::cuda
