// What each request asked for, until it ends. Decides nothing.
#ifndef JAXKV_REQUEST_LOG_H_
#define JAXKV_REQUEST_LOG_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "eviction_policy.h"
#include "key_table.h"

namespace jaxkv {

// Where a key stands in its request: a number that grows with its tokens, or kNoPosition.
using Position = int32_t;
constexpr Position kNoPosition = -1;

// One key a request asked for.
struct Access {
  KeyId id;
  Position position;
  uint16_t group;
  bool inserted : 1;  // The request stored it.
  bool reused : 1;    // It was readable, and not stored by this request before.
  bool missed : 1;    // The policy was told that the request had to store it.

  AccessKind kind() const {
    if (reused) return AccessKind::kReused;
    return inserted ? AccessKind::kInserted : AccessKind::kSeen;
  }
};

// The keys of one request, each once, in the order in which they were seen first.
class RequestRecord {
 public:
  // The access of a key. It stays where it is until another key is seen.
  Access& See(KeyId id, Position position, KeyTable* keys);

  // Moves the accesses from the first token to the last, where positions are known: within a group if those
  // of all its keys are, and over all groups if all are. Keys at one position stand by group.
  void Sort();

  const std::vector<Access>& accesses() const { return accesses_; }

 private:
  void Grow();

  std::vector<Access> accesses_;
  std::vector<uint32_t> places_;  // Positions in accesses_, plus one, found by KeyId; a power of two of them.
};

// The records of the requests that have not ended. Each counts a reference to every key of it.
class RequestLog {
 public:
  explicit RequestLog(KeyTable* keys) : keys_(keys) {}

  // The record of a request; a new one if it has none.
  RequestRecord& operator[](const std::string& request) { return records_[request]; }
  // Takes the record of a request out, empty if it has none. The caller drops the references with Release.
  RequestRecord Take(const std::string& request);
  void Release(const RequestRecord& record);
  void Clear();
  size_t size() const { return records_.size(); }

 private:
  KeyTable* keys_;
  std::unordered_map<std::string, RequestRecord> records_;
};

}  // namespace jaxkv

#endif  // JAXKV_REQUEST_LOG_H_
