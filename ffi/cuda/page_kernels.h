// The bodies of the kernels that move pages, and what they are given by value. Plain functions of a thread's
// place in its grid, so that they run on the host too. Knows neither streams, nor XLA, nor Python.
#ifndef JAXKV_CUDA_PAGE_KERNELS_H_
#define JAXKV_CUDA_PAGE_KERNELS_H_

#include <cassert>
#include <cstdint>
#include <cstring>

#include "copy.h"
#include "status.h"

#ifdef __CUDACC__
#define JAXKV_DEVICE __host__ __device__ __forceinline__
#else
#define JAXKV_DEVICE inline
#endif

namespace jaxkv::cuda {

enum class Direction { kToRecords, kToLeaves };

// Threads that work as one: a warp, and on the host as many as a test likes. Group g of the whole grid.
struct Lane {
  int64_t group;
  int64_t num_groups;
  int32_t lane;
  int32_t num_lanes;
};

// The ids of a call and where their records lie. Read and checked on the device, since only there they are
// known where a program computed them.
struct EntryList {
  const int32_t* ids;        // -1 skips
  const int32_t* addresses;  // in units of 512 bytes; null: record j is the j-th of the area
  const int32_t* refused;    // not 0 where a block was named before; null: none was
  const int32_t* token;      // the generation of the pool the addresses are of; null: not asked for
  int32_t generation;        // the pool's
  StatusEntry refusal;       // why nothing moves; kMoved: entries are judged one by one
  int32_t num_entries;
  int32_t num_blocks;
  uint8_t* area;  // what records lie in
  int64_t area_bytes;
  int64_t record_bytes;
};

// A plan as warps share it out. A unit is what one warp copies at a time: `runs_per_unit` runs, or one of
// `pieces_per_run` pieces of a run. `run_lanes` lanes copy a run together.
struct KernelPlan {
  PagePlan plan;
  uint8_t* leaf;
  int64_t first_unit;  // units of an entry before those of this plan
  int32_t pieces_per_run;
  int32_t runs_per_unit;
  int32_t run_lanes;
};

// Blocks of threads of a kernel that reaches host memory: enough for the link, and the model keeps the rest.
constexpr int32_t kHostBlocks = 16;
constexpr int kMostPlans = 64;
constexpr int64_t kPieceBytes = 4096;

struct MoveArgs {
  EntryList entries;
  int64_t clear_from;   // a record is cleared from here on when it is written
  bool clears;          // false in the second and later parts of a move cut up for its many plans
  bool clears_skipped;  // records of entries that do not move become zeros
  int32_t num_plans;
  int64_t units_per_entry;
  KernelPlan plans[kMostPlans];
};

// -- entries ------------------------------------------------------------------------------------------------

constexpr StatusEntry kSkipped = kStatusSize;  // neither moved nor refused

// The record of entry j, or null where it does not lie in the area.
JAXKV_DEVICE uint8_t* FindRecord(const EntryList& entries, int32_t j) {
  const int64_t offset =
      entries.addresses != nullptr ? kAddressUnitBytes * entries.addresses[j] : entries.record_bytes * j;
  const bool inside = offset >= 0 && offset <= entries.area_bytes - entries.record_bytes;
  return inside ? entries.area + offset : nullptr;
}

// What becomes of entry j: kMoved, kSkipped, or why it is refused.
JAXKV_DEVICE StatusEntry JudgeEntry(const EntryList& entries, int32_t j) {
  const int32_t block = entries.ids[j];
  if (block == -1) return kSkipped;
  if (entries.refusal != kMoved) return entries.refusal;
  if (entries.token != nullptr && *entries.token != entries.generation) return kNoPool;
  if (block < 0 || block >= entries.num_blocks) return kBadBlock;
  if (FindRecord(entries, j) == nullptr) return kBadAddress;
  if (entries.refused != nullptr && entries.refused[j] != 0) return kRepeated;
  return kMoved;
}

// Sets repeats[j] where an entry before j moves the same block; the others stay 0, which they must be.
JAXKV_DEVICE void MarkRepeats(const EntryList& entries, int32_t* repeats, Lane at) {
  for (int64_t j = at.group; j < entries.num_entries; j += at.num_groups) {
    const int32_t block = entries.ids[j];
    if (JudgeEntry(entries, static_cast<int32_t>(j)) != kMoved) continue;
    for (int32_t k = at.lane; k < j; k += at.num_lanes) {
      if (entries.ids[k] == block && JudgeEntry(entries, k) == kMoved) repeats[j] = 1;
    }
  }
}

JAXKV_DEVICE void AddOne(int32_t* count) {
#ifdef __CUDA_ARCH__
  atomicAdd(count, 1);
#else
  ++*count;
#endif
}

JAXKV_DEVICE void LowerTo(int32_t* least, int32_t value) {
#ifdef __CUDA_ARCH__
  atomicMin(least, value);
#else
  if (value < *least) *least = value;
#endif
}

// One block of threads makes the status: each calls the three in order, and waits for the others in between.
// `counts` are kStatusSize numbers that the block shares.
JAXKV_DEVICE void BeginTally(int32_t* counts, int32_t thread, int32_t num_threads) {
  for (int32_t i = thread; i < kStatusSize; i += num_threads) counts[i] = i == kFirstRefused ? INT32_MAX : 0;
}

JAXKV_DEVICE void TallyEntries(const EntryList& entries, int32_t* counts, int32_t thread,
                               int32_t num_threads) {
  for (int32_t j = thread; j < entries.num_entries; j += num_threads) {
    const StatusEntry fate = JudgeEntry(entries, j);
    if (fate == kSkipped) continue;
    AddOne(&counts[fate]);
    if (fate != kMoved) LowerTo(&counts[kFirstRefused], j);
  }
}

JAXKV_DEVICE void EndTally(const int32_t* counts, int32_t* status, int32_t thread, int32_t num_threads) {
  for (int32_t i = thread; i < kStatusSize; i += num_threads) {
    status[i] = i == kFirstRefused && counts[i] == INT32_MAX ? 0 : counts[i];
  }
}

// -- bytes --------------------------------------------------------------------------------------------------

template <int kBytes>
struct alignas(kBytes) Vector {
  uint8_t bytes[kBytes];
};

// Past the caches where the device lets us: neither side is read again soon, and the model wants them.
template <int kBytes>
JAXKV_DEVICE Vector<kBytes> Load(const uint8_t* from) {
  Vector<kBytes> value;
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 16) {
    const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(from));
    memcpy(&value, &loaded, kBytes);
  } else {
    value = *reinterpret_cast<const Vector<kBytes>*>(from);
  }
