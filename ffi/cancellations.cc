#include "cancellations.h"

namespace jaxkv {

Cancellations& Cancellations::Global() {
  static auto* cancellations = new Cancellations;  // XLA may still run a call while the process ends.
  return *cancellations;
}

void Cancellations::Add(int32_t call) {
  const std::lock_guard lock(mutex_);
  calls_.insert(call);
  num_calls_ = calls_.size();
}

void Cancellations::Remove(int32_t call) {
  const std::lock_guard lock(mutex_);
  calls_.erase(call);
  num_calls_ = calls_.size();
}

bool Cancellations::Contains(int32_t call) const {
  if (num_calls_ == 0) return false;
  const std::lock_guard lock(mutex_);
  return calls_.count(call) != 0;
}

}  // namespace jaxkv
