#include "cuda/call_table.h"

#include <algorithm>
#include <utility>

namespace jaxkv::cuda {

const void* CallTable::Open(const int32_t* numbers, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (free_tags_.empty()) return nullptr;
  Call& call = *calls_.at(free_tags_.back());
  call.numbers.assign(numbers, numbers + count);
  call.status = {};
  call.error.clear();
  call.has_copies = false;
  call.state.store(CallState::kOpen, std::memory_order_release);
  free_tags_.pop_back();
  return call.tag;
}

void CallTable::AddTag(const void* tag) {
  auto call = std::make_unique<Call>(runtime_, tag);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (calls_.emplace(tag, std::move(call)).second) free_tags_.push_back(tag);
}

bool CallTable::HasEnded(const void* tag) {
  const Call* call = Find(tag);
  if (call == nullptr || call->state.load(std::memory_order_acquire) != CallState::kBegun) return true;
  if (call->host_copies.load(std::memory_order_acquire) > 0) return false;
  try {
    return !call->has_copies || runtime_.HasEnded(call->end);
  } catch (const CudaError&) {
    return true;  // Close tells.
  }
}

Outcome CallTable::Close(const void* tag) {
  Call* call = Find(tag);
  const CallState state = call == nullptr ? CallState::kFree : call->state.load(std::memory_order_acquire);
  if (state == CallState::kFree) return {{}, "this transfer was closed before"};
  const bool has_run = state == CallState::kBegun;
  if (!has_run) call->error = "its program ended without having begun it";
  if (has_run) call->AwaitHost();
  try {
    if (has_run && call->has_copies) {
      runtime_.Synchronize(call->end);
      call->status[kElapsedUs] =
          static_cast<int32_t>(std::min<int64_t>(runtime_.ElapsedUs(call->begin, call->end), INT32_MAX));
    }
  } catch (const CudaError& error) {
    call->error = error.what();
  }
  Outcome outcome = {{call->status.begin(), call->status.end()}, call->error};
  call->pool = nullptr;
  call->bounce = nullptr;
  call->state.store(CallState::kFree, std::memory_order_release);
  const std::lock_guard<std::mutex> lock(mutex_);
  free_tags_.push_back(tag);
  return outcome;
}

bool CallTable::GiveUp(const void* tag) {
  Call* call = Find(tag);
  CallState open = CallState::kOpen;
  return call != nullptr && call->state.compare_exchange_strong(open, CallState::kFree);
}

void CallTable::Cancel(int32_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_.insert(number);
}

void CallTable::Forget(int32_t number) {
  const std::lock_guard<std::mutex> lock(mutex_);
  cancelled_.erase(number);
}

Call* CallTable::Find(const void* tag) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = calls_.find(tag);
  return found == calls_.end() ? nullptr : found->second.get();
}

bool CallTable::IsCancelled(int32_t number) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return cancelled_.count(number) > 0;
}

}  // namespace jaxkv::cuda
