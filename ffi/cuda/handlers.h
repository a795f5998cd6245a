// The custom calls XLA makes on CUDA devices. Each gives work to the stream of its program and returns; none
// fails for what the data says.
#ifndef JAXKV_CUDA_HANDLERS_H_
#define JAXKV_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jaxkv::cuda {

XLA_FFI_DECLARE_HANDLER_SYMBOL(GatherPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ScatterPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(OffloadHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ReadBlocksHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RestoreHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WriteBlocksHandler);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_HANDLERS_H_
