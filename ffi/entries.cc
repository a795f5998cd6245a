#include "entries.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

namespace jaxkv {
namespace {

// For values that are less than `end` steps of 2^shift, and multiples of it: a bit for each.
std::optional<size_t> FirstRepeatedBelow(int64_t end, int shift, const int64_t* values, size_t n) {
  std::vector<bool> seen(static_cast<size_t>(end));
  for (size_t j = 0; j < n; ++j) {
    if (values[j] < 0) continue;
    const auto step = static_cast<size_t>(values[j] >> shift);
    if (seen[step]) return j;
    seen[step] = true;
  }
  return std::nullopt;
}

std::optional<size_t> FirstRepeatedOfAny(const int64_t* values, size_t n) {
  std::vector<std::pair<int64_t, size_t>> sorted(n);
  for (size_t j = 0; j < n; ++j) sorted[j] = {values[j], j};
  std::sort(sorted.begin(), sorted.end());
  std::optional<size_t> first;
  for (size_t j = 1; j < n; ++j) {
    const auto [value, index] = sorted[j];
    if (value < 0 || value != sorted[j - 1].first) continue;
    if (!first || index < *first) first = index;
  }
  return first;
}

}  // namespace

std::optional<size_t> FirstOutside(const int64_t* block_ids, size_t n, int64_t num_blocks) {
  for (size_t j = 0; j < n; ++j) {
    if (block_ids[j] < -1 || block_ids[j] >= num_blocks) return j;
  }
  return std::nullopt;
}

std::optional<size_t> FirstRepeated(const int64_t* values, size_t n) {
  if (n < 2 || std::adjacent_find(values, values + n, std::greater_equal<>()) == values + n) {
    return std::nullopt;  // As slots come, one behind the other.
  }
  int64_t most = 0;
  int64_t bits = 0;  // All that are set in any value.
  for (size_t j = 0; j < n; ++j) {
    const int64_t value = std::max<int64_t>(values[j], 0);
    most = std::max(most, value);
    bits |= value;
  }
  const int shift = bits == 0 ? 0 : __builtin_ctzll(static_cast<uint64_t>(bits));  // Slots come in strides.
  most >>= shift;
  constexpr int64_t kBitsPerValue = 256;  // Four words of bits a value are still faster than sorting.
  return most / kBitsPerValue < static_cast<int64_t>(n) ? FirstRepeatedBelow(most + 1, shift, values, n)
                                                        : FirstRepeatedOfAny(values, n);
}

int64_t FillEntries(const int64_t* block_ids, size_t n, const int64_t* chunk_addresses, ChunkLayout layout,
                    int32_t* ids_out, int32_t* addresses_out) {
  int64_t num_blocks = 0;
  int64_t chunk = layout.first_block / layout.blocks_per_chunk;
  int64_t within = layout.first_block % layout.blocks_per_chunk;
  for (size_t j = 0; j < n; ++j) {
    ids_out[j] = static_cast<int32_t>(block_ids[j]);
    addresses_out[j] = static_cast<int32_t>(chunk_addresses[chunk] + within * layout.record_units);
    num_blocks += block_ids[j] != -1;
    if (++within == layout.blocks_per_chunk) {
      within = 0;
      ++chunk;
    }
  }
  return num_blocks;
}

}  // namespace jaxkv
