// Moves blocks between leaves on one device and a host pool: which way, through which memory, in which order.
#ifndef JAXKV_CUDA_ENGINE_H_
#define JAXKV_CUDA_ENGINE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/batch.h"
#include "cuda/bounce.h"
#include "cuda/call.h"
#include "cuda/call_table.h"
#include "cuda/engine_options.h"
#include "cuda/page_moves.h"
#include "cuda/pinned_pool.h"
#include "cuda/prefetches.h"
#include "cuda/runtime.h"
#include "cuda/staging_ring.h"

namespace jaxkv::cuda {

// Records pass through staging memory of the device: leaves are read and written on the stream of the
// program, so that XLA orders them among its own, and the host on a stream of its own for each direction,
// beside the model. All methods may be called from several threads.
class Engine {
 public:
  // `runtime` must outlive it. Throws CudaError.
  Engine(Runtime& runtime, const EngineOptions& options);
  // No call may be under way any more.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Makes staging memory fit for records of this size. Where the device has none left, transfers are direct.
  void Fit(int64_t record_bytes);
  // Why there is no staging memory; empty if there is.
  std::string staging_refusal() const;
  Paths paths() const;
  void set_paths(const Paths& paths);
  WayCounts way_counts();

  // -- for those who start transfers --

  // As those of CallTable.
  const void* Open(const int32_t* numbers, size_t count) { return calls_.Open(numbers, count); }
  void AddTag(const void* tag) { calls_.AddTag(tag); }
  bool HasEnded(const void* tag) { return calls_.HasEnded(tag); }
  Outcome Close(const void* tag) { return calls_.Close(tag); }
  // Ends a call whose program may have run, or be still to come: that will find nothing to do. Waits for the
  // copies of one that has run.
  void Abandon(const void* tag);
  void Cancel(int32_t number) { calls_.Cancel(number); }
  void Forget(int32_t number) { calls_.Forget(number); }

  // Brings the records of an open call, whatever its block ids, to staging memory, as far as there is room;
  // a restore of them finds them there. They stay until they are restored, written anew in the pool or
  // crowded out by later ones. Never throws.
  void Prefetch(const void* tag, int64_t pool_id, int64_t record_bytes);
  // Records at these addresses of a pool may have changed.
  void ForgetPrefetched(int32_t generation, const int32_t* addresses, size_t count);

  // -- for programs --

  // Moves the blocks of the call that `tag` names, in one direction, after what `compute` was given so far.
  // `pages` is nothing where leaves and plans contradict each other. Never throws.
  void Move(Direction direction, const void* tag, int64_t pool_id, const std::optional<PageSet>& pages,
            Stream compute);

 private:
  std::optional<std::vector<BlockMove>> Admit(Direction direction, Call& call, int64_t pool_id,
                                              const std::optional<PageSet>& pages) const;
  void Begin(Direction direction, Call& call, const PageSet& pages, const std::vector<BlockMove>& moves,
             Stream compute);
  void BeginAs(Direction direction, const Batch& batch, const std::vector<Landed>& landed);
  void MoveDirectly(Direction direction, const Batch& batch);
  void StageOut(const Batch& batch);
  void StageIn(const Batch& batch, const std::vector<Landed>& landed);
  void FromStaging(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count);
  void ToStaging(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count);
  void Bounce(const Batch& batch, const StagingRing::Slot& slot, const std::vector<PagePlan>& plans,
              size_t first, size_t count);
  void Unbounce(const Batch& batch, const StagingRing::Slot& slot, size_t first, size_t count);
  BounceRing::Slot& NextBounce();
  void Fetch(const Batch& batch);
  StagingRing::Slot* HoldSlot(const std::vector<StagingRing::Slot*>& kept);
  void AbandonAll(const EmptySlots& slots);
  void Launch(Direction direction, const PageSet& pages, const EntryList& entries, int32_t most_blocks,
              Stream stream);
  void Drain(Stream compute) noexcept;

  Runtime& runtime_;
  const EngineOptions options_;
  const Stream out_;  // device to host
  const Stream in_;   // host to device

  CallTable calls_;

  // Programs begin their copies one after another.
  std::mutex begin_mutex_;
  std::unique_ptr<StagingRing> ring_out_;
  std::unique_ptr<StagingRing> ring_in_;
  std::shared_ptr<BounceRing> bounce_;  // Calls that use it keep it.
  WayCounts way_counts_;
  Prefetches prefetches_;                    // in slots of ring_in_
  std::unique_ptr<PinnedNumbers> counting_;  // 0, 1, 2, ...

  mutable std::mutex mutex_;
  Paths paths_;
  std::string staging_refusal_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_ENGINE_H_
