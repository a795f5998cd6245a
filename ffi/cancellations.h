// Which calls of pool ops were called off. Knows their numbers only.
#ifndef JAXKV_CANCELLATIONS_H_
#define JAXKV_CANCELLATIONS_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <unordered_set>

namespace jaxkv {

// A call looks here once, before it copies its first byte. All methods may be called from several threads.
class Cancellations {
 public:
  static Cancellations& Global();

  void Add(int32_t call);
  void Remove(int32_t call);
  bool Contains(int32_t call) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_set<int32_t> calls_;
  std::atomic<size_t> num_calls_{0};  // As a rule 0, and then no lock is taken.
};

}  // namespace jaxkv

#endif  // JAXKV_CANCELLATIONS_H_
