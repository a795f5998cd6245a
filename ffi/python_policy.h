// Lets Python classes decide which chunk goes first (jaxkv.offload.policies.CachePolicy).
#ifndef JAXKV_PYTHON_POLICY_H_
#define JAXKV_PYTHON_POLICY_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "eviction_policy.h"

namespace jaxkv {

// The Python objects behind the policies of one index, and what they raised: the index finishes its call
// first, so that it stays consistent.
struct PythonPolicies {
  nanobind::object make;  // make(num_slots) makes a policy.
  std::vector<nanobind::object> policies;
  std::exception_ptr first_error;

  // Keeps the exception being handled, if it is the first.
  void Catch() {
    if (first_error == nullptr) first_error = std::current_exception();
  }
  // Throws what was kept, once.
  void Rethrow() {
    if (first_error != nullptr) std::rethrow_exception(std::exchange(first_error, nullptr));
  }
  // For the garbage collector.
  int Visit(visitproc visit, void* arg);
  void Clear();
};

// Calls one Python policy, under the interpreter's lock. Chunks have ranks as LRU gives them, for slabs.
class PythonPolicy final : public EvictionPolicy {
 public:
  PythonPolicy(PolicyContext context, std::shared_ptr<PythonPolicies> shared);

  void SetCapacity(int64_t num_slots) override;
  void Insert(KeyId id, uint64_t rank) override;
  void Remove(KeyId id) override { Leave(id, false); }
  void Evict(KeyId id) override { Leave(id, true); }
  void EndUse(KeyId) override {}
  bool Touch(KeyId id, uint64_t rank) override;
  bool EndRequest(KeyId id, AccessKind kind, uint64_t rank) override;
  void MissStore(KeyId id) override;
  void BeginPlan() override;
  KeyId NextVictim() override;
  void EndPlan() override { victims_.reset(); }

 private:
  bool Has(KeyId id) const;
  void Leave(KeyId id, bool evicted);
  KeyId Advance();
  nanobind::object& policy() const { return shared_->policies[number_]; }
  template <typename Call>
  void Guarded(const Call& call);

  const std::shared_ptr<PythonPolicies> shared_;
  const uint32_t number_;  // Also marks the nodes of this policy's chunks.
  int64_t num_slots_ = -1;
  int64_t num_chunks_ = 0;
  // The search of a plan.
  nanobind::object victims_;
  KeyId victim_ = kNoKey;
  int64_t num_named_ = 0;
};

}  // namespace jaxkv

#endif  // JAXKV_PYTHON_POLICY_H_
