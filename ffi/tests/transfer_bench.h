// A group's leaves on a fake device and host pools to move them to and from, each beside the bytes that it
// should hold.
#ifndef JAXKV_TESTS_TRANSFER_BENCH_H_
#define JAXKV_TESTS_TRANSFER_BENCH_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/engine.h"
#include "fake_runtime.h"
#include "transfer_model.h"

namespace jaxkv::cuda {

// Ends the process where `holds` is false, in every build.
void Check(bool holds, const std::string& what);

// The leaves. A program's operations on them go to `compute`.
class Leaves {
 public:
  Leaves(FakeRuntime& device, const Layout& layout, Rng& rng);
  ~Leaves();
  Leaves(const Leaves&) = delete;
  Leaves& operator=(const Leaves&) = delete;

  const Layout& layout() const { return layout_; }
  Stream compute() const { return compute_; }
  PageSet pages() const;
  std::vector<Known>& model() { return model_; }

  // A step that writes all bytes anew, as one that was given the leaves for good may.
  void Overwrite(Rng& rng);
  // A step that reads all bytes; they should be what the model says now.
  void Compare();
  // What Compare found wrong so far; empty if nothing.
  std::string Findings() const { return *findings_; }

 private:
  FakeRuntime& device_;
  const Layout layout_;
  const Stream compute_;
  std::vector<uint8_t*> data_;
  std::vector<Known> model_;
  std::shared_ptr<std::string> findings_ = std::make_shared<std::string>();
};

// A host pool of equal records, known to programs while it is open.
class HostPool {
 public:
  HostPool(FakeRuntime& device, PoolKey key, int64_t num_bytes, Rng& rng);
  ~HostPool() { Close(); }
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  PoolKey key() const { return key_; }
  const uint8_t* data() const { return pool_data_; }
  Known& model() { return model_; }
  bool is_pinned() const { return is_pinned_; }
  // Whether the memory is still there.
  bool is_alive() const { return !memory_.expired(); }
  // Programs do not find it any more. What uses it keeps its memory.
  void Close();
  // The host reads these bytes of a pool that is alive.
  bool Matches(int64_t at, int64_t num_bytes);
  // The host writes these bytes, in memory and model.
  void Write(int64_t at, const Bytes& values);

 private:
  FakeRuntime& device_;
  const PoolKey key_;
  std::weak_ptr<uint8_t> memory_;
  uint8_t* pool_data_;
  bool is_pinned_;
  Known model_;
};

// What a transfer asks for.
struct Request {
  Direction direction;
  PoolKey pool;
  int32_t number;  // to call it off by
  std::vector<int32_t> blocks;
  std::vector<int32_t> addresses;

  std::vector<int32_t> numbers() const;
};

// Opens a call, with a new tag where none is free. Tags are the addresses of `tags`, which must not move.
const void* OpenCall(Engine& engine, const Request& request);

// The engine's own options, small enough for transfers to wait for room.
EngineOptions SmallOptions(Paths paths);
constexpr Paths kDirect = {int64_t{1} << 40, 0, 2};
constexpr Paths kByEngines = {0, 0, 2};
constexpr Paths kByKernels = {0, int64_t{1} << 40, 2};

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_TRANSFER_BENCH_H_
