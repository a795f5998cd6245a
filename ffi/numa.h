// Spreads memory over the NUMA nodes of a machine. Knows neither pools nor copies.
#ifndef JAXKV_NUMA_H_
#define JAXKV_NUMA_H_

#include <cstdint>
#include <string>
#include <vector>

namespace jaxkv {

// What a list such as "0-3,8" of the kernel's holds, in ascending order; nothing where it cannot be read.
std::vector<int> ParseList(const std::string& text);

struct NumaNode {
  int id;
  std::vector<int> cpus;
};

// The nodes over which memory should be spread that threads on `usable_cpus` copy: those with memory where
// such CPUs are. Nothing where that is at most one, because the kernel then does the right thing by itself.
std::vector<int> NodesToInterleave(const std::vector<NumaNode>& nodes_with_memory,
                                   const std::vector<int>& usable_cpus);

// Spreads a range of fresh memory over these nodes, page by page. Returns an errno, 0 when done.
int Interleave(uint8_t* data, int64_t num_bytes, const std::vector<int>& nodes);

// The same over the nodes of this machine that this process uses, if those are several. Somebody who started
// it with a memory policy of their own (numactl) keeps it; a refusal by the system is harmless.
void InterleaveOverNodes(uint8_t* data, int64_t num_bytes);

}  // namespace jaxkv

#endif  // JAXKV_NUMA_H_
