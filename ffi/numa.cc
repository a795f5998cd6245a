#include "numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <system_error>

namespace jaxkv {
namespace {

// As in linux/mempolicy.h, which not every system has.
constexpr int kPolicyDefault = 0;
constexpr int kPolicyInterleave = 3;

// No system numbers CPUs or nodes higher.
constexpr int kLargest = 1 << 16;
constexpr int kBitsPerWord = 8 * sizeof(unsigned long);

std::string FirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<NumaNode> NodesWithMemory() {
  const std::string directory = "/sys/devices/system/node/";
  std::vector<NumaNode> nodes;
  for (int id : ParseList(FirstLine(directory + "has_memory"))) {
    nodes.push_back({id, ParseList(FirstLine(directory + "node" + std::to_string(id) + "/cpulist"))});
  }
  return nodes;
}

std::vector<int> UsableCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

bool HasPolicyOfItsOwn() {
  int policy = kPolicyDefault;
  return syscall(SYS_get_mempolicy, &policy, nullptr, 0UL, nullptr, 0UL) != 0 || policy != kPolicyDefault;
}

}  // namespace

std::vector<int> ParseList(const std::string& text) {
  std::vector<int> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    int first;
    std::from_chars_result read = std::from_chars(at, end, first);
    if (read.ec != std::errc()) return {};
    int last = first;
    if (read.ptr != end && *read.ptr == '-') read = std::from_chars(read.ptr + 1, end, last);
    if (read.ec != std::errc() || first < 0 || last < first || last > kLargest) return {};
    for (int number = first; number <= last; ++number) numbers.push_back(number);
    if (read.ptr != end && (*read.ptr != ',' || read.ptr + 1 == end)) return {};
    at = read.ptr == end ? end : read.ptr + 1;
  }
  return numbers;
}

std::vector<int> NodesToInterleave(const std::vector<NumaNode>& nodes_with_memory,
                                   const std::vector<int>& usable_cpus) {
  std::vector<int> ids;
  for (const NumaNode& node : nodes_with_memory) {
    const bool usable = std::any_of(node.cpus.begin(), node.cpus.end(), [&](int cpu) {
      return std::find(usable_cpus.begin(), usable_cpus.end(), cpu) != usable_cpus.end();
    });
    if (usable) ids.push_back(node.id);
  }
  return ids.size() > 1 ? ids : std::vector<int>();
}

int Interleave(uint8_t* data, int64_t num_bytes, const std::vector<int>& nodes) {
  const int most = *std::max_element(nodes.begin(), nodes.end());
  std::vector<unsigned long> mask(static_cast<size_t>(most / kBitsPerWord + 1));
  for (int node : nodes) mask[static_cast<size_t>(node / kBitsPerWord)] |= 1UL << (node % kBitsPerWord);
  // The kernel reads one bit less than it is told.
  const unsigned long num_bits = mask.size() * kBitsPerWord + 1;
  const auto length = static_cast<unsigned long>(num_bytes);
  return syscall(SYS_mbind, data, length, kPolicyInterleave, mask.data(), num_bits, 0U) == 0 ? 0 : errno;
}

void InterleaveOverNodes(uint8_t* data, int64_t num_bytes) {
  const std::vector<int> nodes = NodesToInterleave(NodesWithMemory(), UsableCpus());
  if (!nodes.empty() && !HasPolicyOfItsOwn()) Interleave(data, num_bytes, nodes);
}

}  // namespace jaxkv
