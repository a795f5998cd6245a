// Cuts a move into what kernels are given. Pure; runs on the host.
#ifndef JAXKV_CUDA_PAGE_MOVES_H_
#define JAXKV_CUDA_PAGE_MOVES_H_

#include <cstdint>
#include <vector>

#include "copy.h"
#include "cuda/page_kernels.h"

namespace jaxkv::cuda {

// The copies of a group's pages, checked against its leaves.
struct PageSet {
  std::vector<PagePlan> plans;
  std::vector<uint8_t*> leaf_data;  // on the device
  int64_t record_bytes;
  int64_t clear_from;

  // Bytes that one block moves.
  int64_t block_bytes() const;
  // Whether pages are all of a record that is not cleared.
  bool fills_records() const;
};

// The launches that move `entries`: one, or several where there are more plans than a launch takes.
std::vector<MoveArgs> CutMove(const PageSet& pages, const EntryList& entries, bool clears_skipped);

// How many warps have something to do in a launch.
int64_t NumUnits(const MoveArgs& args);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_PAGE_MOVES_H_