#else
  assert(reinterpret_cast<uintptr_t>(from) % kBytes == 0);  // A device would stop.
  std::memcpy(&value, from, kBytes);
#endif
  return value;
}

template <int kBytes>
JAXKV_DEVICE void Store(uint8_t* to, const Vector<kBytes>& value) {
#ifdef __CUDA_ARCH__
  if constexpr (kBytes == 16) {
    uint4 stored;
    memcpy(&stored, &value, kBytes);
    __stcs(reinterpret_cast<uint4*>(to), stored);
  } else {
    *reinterpret_cast<Vector<kBytes>*>(to) = value;
  }
#else
  assert(reinterpret_cast<uintptr_t>(to) % kBytes == 0);
  std::memcpy(to, &value, kBytes);
#endif
}

// Every `num_parts`-th vector of a run, from the `part`-th on, and of the bytes before and after the vectors.
// `to` and `from` are as far from an aligned address as each other.
template <int kBytes>
JAXKV_DEVICE void CopyVectors(uint8_t* to, const uint8_t* from, int32_t num_bytes, int32_t part,
                              int32_t num_parts) {
  const auto past = static_cast<int32_t>(reinterpret_cast<uintptr_t>(to) % kBytes);
  int32_t head = past == 0 ? 0 : kBytes - past;
  if (head > num_bytes) head = num_bytes;
  for (int32_t i = part; i < head; i += num_parts) to[i] = from[i];
  const int32_t num_vectors = (num_bytes - head) / kBytes;
  constexpr int kAbreast = 4;
  int32_t i = part;
  for (; i + (kAbreast - 1) * num_parts < num_vectors; i += kAbreast * num_parts) {
    Vector<kBytes> values[kAbreast];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int k = 0; k < kAbreast; ++k) values[k] = Load<kBytes>(from + head + kBytes * (i + k * num_parts));
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int k = 0; k < kAbreast; ++k) Store<kBytes>(to + head + kBytes * (i + k * num_parts), values[k]);
  }
  for (; i < num_vectors; i += num_parts) {
    Store<kBytes>(to + head + kBytes * i, Load<kBytes>(from + head + kBytes * i));
  }
  for (int32_t b = head + kBytes * num_vectors + part; b < num_bytes; b += num_parts) to[b] = from[b];
}

