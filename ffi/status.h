// What every op reports of the blocks it was asked to move.
#ifndef JAXKV_STATUS_H_
#define JAXKV_STATUS_H_

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
  kNotPinned = 8,     // refused: a device cannot reach the pool's memory
  kFirstRefused = 9,  // index of the first refused entry, if any was refused
  kElapsedUs = 10,    // microseconds spent
  kStatusSize = 11,
};

}  // namespace jaxkv

#endif  // JAXKV_STATUS_H_
