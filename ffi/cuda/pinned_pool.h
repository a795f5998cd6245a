// Host pools as the device reaches them: pinned where the system allows it. Owns registrations, not the
// memory.
#ifndef JAXKV_CUDA_PINNED_POOL_H_
#define JAXKV_CUDA_PINNED_POOL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/runtime.h"
#include "pool.h"

namespace jaxkv::cuda {

// The bytes of one pool. `runtime` must outlive it; `owner` is let go of once nothing of the device uses
// them.
class PinnedPool {
 public:
  PinnedPool(Runtime& runtime, uint8_t* data, int64_t num_bytes, std::shared_ptr<void> owner);
  // Waits until all work that was noted has ended.
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  uint8_t* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  // Where the device finds `data`; null if the memory could not be pinned.
  uint8_t* device_data() const { return device_data_; }
  // Why it could not.
  const std::string& refusal() const { return refusal_; }

  // Whether [offset, offset + length) lies inside. Safe for any values.
  bool Contains(int64_t offset, int64_t length) const;

  // Work given to `stream` so far uses the pool, and nobody else waits for its end. Where that cannot be
  // noted, this waits for it.
  void NoteUse(Runtime& runtime, Stream stream);

 private:
  void Unregister() noexcept;

  Runtime& runtime_;
  uint8_t* const data_;
  const int64_t num_bytes_;
  std::shared_ptr<void> owner_;
  uint8_t* device_data_ = nullptr;
  std::string refusal_;
  std::mutex mutex_;
  using User = std::pair<Runtime*, Stream>;
  std::map<User, Event> last_uses_;
};

// Pinned pools by what compiled programs know them by. Whoever found one keeps it alive.
class PinnedPools {
 public:
  static PinnedPools& Global();

  void Add(PoolKey key, std::shared_ptr<PinnedPool> pool);
  // Null if there is no such pool any more.
  std::shared_ptr<PinnedPool> Find(PoolKey key) const;
  // The pool of that number, of whichever generation, and its generation.
  std::pair<std::shared_ptr<PinnedPool>, int32_t> FindAny(int64_t id) const;
  // The pool ends when the last one who found it lets go.
  void Remove(PoolKey key);

 private:
  mutable std::mutex mutex_;
  std::map<int64_t, std::pair<std::shared_ptr<PinnedPool>, int32_t>> pools_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_PINNED_POOL_H_
