// The custom calls XLA makes. Each checks, copies and reports; none fails for what the data says.
#ifndef JAXKV_HANDLERS_H_
#define JAXKV_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jaxkv {

// Entries of the status every op returns (int32). A handler that returned an error after its operands were
// donated would destroy them, so what is refused is counted here and leaves all other bytes alone.
enum StatusEntry {
  kMoved = 0,         // blocks copied
  kBadBlock = 1,      // refused: block id outside the group
  kRepeated = 2,      // refused: block named before in the same write
  kBadAddress = 3,    // refused: record outside the pool or the staging array
  kBadGeometry = 4,   // refused: plans, shapes and sizes contradict each other
  kNoPool = 5,        // refused: pool closed, unknown, or of another process
  kNoMemory = 6,      // refused: no memory for the bookkeeping of the copy
  kCancelled = 7,     // not moved: the call was called off before it began
  kFirstRefused = 8,  // index of the first refused entry, if any was refused
  kElapsedUs = 9,     // microseconds spent
  kStatusSize = 10,
};

XLA_FFI_DECLARE_HANDLER_SYMBOL(GatherPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ScatterPagesHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(OffloadHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(ReadBlocksHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(RestoreHandler);
XLA_FFI_DECLARE_HANDLER_SYMBOL(WriteBlocksHandler);

}  // namespace jaxkv

#endif  // JAXKV_HANDLERS_H_
