#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/runtime.h"

namespace jaxkv::cuda {
namespace {

static_assert(std::is_same_v<Stream, cudaStream_t> && std::is_same_v<Event, cudaEvent_t>);

constexpr int32_t kBlocksPerMultiprocessor = 4;

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // So that the next call does not report it once more.
  throw CudaError(std::string(what) + " failed: " + cudaGetErrorName(error) + ", " +
                  cudaGetErrorString(error));
}

// Makes a device current on this thread, and afterwards the one it was before.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal) {
    Require(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != ordinal) Require(cudaSetDevice(ordinal), "cudaSetDevice");
    changed_ = before_ != ordinal;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Many copies in one call, as far as toolkit and driver know such calls; else one by one.
class CopyBatch {
 public:
  // When the sources may be read: at any time after the call, or only once what the stream was given before
  // has ended.
  enum class Sources { kAreThere, kComeInStreamOrder };

  explicit CopyBatch(size_t count) {
    to_.reserve(count);
    from_.reserve(count);
    sizes_.reserve(count);
  }

  void Add(uint8_t* to, uint8_t* from, int64_t num_bytes) {
    to_.push_back(to);
    from_.push_back(from);
    sizes_.push_back(static_cast<size_t>(num_bytes));
  }

  void Run(Stream stream, Sources sources) {
    if (sizes_.empty() || RunAtOnce(stream, sources)) return;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      Require(cudaMemcpyAsync(to_[i], from_[i], sizes_[i], cudaMemcpyDefault, stream), "cudaMemcpyAsync");
    }
  }

 private:
#if CUDART_VERSION >= 12080
  bool RunAtOnce(Stream stream, Sources sources) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder =
        sources == Sources::kAreThere ? cudaMemcpySrcAccessOrderAny : cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
#if CUDART_VERSION >= 13000
    const cudaError_t error = cudaMemcpyBatchAsync(to_.data(), from_.data(), sizes_.data(), sizes_.size(),
                                                   &attributes, &first, 1, stream);
#else
    size_t failed;
    const cudaError_t error = cudaMemcpyBatchAsync(to_.data(), from_.data(), sizes_.data(), sizes_.size(),
                                                   &attributes, &first, 1, &failed, stream);
#endif
    if (error == cudaErrorCallRequiresNewerDriver || error == cudaErrorNotSupported) {
      cudaGetLastError();
      return false;
    }
    Require(error, "cudaMemcpyBatchAsync");
    return true;
  }
#else
  bool RunAtOnce(Stream, Sources) { return false; }
#endif

  std::vector<void*> to_;
  std::vector<void*> from_;
  std::vector<size_t> sizes_;
};

class CudaRuntime : public Runtime {
 public:
  explicit CudaRuntime(int ordinal) : ordinal_(ordinal) {
    Require(cudaDeviceGetAttribute(&num_multiprocessors_, cudaDevAttrMultiProcessorCount, ordinal),
            "cudaDeviceGetAttribute");
  }

