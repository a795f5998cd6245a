// Reads keys out of Python objects. Knows jaxkv.keys, and nothing of what keys are for.
#ifndef JAXKV_KEY_READER_H_
#define JAXKV_KEY_READER_H_

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "key_table.h"
#include "request_log.h"

namespace jaxkv {

// The Python types whose keys need not be made to be read, and the names of what they consist of: interned,
// for a step reads many short runs.
struct KeyTypes {
  nanobind::object key_run;
  nanobind::object key_runs;
  nanobind::object runs;
  nanobind::object hashes;
  nanobind::object group;
  nanobind::object block_hashes;
  nanobind::object start;
  nanobind::object step;

  static KeyTypes Import();
};

// An OffloadKey as Python's bytes.
nanobind::bytes ToPython(const OffloadKey& key);
// Throws Python's TypeError for what is not bytes, ValueError for a length no key has.
OffloadKey KeyFromPython(nanobind::handle key);

// A collection of keys: a KeyRun, KeyRuns, or anything that yields bytes.
class KeyReader {
 public:
  // Throws Python's TypeError for what holds no keys.
  KeyReader(nanobind::handle keys, const KeyTypes& types);

  size_t size() const { return size_; }
  // Reads keys [first, first + n). Throws as KeyFromPython, and IndexError where a run ends behind its
  // hashes.
  void Read(size_t first, size_t n, OffloadKey* keys, Position* positions) const;

 private:
  // `count` items of a sequence, from item `first` on in steps of `step`.
  struct Part {
    nanobind::object items;
    int64_t first;
    int64_t step;
    size_t count;
    bool is_run;                                   // Items are block hashes of one group,
    uint8_t group_bytes[OffloadKey::kGroupBytes];  // whose number ends their keys.
  };

  void AddRun(nanobind::handle run, const KeyTypes& types);
  static void CheckInside(const Part& part, size_t first, size_t n);
  static void ReadPart(const Part& part, size_t first, size_t n, OffloadKey* keys, Position* positions);

  std::vector<Part> parts_;
  size_t size_ = 0;
};

}  // namespace jaxkv

#endif  // JAXKV_KEY_READER_H_