JAXKV_DEVICE void CopyPart(uint8_t* to, const uint8_t* from, int32_t num_bytes, int32_t part,
                           int32_t num_parts) {
  const auto apart =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(to) ^ reinterpret_cast<uintptr_t>(from));
  if (apart % 16 == 0) return CopyVectors<16>(to, from, num_bytes, part, num_parts);
  if (apart % 4 == 0) return CopyVectors<4>(to, from, num_bytes, part, num_parts);
  CopyVectors<1>(to, from, num_bytes, part, num_parts);
}

JAXKV_DEVICE void Clear(uint8_t* record, int64_t begin, int64_t end, Lane at) {
  for (int64_t i = begin + at.lane; i < end; i += at.num_lanes) record[i] = 0;
}

// -- pages --------------------------------------------------------------------------------------------------

// The plan that unit `unit` of an entry belongs to.
JAXKV_DEVICE const KernelPlan& FindPlan(const MoveArgs& args, int64_t unit) {
  int32_t low = 0;
  int32_t high = args.num_plans - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (args.plans[middle].first_unit <= unit) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return args.plans[low];
}

// One lane's part of unit `unit` of a plan, of the page of `block` in `record`.
template <Direction kDirection>
JAXKV_DEVICE void MoveUnit(const KernelPlan& kernel_plan, int64_t unit, int32_t block, uint8_t* record,
                           Lane at) {
  const PagePlan& plan = kernel_plan.plan;
  const auto unit32 = static_cast<uint32_t>(unit);
  const auto pieces = static_cast<uint32_t>(kernel_plan.pieces_per_run);
  const auto first_run = unit32 / pieces * static_cast<uint32_t>(kernel_plan.runs_per_unit);
  const int64_t in_run = kPieceBytes * (unit32 % pieces);
  const int64_t left = plan.run_bytes - in_run;
  const auto num_bytes = static_cast<int32_t>(left < kPieceBytes ? left : kPieceBytes);
  const auto inner_count = static_cast<uint32_t>(plan.inner_count);
  const auto num_runs = static_cast<uint32_t>(plan.outer_count) * inner_count;
  uint8_t* leaf_page = kernel_plan.leaf + plan.block_start(block) + in_run;
  uint8_t* record_page = record + plan.record_offset + in_run;
  for (int32_t k = at.lane; k < kernel_plan.runs_per_unit * kernel_plan.run_lanes; k += at.num_lanes) {
    const uint32_t run = first_run + static_cast<uint32_t>(k / kernel_plan.run_lanes);
    if (run >= num_runs) break;
    const int64_t outer = run / inner_count;
    const int64_t inner = run % inner_count;
    uint8_t* leaf = leaf_page + outer * plan.outer_leaf_stride + inner * plan.inner_leaf_stride;
    uint8_t* page = record_page + outer * plan.outer_page_stride + inner * plan.inner_page_stride;
    const int32_t part = k % kernel_plan.run_lanes;
    if (kDirection == Direction::kToRecords) {
      CopyPart(page, leaf, num_bytes, part, kernel_plan.run_lanes);
    } else {
      CopyPart(leaf, page, num_bytes, part, kernel_plan.run_lanes);
    }
  }
}

// What one lane of a grid does of a move. No lane waits for another.
template <Direction kDirection>
JAXKV_DEVICE void MovePages(const MoveArgs& args, Lane at) {
  const EntryList& entries = args.entries;
  const int64_t num_units = args.units_per_entry * entries.num_entries;
  for (int64_t unit = at.group; unit < num_units; unit += at.num_groups) {
    const auto j = static_cast<int32_t>(unit / args.units_per_entry);
    const int64_t in_entry = unit % args.units_per_entry;
    const bool clears = kDirection == Direction::kToRecords && args.clears && in_entry == 0;
    if (JudgeEntry(entries, j) != kMoved) {
      uint8_t* record = clears && args.clears_skipped ? FindRecord(entries, j) : nullptr;
      if (record != nullptr) Clear(record, 0, entries.record_bytes, at);
      continue;
    }
    uint8_t* record = FindRecord(entries, j);
    if (clears) Clear(record, args.clear_from, entries.record_bytes, at);
    const KernelPlan& plan = FindPlan(args, in_entry);
    MoveUnit<kDirection>(plan, in_entry - plan.first_unit, entries.ids[j], record, at);
  }
}

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_PAGE_KERNELS_H_
