#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/page_moves.h"

namespace jaxkv::cuda {
namespace {

constexpr int32_t kWarp = 32;
constexpr int32_t kThreads = 256;
constexpr int32_t kWarpsPerBlock = kThreads / kWarp;
constexpr int32_t kTallyThreads = 1024;

__device__ Lane ThisLane() {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kWarpsPerBlock) + threadIdx.x / kWarp;
  return {warp, gridDim.x * static_cast<int64_t>(kWarpsPerBlock), static_cast<int32_t>(threadIdx.x % kWarp),
          kWarp};
}

template <Direction kDirection>
__global__ void __launch_bounds__(kThreads, 3) MovePagesKernel(const __grid_constant__ MoveArgs args) {
  MovePages<kDirection>(args, ThisLane());
}

__global__ void __launch_bounds__(kThreads)
    MarkRepeatsKernel(const __grid_constant__ EntryList entries, int32_t* repeats) {
  MarkRepeats(entries, repeats, ThisLane());
}

__global__ void __launch_bounds__(kTallyThreads)
    TallyKernel(const __grid_constant__ EntryList entries, int32_t* status) {
  __shared__ int32_t counts[kStatusSize];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const auto num_threads = static_cast<int32_t>(blockDim.x);
  BeginTally(counts, thread, num_threads);
  __syncthreads();
  TallyEntries(entries, counts, thread, num_threads);
  __syncthreads();
  EndTally(counts, status, thread, num_threads);
}

unsigned NumBlocks(int64_t num_warps, int32_t most_blocks) {
  const int64_t needed = (num_warps + kWarpsPerBlock - 1) / kWarpsPerBlock;
  return static_cast<unsigned>(std::min<int64_t>(needed, most_blocks));
}

}  // namespace

cudaError_t LaunchMovePages(Direction direction, const MoveArgs& args, int32_t most_blocks,
                            cudaStream_t stream) {
  const unsigned blocks = NumBlocks(NumUnits(args), most_blocks);
  if (blocks == 0) return cudaSuccess;
  if (direction == Direction::kToRecords) {
    MovePagesKernel<Direction::kToRecords><<<blocks, kThreads, 0, stream>>>(args);
  } else {
    MovePagesKernel<Direction::kToLeaves><<<blocks, kThreads, 0, stream>>>(args);
  }
  return cudaGetLastError();
}

cudaError_t LaunchMarkRepeats(const EntryList& entries, int32_t* repeats, cudaStream_t stream) {
  constexpr int32_t kMostBlocks = 1024;
  const unsigned blocks = NumBlocks(entries.num_entries, kMostBlocks);
  if (blocks == 0) return cudaSuccess;
  MarkRepeatsKernel<<<blocks, kThreads, 0, stream>>>(entries, repeats);
  return cudaGetLastError();
}

cudaError_t LaunchTally(const EntryList& entries, int32_t* status, cudaStream_t stream) {
  TallyKernel<<<1, kTallyThreads, 0, stream>>>(entries, status);
  return cudaGetLastError();
}

}  // namespace jaxkv::cuda
