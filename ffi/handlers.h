// The custom calls XLA makes. Each checks, copies and reports; none fails for what the data says.
#ifndef JAXKV_HANDLERS_H_
#define JAXKV_HANDLERS_H_

#include "status.h"
#include "xla/ffi/api/ffi.h"

namespace jaxkv {

XLA_FFI_DECLARE_HANDLER_SYMBOL(GatherPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ScatterPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(OffloadHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ReadBlocksHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RestoreHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WriteBlocksHandler);

}  // namespace jaxkv

#endif  // JAXKV_HANDLERS_H_
