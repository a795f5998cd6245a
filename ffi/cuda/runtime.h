// What the engine asks of CUDA, for one device. Tests answer it with a device of their own making.
#ifndef JAXKV_CUDA_RUNTIME_H_
#define JAXKV_CUDA_RUNTIME_H_

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/page_kernels.h"

struct CUstream_st;
struct CUevent_st;

namespace jaxkv::cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Event = CUevent_st*;    // cudaEvent_t

// A call of CUDA failed; says which and why.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Bytes of pinned host memory and of the device that one copy connects.
struct HostCopy {
  uint8_t* host;
  uint8_t* device;
  int64_t num_bytes;
};

// All methods may be called from several threads, and throw CudaError. Work is begun in the order of its
// stream and waits for nothing else; memory it uses must stay until it has ended.
class Runtime {
 public:
  virtual ~Runtime() = default;

  // A stream whose work goes before that of the model where both wait for the device.
  virtual Stream MakeStream() = 0;
  virtual void FreeStream(Stream stream) = 0;
  virtual void Synchronize(Stream stream) = 0;

  virtual Event MakeEvent() = 0;
  virtual void FreeEvent(Event event) = 0;
  virtual void Record(Event event, Stream stream) = 0;
  // Work given to `stream` from now on waits for what `event` recorded last.
  virtual void WaitFor(Stream stream, Event event) = 0;
  virtual bool HasEnded(Event event) = 0;
  virtual void Synchronize(Event event) = 0;
  // Between two events that have ended.
  virtual int64_t ElapsedUs(Event begin, Event end) = 0;

  virtual uint8_t* AllocateDevice(int64_t num_bytes) = 0;
  virtual void FreeDevice(uint8_t* data) = 0;
  // Host memory that the device reaches under the address `DevicePointer` gives.
  virtual uint8_t* AllocatePinned(int64_t num_bytes) = 0;
  virtual void FreePinned(uint8_t* data) = 0;
  virtual void RegisterHost(uint8_t* data, int64_t num_bytes) = 0;
  virtual void UnregisterHost(uint8_t* data) = 0;
  virtual uint8_t* DevicePointer(uint8_t* host) = 0;

  // The copies of one call may be done in any order.
  virtual void CopyToHost(const std::vector<HostCopy>& copies, Stream stream) = 0;
  virtual void CopyToDevice(const std::vector<HostCopy>& copies, Stream stream) = 0;
  virtual void CopyOnDevice(uint8_t* to, const uint8_t* from, int64_t num_bytes, Stream stream) = 0;
  virtual void Zero(void* data, int64_t num_bytes, Stream stream) = 0;

  // The kernels of page_kernels.h, by at most `most_blocks` blocks of threads.
  virtual void MovePages(Direction direction, const MoveArgs& args, int32_t most_blocks, Stream stream) = 0;
  virtual void MarkRepeats(const EntryList& entries, int32_t* repeats, Stream stream) = 0;
  virtual void Tally(const EntryList& entries, int32_t* status, Stream stream) = 0;

  // Blocks of threads that keep the whole device busy.
  virtual int32_t most_blocks() const = 0;
};

// CUDA itself, on the device of this ordinal. Throws CudaError where there is no such device.
std::unique_ptr<Runtime> MakeCudaRuntime(int32_t ordinal);

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_RUNTIME_H_
