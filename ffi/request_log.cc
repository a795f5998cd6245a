#include "request_log.h"

#include <algorithm>
#include <utility>

namespace jaxkv {
namespace {

constexpr size_t kFewestPlaces = 16;

size_t FirstPlace(KeyId id, size_t num_places) { return (id * 0x9e3779b1u >> 7) & (num_places - 1); }

bool InLowerGroup(const Access& a, const Access& b) { return a.group < b.group; }
bool Earlier(const Access& a, const Access& b) { return a.position < b.position; }

using Accesses = std::vector<Access>::iterator;

bool HavePositions(Accesses begin, Accesses end) {
  return std::all_of(begin, end, [](const Access& access) { return access.position != kNoPosition; });
}

// Nearly always they are sorted already.
template <typename Less>
void StableSort(Accesses begin, Accesses end, const Less& less) {
  if (!std::is_sorted(begin, end, less)) std::stable_sort(begin, end, less);
}

}  // namespace

Access& RequestRecord::See(KeyId id, Position position, KeyTable* keys) {
  if ((accesses_.size() + 1) * 2 > places_.size()) Grow();
  const size_t mask = places_.size() - 1;
  size_t at = FirstPlace(id, places_.size());
  for (; places_[at] != 0; at = (at + 1) & mask) {
    Access& access = accesses_[places_[at] - 1];
    if (access.id != id) continue;
    if (access.position == kNoPosition) access.position = position;
    return access;
  }
  const auto group = static_cast<uint16_t>((*keys)[id].key.group());
  accesses_.push_back({id, position, group, false, false, false});
  places_[at] = static_cast<uint32_t>(accesses_.size());
  keys->Ref(id);
  return accesses_.back();
}

void RequestRecord::Grow() {
  const size_t count = std::max(kFewestPlaces, places_.size() * 2);
  places_.assign(count, 0);
  for (size_t i = 0; i < accesses_.size(); ++i) {
    size_t at = FirstPlace(accesses_[i].id, count);
    while (places_[at] != 0) at = (at + 1) & (count - 1);
    places_[at] = static_cast<uint32_t>(i + 1);
  }
}

void RequestRecord::Sort() {
  places_.clear();
  StableSort(accesses_.begin(), accesses_.end(), InLowerGroup);
  const bool over_all = HavePositions(accesses_.begin(), accesses_.end());
  for (auto begin = accesses_.begin(); begin != accesses_.end();) {
    const auto end = std::upper_bound(begin, accesses_.end(), *begin, InLowerGroup);
    if (HavePositions(begin, end)) StableSort(begin, end, Earlier);
    if (over_all) std::inplace_merge(accesses_.begin(), begin, end, Earlier);
    begin = end;
  }
}

RequestRecord RequestLog::Take(const std::string& request) {
  const auto found = records_.find(request);
  if (found == records_.end()) return {};
  RequestRecord record = std::move(found->second);
  records_.erase(found);
  return record;
}

void RequestLog::Release(const RequestRecord& record) {
  for (const Access& access : record.accesses()) keys_->Unref(access.id);
}

void RequestLog::Clear() {
  for (const auto& [request, record] : records_) Release(record);
  records_.clear();
}

}  // namespace jaxkv
