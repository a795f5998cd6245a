// What the operations of a fake device read and write, and which of them could meet: those that touch the
// same bytes, one of them writing, with nothing that makes one wait for the other.
#ifndef JAXKV_TESTS_FAKE_ACCESSES_H_
#define JAXKV_TESTS_FAKE_ACCESSES_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/page_kernels.h"

namespace jaxkv::cuda {

// How many operations of each stream come before something. Stream 0 is the host.
constexpr size_t kMostStreams = 16;
using Clock = std::array<int64_t, kMostStreams>;
void Join(Clock& clock, const Clock& other);

// [begin, end), as the host addresses it.
struct ByteRange {
  const uint8_t* begin;
  const uint8_t* end;
};

struct Accesses {
  std::vector<ByteRange> reads;
  std::vector<ByteRange> writes;

  void Read(const void* data, int64_t num_bytes);
  void Write(const void* data, int64_t num_bytes);
  // Sorts and merges. Returns whether something is written twice, or read and written.
  bool Tidy();
};

// The accesses of the `index`-th operation of a stream, which begin once all of `after` has ended.
struct Footprint {
  const char* what;
  size_t stream;
  int64_t index;
  Clock after;
  Accesses accesses;
};

// Footprints in an order in which they could happen.
class AccessLog {
 public:
  // Returns what it conflicts with; empty if with nothing.
  std::string Add(Footprint footprint);
  // All that comes next comes after `floor`.
  void Forget(const Clock& floor);

 private:
  std::vector<Footprint> footprints_;
};

enum class MemoryKind { kDevice, kPinned, kRegistered };

// The memory that a device may touch. What was freed stays, filled with kPoison, until this ends.
class FakeMemory {
 public:
  static constexpr uint8_t kPoison = 0xdd;

  uint8_t* Allocate(int64_t num_bytes, MemoryKind kind);
  // Memory that somebody else owns.
  bool Register(uint8_t* data, int64_t num_bytes);
  // Returns its size; 0 if there is none of that kind.
  int64_t Free(uint8_t* data, MemoryKind kind);
  bool IsLive(ByteRange range) const;
  // Whether all of them can be touched.
  bool AreLive(const Accesses& accesses) const;
  // What was not freed.
  std::string Leaks() const;

 private:
  struct Region {
    int64_t num_bytes;
    MemoryKind kind;
    bool live;
    std::unique_ptr<uint8_t[]> owned;
  };
  std::map<const uint8_t*, Region> regions_;
};

// What a launch touches by the contract of PagePlan. Ids that cannot be read are not followed.
Accesses ListAccesses(Direction direction, const MoveArgs& args, const FakeMemory& memory);
Accesses ListAccesses(const EntryList& entries);

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_FAKE_ACCESSES_H_