  Stream MakeStream() override {
    const DeviceScope scope(ordinal_);
    int least_urgent;
    int most_urgent;
    Require(cudaDeviceGetStreamPriorityRange(&least_urgent, &most_urgent),
            "cudaDeviceGetStreamPriorityRange");
    // So that a kernel's few blocks of threads get in between those of the model, which are many.
    Stream stream;
    Require(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, most_urgent),
            "cudaStreamCreateWithPriority");
    return stream;
  }

  void FreeStream(Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }

  void Synchronize(Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  }

  Event MakeEvent() override {
    const DeviceScope scope(ordinal_);
    Event event;
    Require(cudaEventCreateWithFlags(&event, cudaEventBlockingSync), "cudaEventCreateWithFlags");
    return event;
  }

  void FreeEvent(Event event) override {
    const DeviceScope scope(ordinal_);
    Require(cudaEventDestroy(event), "cudaEventDestroy");
  }

  void Record(Event event, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(cudaEventRecord(event, stream), "cudaEventRecord");
  }

  void WaitFor(Stream stream, Event event) override {
    const DeviceScope scope(ordinal_);
    Require(cudaStreamWaitEvent(stream, event, 0), "cudaStreamWaitEvent");
  }

  bool HasEnded(Event event) override {
    const DeviceScope scope(ordinal_);
    const cudaError_t error = cudaEventQuery(event);
    if (error == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    Require(error, "cudaEventQuery");
    return true;
  }

  void Synchronize(Event event) override {
    const DeviceScope scope(ordinal_);
    Require(cudaEventSynchronize(event), "cudaEventSynchronize");
  }

  int64_t ElapsedUs(Event begin, Event end) override {
    const DeviceScope scope(ordinal_);
    float milliseconds = 0;
    Require(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
    return static_cast<int64_t>(1000 * milliseconds);
  }

  uint8_t* AllocateDevice(int64_t num_bytes) override {
    const DeviceScope scope(ordinal_);
    void* data;
    Require(cudaMalloc(&data, static_cast<size_t>(num_bytes)), "cudaMalloc");
    return static_cast<uint8_t*>(data);
  }

  void FreeDevice(uint8_t* data) override {
    const DeviceScope scope(ordinal_);
    Require(cudaFree(data), "cudaFree");
  }

  uint8_t* AllocatePinned(int64_t num_bytes) override {
    const DeviceScope scope(ordinal_);
    void* data;
    Require(cudaHostAlloc(&data, static_cast<size_t>(num_bytes), cudaHostAllocPortable | cudaHostAllocMapped),
            "cudaHostAlloc");
    return static_cast<uint8_t*>(data);
  }

  void FreePinned(uint8_t* data) override {
    const DeviceScope scope(ordinal_);
    Require(cudaFreeHost(data), "cudaFreeHost");
  }

  void RegisterHost(uint8_t* data, int64_t num_bytes) override {
    const DeviceScope scope(ordinal_);
    Require(cudaHostRegister(data, static_cast<size_t>(num_bytes),
                             cudaHostRegisterPortable | cudaHostRegisterMapped),
            "cudaHostRegister");
  }

  void UnregisterHost(uint8_t* data) override {
    const DeviceScope scope(ordinal_);
    Require(cudaHostUnregister(data), "cudaHostUnregister");
  }

  uint8_t* DevicePointer(uint8_t* host) override {
    const DeviceScope scope(ordinal_);
    void* device;
    Require(cudaHostGetDevicePointer(&device, host, 0), "cudaHostGetDevicePointer");
    return static_cast<uint8_t*>(device);
  }

  void CopyToHost(const std::vector<HostCopy>& copies, Stream stream) override {
    const DeviceScope scope(ordinal_);
    CopyBatch batch(copies.size());
    for (const HostCopy& copy : copies) batch.Add(copy.host, copy.device, copy.num_bytes);
    batch.Run(stream, CopyBatch::Sources::kComeInStreamOrder);
  }

  // A slot is read only once the transfer that wrote it has ended.
  void CopyToDevice(const std::vector<HostCopy>& copies, Stream stream) override {
    const DeviceScope scope(ordinal_);
    CopyBatch batch(copies.size());
    for (const HostCopy& copy : copies) batch.Add(copy.device, copy.host, copy.num_bytes);
    batch.Run(stream, CopyBatch::Sources::kAreThere);
  }

  void CopyOnDevice(uint8_t* to, const uint8_t* from, int64_t num_bytes, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(cudaMemcpyAsync(to, from, static_cast<size_t>(num_bytes), cudaMemcpyDeviceToDevice, stream),
            "cudaMemcpyAsync");
  }

  void Zero(void* data, int64_t num_bytes, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(cudaMemsetAsync(data, 0, static_cast<size_t>(num_bytes), stream), "cudaMemsetAsync");
  }

  void MovePages(Direction direction, const MoveArgs& args, int32_t most_blocks, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(LaunchMovePages(direction, args, most_blocks, stream), "the launch of MovePages");
  }

  void MarkRepeats(const EntryList& entries, int32_t* repeats, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(LaunchMarkRepeats(entries, repeats, stream), "the launch of MarkRepeats");
  }

  void Tally(const EntryList& entries, int32_t* status, Stream stream) override {
    const DeviceScope scope(ordinal_);
    Require(LaunchTally(entries, status, stream), "the launch of Tally");
  }

  int32_t most_blocks() const override { return kBlocksPerMultiprocessor * num_multiprocessors_; }

 private:
  const int ordinal_;
  int num_multiprocessors_ = 0;
};

}  // namespace

std::unique_ptr<Runtime> MakeCudaRuntime(int32_t ordinal) { return std::make_unique<CudaRuntime>(ordinal); }

}  // namespace jaxkv::cuda
