// Launches the kernels whose bodies are in page_kernels.h.
#ifndef JAXKV_CUDA_KERNELS_H_
#define JAXKV_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "cuda/page_kernels.h"

namespace jaxkv::cuda {

cudaError_t LaunchMovePages(Direction direction, const MoveArgs& args, int32_t most_blocks,
                            cudaStream_t stream);
cudaError_t LaunchMarkRepeats(const EntryList& entries, int32_t* repeats, cudaStream_t stream);
cudaError_t LaunchTally(const EntryList& entries, int32_t* status, cudaStream_t stream);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_KERNELS_H_
