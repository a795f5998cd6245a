#include "transfer_bench.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace jaxkv::cuda {

void Check(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::abort();
}

Leaves::Leaves(FakeRuntime& device, const Layout& layout, Rng& rng)
    : device_(device), layout_(layout), compute_(device.MakeStream()) {
  for (int64_t num_bytes : layout.leaf_bytes) {
    data_.push_back(device.AllocateDevice(num_bytes));
    model_.emplace_back(Bytes(static_cast<size_t>(num_bytes)));
  }
  Overwrite(rng);
}

Leaves::~Leaves() {
  try {
    device_.Synchronize(compute_);
    for (uint8_t* leaf : data_) device_.FreeDevice(leaf);
    device_.FreeStream(compute_);
  } catch (const CudaError&) {
    // The device is lost.
  }
}

PageSet Leaves::pages() const { return {layout_.plans, data_, layout_.record_bytes, layout_.clear_from}; }

void Leaves::Overwrite(Rng& rng) {
  for (size_t i = 0; i < data_.size(); ++i) {
    Bytes values = RandomBytes(rng, layout_.leaf_bytes[i]);
    model_[i].Set(0, values);
    Accesses accesses;
    accesses.Write(data_[i], layout_.leaf_bytes[i]);
    device_.Enqueue(compute_, accesses, [to = FakeRuntime::Look(data_[i]), values = std::move(values)] {
      std::memcpy(to, values.data(), values.size());
    });
  }
}

void Leaves::Compare() {
  for (size_t i = 0; i < data_.size(); ++i) {
    Accesses accesses;
    accesses.Read(data_[i], layout_.leaf_bytes[i]);
    device_.Enqueue(compute_, accesses,
                    [at = FakeRuntime::Look(data_[i]), wanted = model_[i], i, findings = findings_] {
                      if (!wanted.Matches(at)) *findings += "leaf " + std::to_string(i) + " differs; ";
                    });
  }
}

HostPool::HostPool(FakeRuntime& device, PoolKey key, int64_t num_bytes, Rng& rng)
    : device_(device), key_(key), model_(RandomBytes(rng, num_bytes)) {
  const std::shared_ptr<uint8_t> memory(
      static_cast<uint8_t*>(std::aligned_alloc(4096, static_cast<size_t>((num_bytes + 4095) / 4096 * 4096))),
      std::free);
  memory_ = memory;
  pool_data_ = memory.get();
  std::memcpy(pool_data_, model_.bytes.data(), model_.bytes.size());
  auto pool = std::make_shared<PinnedPool>(device, pool_data_, num_bytes, memory);
  is_pinned_ = pool->device_data() != nullptr;
  PinnedPools::Global().Add(key, std::move(pool));
}

void HostPool::Close() { PinnedPools::Global().Remove(key_); }

bool HostPool::Matches(int64_t at, int64_t num_bytes) {
  Check(is_alive(), "a pool that something uses is there");
  device_.HostReads(pool_data_ + at, num_bytes);
  if (std::memcmp(pool_data_ + at, model_.bytes.data() + at, static_cast<size_t>(num_bytes)) == 0)
    return true;
  for (int64_t i = at; i < at + num_bytes; ++i) {
    const auto k = static_cast<size_t>(i);
    if (pool_data_[i] != model_.bytes[k] && !model_.is_unknown[k]) return false;
  }
  return true;
}

void HostPool::Write(int64_t at, const Bytes& values) {
  device_.HostWrites(pool_data_ + at, static_cast<int64_t>(values.size()));
  std::memcpy(pool_data_ + at, values.data(), values.size());
  model_.Set(at, values);
}

std::vector<int32_t> Request::numbers() const {
  std::vector<int32_t> numbers = {pool.generation, number};
  numbers.insert(numbers.end(), blocks.begin(), blocks.end());
  numbers.insert(numbers.end(), addresses.begin(), addresses.end());
  return numbers;
}

const void* OpenCall(Engine& engine, const Request& request) {
  static std::atomic<uintptr_t> last_tag{0x1000};
  const std::vector<int32_t> numbers = request.numbers();
  for (;;) {
    const void* tag = engine.Open(numbers.data(), numbers.size());
    if (tag != nullptr) return tag;
    engine.AddTag(reinterpret_cast<const void*>(last_tag += 0x100));
  }
}

EngineOptions SmallOptions(Paths paths) {
  EngineOptions options;
  options.staging_bytes = 3 * 4096;
  options.slot_bytes = 4096;
  options.paths = paths;
  return options;
}

}  // namespace jaxkv::cuda
