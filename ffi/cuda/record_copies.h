// The copies between records in staging memory, one after another, and their places in a pool. Pure.
#ifndef JAXKV_CUDA_RECORD_COPIES_H_
#define JAXKV_CUDA_RECORD_COPIES_H_

#include <cstdint>
#include <vector>

#include "copy.h"
#include "cuda/page_moves.h"
#include "cuda/runtime.h"

namespace jaxkv::cuda {

// All bytes of records that stand one after another.
PagePlan WholeRecord(int64_t num_records, int64_t record_bytes);

// What of such records belongs in a pool: what `pages` cover, and the padding. The rest is another device's,
// and stays.
std::vector<PagePlan> RecordPlans(const PageSet& pages, int64_t num_records);

// What of each record is copied.
struct RecordCopy {
  int64_t record_bytes;
  const std::vector<PagePlan>& plans;
};

// Copies between the records of `count` moves and `staged`, as few as can be; none where records are too
// scattered for copies one by one.
std::vector<HostCopy> ListCopies(const BlockMove* moves, size_t count, uint8_t* staged,
                                 const RecordCopy& record);

// Whether there are copies, and of at least `least_bytes` on average.
bool AreLong(const std::vector<HostCopy>& copies, int64_t least_bytes);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_RECORD_COPIES_H_
