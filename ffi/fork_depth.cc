#include "fork_depth.h"

#include <pthread.h>

#include <atomic>
#include <new>

namespace jaxkv {
namespace {

std::atomic<int> depth{0};

bool CountForks() {
  if (pthread_atfork(nullptr, nullptr, [] { ++depth; }) != 0) throw std::bad_alloc();
  return true;
}

}  // namespace

int ForkDepth() {
  [[maybe_unused]] static const bool counting = CountForks();
  return depth;
}

}  // namespace jaxkv
