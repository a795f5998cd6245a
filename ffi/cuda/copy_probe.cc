#include "cuda/copy_probe.h"

#include <vector>

#include "cuda/page_moves.h"
#include "cuda/record_copies.h"

namespace jaxkv::cuda {

CopyProbe::CopyProbe(Runtime& runtime, int64_t num_bytes) : runtime_(runtime), num_bytes_(num_bytes) {
  try {
    stream_ = runtime_.MakeStream();
    begin_ = runtime_.MakeEvent();
    end_ = runtime_.MakeEvent();
    device_ = runtime_.AllocateDevice(num_bytes);
    host_ = runtime_.AllocatePinned(num_bytes);
    const int64_t most_copies = num_bytes / kAddressUnitBytes;
    numbers_ = runtime_.AllocatePinned(2 * most_copies * static_cast<int64_t>(sizeof(int32_t)));
  } catch (const CudaError&) {
    Release();
    throw;
  }
}

CopyProbe::~CopyProbe() { Release(); }

void CopyProbe::Release() noexcept {
  try {
    if (stream_ != nullptr) runtime_.Synchronize(stream_);
    if (numbers_ != nullptr) runtime_.FreePinned(numbers_);
    if (host_ != nullptr) runtime_.FreePinned(host_);
    if (device_ != nullptr) runtime_.FreeDevice(device_);
    if (end_ != nullptr) runtime_.FreeEvent(end_);
    if (begin_ != nullptr) runtime_.FreeEvent(begin_);
    if (stream_ != nullptr) runtime_.FreeStream(stream_);
  } catch (const CudaError&) {
    // The device is lost.
  }
}

int64_t CopyProbe::TimeUs(LinkDirection direction, int64_t copy_bytes, int32_t host_blocks) {
  runtime_.Record(begin_, stream_);
  if (host_blocks == 0) {
    CopyByEngine(direction, copy_bytes);
  } else {
    CopyByKernel(direction, copy_bytes, host_blocks);
  }
  runtime_.Record(end_, stream_);
  runtime_.Synchronize(end_);
  return runtime_.ElapsedUs(begin_, end_);
}

// From the last to the first, so that no two copies are one.
void CopyProbe::CopyByEngine(LinkDirection direction, int64_t copy_bytes) {
  std::vector<HostCopy> copies;
  for (int64_t offset = 0; offset < num_bytes_; offset += copy_bytes) {
    copies.push_back({host_ + num_bytes_ - copy_bytes - offset, device_ + offset, copy_bytes});
  }
  direction == LinkDirection::kToHost ? runtime_.CopyToHost(copies, stream_)
                                      : runtime_.CopyToDevice(copies, stream_);
}

void CopyProbe::CopyByKernel(LinkDirection direction, int64_t copy_bytes, int32_t host_blocks) {
  const int64_t count = num_bytes_ / copy_bytes;
  auto* ids = reinterpret_cast<int32_t*>(numbers_);
  for (int64_t i = 0; i < count; ++i) {
    ids[i] = static_cast<int32_t>(i);
    ids[count + i] = static_cast<int32_t>((num_bytes_ - copy_bytes - i * copy_bytes) / kAddressUnitBytes);
  }
  const auto* device_ids = reinterpret_cast<const int32_t*>(runtime_.DevicePointer(numbers_));
  EntryList entries = {};
  entries.ids = device_ids;
  entries.addresses = device_ids + count;
  entries.num_entries = static_cast<int32_t>(count);
  entries.num_blocks = static_cast<int32_t>(count);
  entries.area = runtime_.DevicePointer(host_);
  entries.area_bytes = num_bytes_;
  entries.record_bytes = copy_bytes;
  const PageSet pages = {{WholeRecord(count, copy_bytes)}, {device_}, copy_bytes, copy_bytes};
  const Direction kernel = direction == LinkDirection::kToHost ? Direction::kToRecords : Direction::kToLeaves;
  for (const MoveArgs& args : CutMove(pages, entries, /*clears_skipped=*/false)) {
    runtime_.MovePages(kernel, args, host_blocks, stream_);
  }
}

}  // namespace jaxkv::cuda
