// The transfers of an engine by the tags that programs know them by.
#ifndef JAXKV_CUDA_CALL_TABLE_H_
#define JAXKV_CUDA_CALL_TABLE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cuda/call.h"
#include "cuda/runtime.h"

namespace jaxkv::cuda {

// What a transfer came to: the status of its entries, or why CUDA could not do it.
struct Outcome {
  std::vector<int32_t> status;
  std::string error;
};

// All methods may be called from several threads.
class CallTable {
 public:
  // `runtime` must outlive it.
  explicit CallTable(Runtime& runtime) : runtime_(runtime) {}

  // A call whose program is given the tag that is returned; null where AddTag has to be called first.
  const void* Open(const int32_t* numbers, size_t count);
  // Throws CudaError.
  void AddTag(const void* tag);
  // Whether `Close` would return at once, if the program has run.
  bool HasEnded(const void* tag);
  // Waits for the copies of a call whose program has run, or never will. Frees the tag.
  Outcome Close(const void* tag);
  // Whether a call was open that its program has not begun. Then it never will, and nobody is given its tag.
  bool GiveUp(const void* tag);

  // Calls of this number that have not begun do not begin.
  void Cancel(int32_t number);
  void Forget(int32_t number);
  bool IsCancelled(int32_t number) const;

  // Null where there is none of this tag.
  Call* Find(const void* tag) const;

 private:
  Runtime& runtime_;
  mutable std::mutex mutex_;
  std::unordered_map<const void*, std::unique_ptr<Call>> calls_;
  std::vector<const void*> free_tags_;
  std::unordered_set<int32_t> cancelled_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_CUDA_CALL_TABLE_H_
