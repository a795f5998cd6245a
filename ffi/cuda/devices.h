// The devices of this process, each with its runtime and its engine.
#ifndef JAXKV_CUDA_DEVICES_H_
#define JAXKV_CUDA_DEVICES_H_

#include <cstdint>

#include "cuda/engine.h"
#include "cuda/runtime.h"

namespace jaxkv::cuda {

// Both stay until the process ends: programs may ask for them, and CUDA itself may be gone before any
// destructor would run. May be called from several threads.
Runtime& RuntimeOf(int32_t ordinal);
// Made by the first call, with these options. Throws CudaError.
Engine& MakeEngine(int32_t ordinal, const EngineOptions& options);
// Null where none was made.
Engine* FindEngine(int32_t ordinal);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_DEVICES_H_
