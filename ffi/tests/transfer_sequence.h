// A random run of everything that can happen to transfers at the same time, with its model.
#ifndef JAXKV_TESTS_TRANSFER_SEQUENCE_H_
#define JAXKV_TESTS_TRANSFER_SEQUENCE_H_

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "transfer_bench.h"

namespace jaxkv::cuda {

// How often what happened.
using Happenings = std::map<std::string, int64_t>;

class Sequence {
 public:
  Sequence(uint64_t seed, Happenings& happenings);
  // Ends the process with a reason where something is wrong.
  void Run();

 private:
  // A pool and who uses which of its records.
  struct PoolUse {
    std::unique_ptr<HostPool> pool;
    std::vector<int32_t> readers;
    std::vector<bool> is_written;
    bool is_open = true;
    int32_t num_holders = 0;  // calls that found it and are not closed
  };

  struct Transfer {
    Request request;
    std::shared_ptr<PoolUse> use;
    std::vector<int32_t> records;  // of entries, -1 where there is none
    size_t leaves;
    bool is_prefetch;
    bool has_geometry;
    const void* tag;
    bool has_run = false;
    bool holds_pool = false;
    bool has_copies = false;
    bool fails_to_move = false;
    std::array<int32_t, kStatusSize> wanted{};
  };

  void Step();
  void OpenPool();
  void ClosePool();
  void StartTransfer();
  void AddEntries(Transfer& transfer);
  void RunProgram(size_t which);
  void RunPrefetch(Transfer& transfer);
  void RunMove(Transfer& transfer);
  void CancelOrForget();
  void Poll(size_t which);
  void CloseTransfer(size_t which);
  void JudgeOutcome(const Transfer& transfer, const Outcome& outcome, bool was_lost, bool failed);
  void Unpin(const Transfer& transfer);
  void Fit(int64_t record_bytes);
  void InjectFailure();
  void End();

  void Expect(Transfer& transfer);
  bool HasStaging(const Transfer& transfer) const;
  bool Moves(const Transfer& transfer, size_t j) const;
  StatusEntry Judge(const Transfer& transfer, size_t j, const std::vector<int32_t>& seen) const;
  void Model(const Transfer& transfer, bool fails);
  int64_t num_records() const { return 20; }
  void Require(bool holds, const std::string& what) const;

  const uint64_t seed_;
  Happenings& happenings_;
  Rng rng_;
  FakeRuntime device_;
  const EngineOptions options_;
  std::unique_ptr<Engine> engine_;
  int64_t staged_bytes_ = 0;  // records so large can be staged
  std::vector<std::unique_ptr<Leaves>> leaves_;
  int64_t num_groups_ = 1;   // leaves of one group may be on two streams
  int64_t record_step_ = 0;  // from one record of a pool to the next
  std::shared_ptr<PoolUse> pool_;
  int32_t generation_ = 0;
  int32_t next_number_ = 0;
  std::vector<int32_t> cancelled_;
  std::vector<Transfer> transfers_;
};

}  // namespace jaxkv::cuda

#endif  // JAXKV_TESTS_TRANSFER_SEQUENCE_H_
