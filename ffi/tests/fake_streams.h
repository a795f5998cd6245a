// Streams, events and operations of a fake device.
#ifndef JAXKV_TESTS_FAKE_STREAMS_H_
#define JAXKV_TESTS_FAKE_STREAMS_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "fake_runtime.h"

namespace jaxkv::cuda {

struct FakeOperation {
  const char* what;
  size_t stream;
  int64_t index;      // in its stream, from 1 on
  Clock after;        // what ends before it begins; itself too
  Clock known_early;  // what the host had waited for when it asked for it
  std::shared_ptr<FakeOperation> awaits;
  std::function<Accesses()> accesses;
  std::function<void(Random&)> body;
  Accesses early;  // reads that may happen at any time since it was asked for
  uint32_t seed;
  bool begun = false;
  bool done = false;
  int64_t done_at = 0;
};

}  // namespace jaxkv::cuda

struct CUstream_st {
  size_t number;
  jaxkv::cuda::Clock after{};  // what ends before the next operation begins
  std::deque<std::shared_ptr<jaxkv::cuda::FakeOperation>> queue;
  std::shared_ptr<jaxkv::cuda::FakeOperation> last;
  bool is_live = true;
};

struct CUevent_st {
  std::shared_ptr<jaxkv::cuda::FakeOperation> recorded;
  bool is_live = true;
};

#endif  // JAXKV_TESTS_FAKE_STREAMS_H_
