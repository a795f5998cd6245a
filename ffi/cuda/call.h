// One transfer of the engine: what it was asked, the resources it holds, and how it ended.
#ifndef JAXKV_CUDA_CALL_H_
#define JAXKV_CUDA_CALL_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/bounce.h"
#include "cuda/pinned_pool.h"
#include "cuda/runtime.h"
#include "status.h"

namespace jaxkv::cuda {

// Pinned numbers that host and device read. Grows while no device reads it.
class PinnedNumbers {
 public:
  // `runtime` must outlive it.
  explicit PinnedNumbers(Runtime& runtime) : runtime_(runtime) {}
  ~PinnedNumbers();
  PinnedNumbers(const PinnedNumbers&) = delete;
  PinnedNumbers& operator=(const PinnedNumbers&) = delete;

  // Room for `count` numbers, whose values are lost. Throws CudaError.
  void Reserve(size_t count);
  int32_t* host() const { return host_; }
  const int32_t* device() const { return device_; }

 private:
  Runtime& runtime_;
  size_t capacity_ = 0;
  int32_t* host_ = nullptr;
  const int32_t* device_ = nullptr;
};

enum class CallState {
  kFree,
  kOpen,   // waits for its program
  kBegun,  // its program has run, its copies may not have
};

// Used by one transfer after another. A program finds it by the address of its tag, an array of JAX that is
// an operand of the program: what the transfer moves then needs no way of its own to the device.
struct Call {
  Call(Runtime& runtime, const void* tag);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Waits for copies that the host makes of what was copied out.
  void AwaitHost() const;

  Runtime& runtime;
  const void* const tag;
  std::atomic<CallState> state{CallState::kFree};

  std::vector<int32_t> numbers;  // as `Entries.numbers` of jaxkv.transfer.checks
  PinnedNumbers moved;           // block ids and then addresses of what moves
  std::shared_ptr<PinnedPool> pool;

  std::array<int32_t, kStatusSize> status{};
  std::string error;
  bool has_copies = false;  // begin and end were recorded
  Event begin;
  Event end;
  std::atomic<int32_t> host_copies{0};  // that must follow `end`
  std::shared_ptr<BounceRing> bounce;   // makes them
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_CALL_H_
