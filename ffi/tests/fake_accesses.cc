#include "fake_accesses.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace jaxkv::cuda {
namespace {

bool Before(const ByteRange& a, const ByteRange& b) { return a.begin < b.begin; }

// Sorts and merges; returns whether two of them overlapped.
bool Merge(std::vector<ByteRange>& ranges) {
  if (ranges.empty()) return false;
  std::sort(ranges.begin(), ranges.end(), Before);
  bool overlapped = false;
  size_t last = 0;
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin > ranges[last].end) {
      ranges[++last] = ranges[i];
      continue;
    }
    overlapped = overlapped || ranges[i].begin < ranges[last].end;
    ranges[last].end = std::max(ranges[last].end, ranges[i].end);
  }
  ranges.resize(last + 1);
  return overlapped;
}

// Of ranges that were merged.
bool Overlap(const std::vector<ByteRange>& some, const std::vector<ByteRange>& others) {
  if (some.empty() || others.empty()) return false;
  if (some.back().end <= others.front().begin || others.back().end <= some.front().begin) return false;
  auto a = some.begin();
  auto b = others.begin();
  while (a != some.end() && b != others.end()) {
    if (a->end <= b->begin) {
      ++a;
    } else if (b->end <= a->begin) {
      ++b;
    } else {
      return true;
    }
  }
  return false;
}

bool Conflict(const Accesses& a, const Accesses& b) {
  return Overlap(a.writes, b.writes) || Overlap(a.writes, b.reads) || Overlap(a.reads, b.writes);
}

void ListPage(Direction direction, const KernelPlan& kernel_plan, int32_t block, const uint8_t* record,
              Accesses& accesses) {
  const PagePlan& plan = kernel_plan.plan;
  const int64_t per_row = plan.num_blocks / plan.num_rows;
  const uint8_t* leaf = kernel_plan.leaf + plan.leaf_offset + block / per_row * plan.row_stride +
                        block % per_row * plan.block_stride;
  for (int64_t o = 0; o < plan.outer_count; ++o) {
    for (int64_t i = 0; i < plan.inner_count; ++i) {
      const uint8_t* from = leaf + o * plan.outer_leaf_stride + i * plan.inner_leaf_stride;
      const uint8_t* to =
          record + plan.record_offset + o * plan.outer_page_stride + i * plan.inner_page_stride;
      if (direction == Direction::kToLeaves) std::swap(from, to);
      accesses.Read(from, plan.run_bytes);
      accesses.Write(to, plan.run_bytes);
    }
  }
}

}  // namespace

void Join(Clock& clock, const Clock& other) {
  for (size_t s = 0; s < kMostStreams; ++s) clock[s] = std::max(clock[s], other[s]);
}

void Accesses::Read(const void* data, int64_t num_bytes) {
  const auto* begin = static_cast<const uint8_t*>(data);
  if (num_bytes > 0) reads.push_back({begin, begin + num_bytes});
}

void Accesses::Write(const void* data, int64_t num_bytes) {
  const auto* begin = static_cast<const uint8_t*>(data);
  if (num_bytes > 0) writes.push_back({begin, begin + num_bytes});
}

bool Accesses::Tidy() {
  Merge(reads);
  return Merge(writes) || Overlap(reads, writes);
}

std::string AccessLog::Add(Footprint footprint) {
  std::string conflict;
  for (const Footprint& other : footprints_) {
    if (other.index <= footprint.after[other.stream]) continue;
    if (other.stream == footprint.stream && other.index == footprint.index) continue;
    if (conflict.empty() && Conflict(other.accesses, footprint.accesses)) {
      conflict = std::string(footprint.what) + " does not wait for " + other.what;
    }
  }
  footprints_.push_back(std::move(footprint));
  return conflict;
}

void AccessLog::Forget(const Clock& floor) {
  const auto passed = [&](const Footprint& old) { return old.index <= floor[old.stream]; };
  footprints_.erase(std::remove_if(footprints_.begin(), footprints_.end(), passed), footprints_.end());
}

