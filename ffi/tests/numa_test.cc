// Checks which nodes memory is spread over, on machines described by hand, and that spreading works on this
// one.
#include "numa.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cassert>
#include <cstdio>
#include <cstring>

using jaxkv::NodesToInterleave;
using jaxkv::NumaNode;
using jaxkv::ParseList;

namespace {

using Ids = std::vector<int>;

void CheckLists() {
  assert(ParseList("0") == Ids({0}));
  assert(ParseList("0-3,8,10-11") == Ids({0, 1, 2, 3, 8, 10, 11}));
  assert(ParseList("").empty());
  for (const char* bad :
       {"-", "1-", "-1", "3-2", "1,", ",1", "1;2", "1-2-3", "0-99999999", "99999999999999", "one"}) {
    assert(ParseList(bad).empty());
  }
}

void CheckNodes() {
  const std::vector<NumaNode> two = {{0, {0, 1}}, {1, {2, 3}}};
  assert(NodesToInterleave(two, {0, 1, 2, 3}) == Ids({0, 1}));
  assert(NodesToInterleave(two, {1, 2}) == Ids({0, 1}));
  // Pinned to one node: memory near it is best.
  assert(NodesToInterleave(two, {2, 3}).empty());
  assert(NodesToInterleave(two, {}).empty());
  assert(NodesToInterleave({{0, {0, 1}}}, {0, 1}).empty());
  assert(NodesToInterleave({}, {0, 1}).empty());
  // Memory without CPUs, as behind CXL, is slower and stays out.
  assert(NodesToInterleave({{0, {0}}, {1, {}}, {70, {9}}}, {0, 9}) == Ids({0, 70}));
}

void CheckThisMachine() {
  constexpr size_t kBytes = 1 << 20;
  void* data = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert(data != MAP_FAILED);
  auto* bytes = static_cast<uint8_t*>(data);
  jaxkv::InterleaveOverNodes(bytes, kBytes);
  std::memset(data, 1, kBytes);
  constexpr int kPolicyInterleave = 3;
  constexpr unsigned long kOfAddress = 2;
  int policy = -1;
  const int error = jaxkv::Interleave(bytes, kBytes, {0});
  if (error == 0 && syscall(SYS_get_mempolicy, &policy, nullptr, 0UL, data, kOfAddress) == 0) {
    assert(policy == kPolicyInterleave);
  } else {
    std::printf("numa_test: no policies here (%s), their effect is not checked\n", std::strerror(error));
  }
  assert(jaxkv::Interleave(bytes + 1, kBytes, {0}) != 0);
  munmap(data, kBytes);
}

}  // namespace

int main() {
  CheckLists();
  CheckNodes();
  CheckThisMachine();
  std::puts("numa_test: ok");
}
