// How much memory transfers pass through, and which way they go.
#ifndef JAXKV_CUDA_ENGINE_OPTIONS_H_
#define JAXKV_CUDA_ENGINE_OPTIONS_H_

#include <cstdint>

#include "cuda/page_kernels.h"

namespace jaxkv::cuda {

// Which way a transfer goes, by its size.
struct Paths {
  int64_t direct_below_bytes;  // smaller transfers are one kernel between leaves and host memory
  int64_t engine_from_bytes;   // staged copies of at least this length are the copy engines'; else a kernel's
  int32_t host_blocks;         // blocks of threads of a kernel that reaches host memory
};

// How many transfers, or parts of them, have gone each way.
struct WayCounts {
  int64_t direct = 0;
  int64_t by_engine = 0;
  int64_t by_kernel = 0;
  int64_t by_host = 0;  // through pinned memory, to or from a pool that is not
};

struct EngineOptions {
  int64_t staging_bytes = 0;     // of the device, for each direction; a few slots at least
  int64_t slot_bytes = 8 << 20;  // that a transfer is cut into, unless records are larger
  Paths paths = {256 << 10, 64 << 10, kHostBlocks};
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_ENGINE_OPTIONS_H_
