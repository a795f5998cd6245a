// A transfer on its way: its entries as kernels and copies are given them. Pure.
#ifndef JAXKV_CUDA_BATCH_H_
#define JAXKV_CUDA_BATCH_H_

#include <cstdint>
#include <vector>

#include "cuda/call.h"
#include "cuda/engine_options.h"
#include "cuda/page_moves.h"
#include "cuda/pinned_pool.h"
#include "cuda/prefetches.h"
#include "cuda/runtime.h"
#include "cuda/staging_ring.h"

namespace jaxkv::cuda {

// A transfer whose entries are admitted, on its way.
struct Batch {
  Call& call;
  const PageSet& pages;
  const std::vector<BlockMove> moves;
  const Stream compute;
  const Paths paths;

  PinnedPool& pool() const { return *call.pool; }
  size_t records_per_slot(const StagingRing& ring) const {
    return static_cast<size_t>(ring.slot_bytes() / pages.record_bytes);
  }

  // Entries [first, first + count) counted from 0, as their records stand in staging memory.
  std::vector<BlockMove> Renumbered(size_t first, size_t count) const {
    std::vector<BlockMove> renumbered(count);
    for (size_t k = 0; k < count; ++k) renumbered[k] = {static_cast<int64_t>(k), moves[first + k].record};
    return renumbered;
  }

  const int32_t* device_ids() const { return call.moved.device(); }
  const int32_t* device_addresses() const { return call.moved.device() + moves.size(); }

  // Entries [first, first + count) with their records in the pool.
  EntryList InPool(const int32_t* ids, size_t first, size_t count, int64_t num_blocks) const {
    EntryList entries = Common(ids, count, num_blocks);
    entries.addresses = device_addresses() + first;
    entries.area = pool().device_data();
    entries.area_bytes = pool().num_bytes();
    return entries;
  }

  // The same entries with their records one after another at `data`.
  EntryList InStaging(uint8_t* data, size_t first, size_t count) const {
    EntryList entries = Common(device_ids() + first, count, NumBlocks(pages.plans));
    entries.area = data;
    entries.area_bytes = static_cast<int64_t>(count) * pages.record_bytes;
    return entries;
  }

 private:
  EntryList Common(const int32_t* ids, size_t count, int64_t num_blocks) const {
    EntryList entries = {};
    entries.ids = ids;
    entries.num_entries = static_cast<int32_t>(count);
    entries.num_blocks = static_cast<int32_t>(num_blocks);
    entries.record_bytes = pages.record_bytes;
    return entries;
  }
};

// The address of a record in its pool, in units of 512 bytes.
int32_t AddressOf(const PinnedPool& pool, const uint8_t* record);

std::vector<RecordName> NameRecords(const Call& call, const std::vector<BlockMove>& moves);

// The same moves, those whose records have landed first, slot by slot.
std::vector<BlockMove> PutFirst(const std::vector<Landed>& landed, const std::vector<BlockMove>& moves);

// Gives the device the ids of blocks and the addresses of their records: of those that landed in the slot, of
// the others in the pool. Throws CudaError.
void ListMoved(const Batch& batch, const std::vector<Landed>& landed);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_BATCH_H_
