// Times copies between a device and pinned host memory, so that transfers can go the faster way.
#ifndef JAXKV_CUDA_COPY_PROBE_H_
#define JAXKV_CUDA_COPY_PROBE_H_

#include <cstdint>

#include "cuda/runtime.h"

namespace jaxkv::cuda {

enum class LinkDirection { kToHost, kToDevice };

// Memory on both sides of the link. Not for several threads at once. `runtime` must outlive it.
class CopyProbe {
 public:
  // Throws CudaError where the device or the system has not `num_bytes` left.
  CopyProbe(Runtime& runtime, int64_t num_bytes);
  ~CopyProbe();
  CopyProbe(const CopyProbe&) = delete;
  CopyProbe& operator=(const CopyProbe&) = delete;

  // Microseconds that all bytes take, in scattered copies of `copy_bytes`: by a kernel of `host_blocks`
  // blocks of threads, or by the copy engines if that is 0. `copy_bytes` is a multiple of 512 and divides all
  // bytes.
  int64_t TimeUs(LinkDirection direction, int64_t copy_bytes, int32_t host_blocks);

 private:
  void Release() noexcept;
  void CopyByEngine(LinkDirection direction, int64_t copy_bytes);
  void CopyByKernel(LinkDirection direction, int64_t copy_bytes, int32_t host_blocks);

  Runtime& runtime_;
  const int64_t num_bytes_;
  Stream stream_ = nullptr;
  Event begin_ = nullptr;
  Event end_ = nullptr;
  uint8_t* device_ = nullptr;
  uint8_t* host_ = nullptr;
  uint8_t* numbers_ = nullptr;  // ids and addresses, pinned
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_COPY_PROBE_H_
