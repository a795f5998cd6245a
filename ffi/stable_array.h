// An array that grows without moving what is in it.
#ifndef JAXKV_STABLE_ARRAY_H_
#define JAXKV_STABLE_ARRAY_H_

#include <cstddef>
#include <memory>
#include <vector>

namespace jaxkv {

template <typename T>
class StableArray {
 public:
  T& operator[](size_t i) { return blocks_[i / kBlockSize][i % kBlockSize]; }
  const T& operator[](size_t i) const { return blocks_[i / kBlockSize][i % kBlockSize]; }

  // Makes the first `size` elements exist; new ones are value-initialised.
  void Reach(size_t size) {
    while (blocks_.size() * kBlockSize < size) blocks_.push_back(std::make_unique<T[]>(kBlockSize));
  }

 private:
  static constexpr size_t kBlockSize = 1024;

  std::vector<std::unique_ptr<T[]>> blocks_;
};

inline void Prefetch(const void* address) { __builtin_prefetch(address); }

}  // namespace jaxkv

#endif  // JAXKV_STABLE_ARRAY_H_
