// Turns block ids and the places of chunks into what one program is given. Knows numbers only.
#ifndef JAXKV_ENTRIES_H_
#define JAXKV_ENTRIES_H_

#include <cstddef>
#include <cstdint>
#include <optional>

namespace jaxkv {

// Entry j is block `first_block + j`, counted from the start of the first chunk. A chunk holds
// `blocks_per_chunk` records of `record_units` address units, one after another.
struct ChunkLayout {
  int64_t blocks_per_chunk;
  int64_t first_block;
  int64_t record_units;
};

// The first id that is neither -1, which skips an entry, nor a block.
std::optional<size_t> FirstOutside(const int64_t* block_ids, size_t n, int64_t num_blocks);

// The first value that stood before. Negative ones may.
std::optional<size_t> FirstRepeated(const int64_t* values, size_t n);

// Writes ids as they are and the address of each one's record; returns how many ids are not -1. There must be
// a chunk address for every entry.
int64_t FillEntries(const int64_t* block_ids, size_t n, const int64_t* chunk_addresses, ChunkLayout layout,
                    int32_t* ids_out, int32_t* addresses_out);

}  // namespace jaxkv

#endif  // JAXKV_ENTRIES_H_
