// What transfers should do to leaves and records, byte by byte, and layouts to try it with. Shares no code
// with what it judges.
#ifndef JAXKV_TESTS_TRANSFER_MODEL_H_
#define JAXKV_TESTS_TRANSFER_MODEL_H_

#include <cstdint>
#include <random>
#include <vector>

#include "copy.h"

namespace jaxkv::cuda {

using Rng = std::mt19937_64;
using Bytes = std::vector<uint8_t>;

int64_t Draw(Rng& rng, int64_t first, int64_t last);
bool Chance(Rng& rng, double probability);
Bytes RandomBytes(Rng& rng, int64_t count);

// The pages of a group on one device.
struct Layout {
  std::vector<PagePlan> plans;
  std::vector<int64_t> leaf_bytes;
  int64_t record_bytes = 0;
  int64_t clear_from = 0;

  int64_t num_blocks() const;
};

struct LayoutLimits {
  int64_t most_leaves = 4;
  int64_t most_plans = 6;
  int64_t most_run_bytes = 700;
  int64_t most_loops = 4;  // runs of a page in either direction
  bool has_holes = false;  // bytes of a record that belong to other devices
  int64_t most_blocks = 12;
  int64_t unit_bytes = 512;  // records are a multiple of this
  int64_t least_blocks = 1;
};

// Leaves with dimensions in any order, gaps between them, and any alignment.
Layout DrawLayout(Rng& rng, const LayoutLimits& limits);

// Some bytes of which a few are unknown, since a failure left them so.
struct Known {
  Bytes bytes;
  std::vector<bool> is_unknown;

  explicit Known(Bytes initial) : bytes(std::move(initial)), is_unknown(bytes.size()) {}
  void Set(int64_t at, const Bytes& values);
  void Copy(int64_t at, const Known& from, int64_t from_at, int64_t count);
  void Clear(int64_t at, int64_t count);
  void Forget(int64_t at, int64_t count);
  // Whether `found` is these bytes, as far as they are known.
  bool Matches(const uint8_t* found) const;
};

// Copies the pages of `block` to the record at byte `at` of `records`, or back.
void ModelOffload(const Layout& layout, const std::vector<Known>& leaves, int64_t block, Known& records,
                  int64_t at);
void ModelRestore(const Layout& layout, std::vector<Known>& leaves, int64_t block, const Known& records,
                  int64_t at);
// The bytes that either would have written are unknown.
void ForgetOffload(const Layout& layout, Known& records, int64_t at);
void ForgetRestore(const Layout& layout, std::vector<Known>& leaves, int64_t block);

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_TRANSFER_MODEL_H_
