#include "cuda/batch.h"

namespace jaxkv::cuda {

int32_t AddressOf(const PinnedPool& pool, const uint8_t* record) {
  return static_cast<int32_t>((record - pool.data()) / kAddressUnitBytes);
}

std::vector<RecordName> NameRecords(const Call& call, const std::vector<BlockMove>& moves) {
  std::vector<RecordName> names;
  names.reserve(moves.size());
  for (const BlockMove& move : moves) names.push_back({call.numbers[0], AddressOf(*call.pool, move.record)});
  return names;
}

std::vector<BlockMove> PutFirst(const std::vector<Landed>& landed, const std::vector<BlockMove>& moves) {
  if (landed.empty()) return moves;
  std::vector<BlockMove> ordered;
  std::vector<bool> taken(moves.size());
  for (const Landed& part : landed) {
    for (const size_t j : part.entries) {
      ordered.push_back(moves[j]);
      taken[j] = true;
    }
  }
  for (size_t j = 0; j < moves.size(); ++j) {
    if (!taken[j]) ordered.push_back(moves[j]);
  }
  return ordered;
}

void ListMoved(const Batch& batch, const std::vector<Landed>& landed) {
  const size_t n = batch.moves.size();
  PinnedNumbers& moved = batch.call.moved;
  moved.Reserve(2 * n);
  int32_t* addresses = moved.host() + n;
  for (size_t j = 0; j < n; ++j) {
    moved.host()[j] = static_cast<int32_t>(batch.moves[j].block);
    addresses[j] = AddressOf(batch.pool(), batch.moves[j].record);
  }
  const auto units = static_cast<int32_t>(batch.pages.record_bytes / kAddressUnitBytes);
  for (const Landed& part : landed) {
    for (const int32_t place : part.places) *addresses++ = units * place;
  }
}

}  // namespace jaxkv::cuda