uint8_t* FakeMemory::Allocate(int64_t num_bytes, MemoryKind kind) {
  auto owned = std::make_unique<uint8_t[]>(static_cast<size_t>(num_bytes));
  uint8_t* data = owned.get();
  std::memset(data, kPoison, static_cast<size_t>(num_bytes));
  regions_[data] = {num_bytes, kind, true, std::move(owned)};
  return data;
}

bool FakeMemory::Register(uint8_t* data, int64_t num_bytes) {
  const auto next = regions_.lower_bound(data);
  if (next != regions_.end() && next->first < data + num_bytes) return false;
  if (next != regions_.begin()) {
    const auto& [begin, region] = *std::prev(next);
    if (begin + region.num_bytes > data) return false;
  }
  regions_[data] = {num_bytes, MemoryKind::kRegistered, true, nullptr};
  return true;
}

int64_t FakeMemory::Free(uint8_t* data, MemoryKind kind) {
  const auto found = regions_.find(data);
  if (found == regions_.end() || !found->second.live || found->second.kind != kind) return 0;
  const int64_t num_bytes = found->second.num_bytes;
  if (kind == MemoryKind::kRegistered) {
    regions_.erase(found);
    return num_bytes;
  }
  std::memset(data, kPoison, static_cast<size_t>(num_bytes));
  found->second.live = false;
  return num_bytes;
}

bool FakeMemory::IsLive(ByteRange range) const {
  auto found = regions_.upper_bound(range.begin);
  if (found == regions_.begin()) return false;
  --found;
  return found->second.live && range.end <= found->first + found->second.num_bytes;
}

bool FakeMemory::AreLive(const Accesses& accesses) const {
  const auto is_live = [this](const ByteRange& range) { return IsLive(range); };
  return std::all_of(accesses.reads.begin(), accesses.reads.end(), is_live) &&
         std::all_of(accesses.writes.begin(), accesses.writes.end(), is_live);
}

std::string FakeMemory::Leaks() const {
  constexpr const char* kNames[] = {"device memory", "pinned memory", "registered memory"};
  std::string leaks;
  for (const auto& [data, region] : regions_) {
    if (!region.live) continue;
    leaks += std::to_string(region.num_bytes) + " bytes of " + kNames[static_cast<int>(region.kind)] + "; ";
  }
  return leaks;
}

Accesses ListAccesses(const EntryList& entries) {
  Accesses accesses;
  const int64_t num_bytes = static_cast<int64_t>(sizeof(int32_t)) * entries.num_entries;
  accesses.Read(entries.ids, num_bytes);
  if (entries.addresses != nullptr) accesses.Read(entries.addresses, num_bytes);
  if (entries.refused != nullptr) accesses.Read(entries.refused, num_bytes);
  if (entries.token != nullptr) accesses.Read(entries.token, sizeof(int32_t));
  return accesses;
}

Accesses ListAccesses(Direction direction, const MoveArgs& args, const FakeMemory& memory) {
  const EntryList& entries = args.entries;
  Accesses accesses = ListAccesses(entries);
  if (!memory.AreLive(accesses)) return accesses;
  const bool to_records = direction == Direction::kToRecords;
  for (int32_t j = 0; j < entries.num_entries; ++j) {
    const int64_t offset =
        entries.addresses != nullptr ? int64_t{512} * entries.addresses[j] : j * entries.record_bytes;
    const bool inside = offset >= 0 && offset + entries.record_bytes <= entries.area_bytes;
    const uint8_t* record = entries.area + (inside ? offset : 0);
    if (JudgeEntry(entries, j) != kMoved) {
      if (inside && to_records && args.clears && args.clears_skipped) {
        accesses.Write(record, entries.record_bytes);
      }
      continue;
    }
    if (to_records && args.clears) {
      accesses.Write(record + args.clear_from, entries.record_bytes - args.clear_from);
    }
    for (int32_t p = 0; p < args.num_plans; ++p) {
      ListPage(direction, args.plans[p], entries.ids[j], record, accesses);
    }
  }
  return accesses;
}

}  // namespace jaxkv::cuda
