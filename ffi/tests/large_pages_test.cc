// Checks that memory is gathered into large pages with what it holds, and that what cannot be is left alone.
#include "large_pages.h"

#include <sys/mman.h>

#include <cassert>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>

using jaxkv::GatherIntoLargePages;
using jaxkv::kLargePageBytes;

namespace {

constexpr int64_t kBytes = 4 * kLargePageBytes;
constexpr int64_t kOffset = 64;  // As allocators return memory.

uint8_t* Map() {
  void* data = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  assert(data != MAP_FAILED);
  madvise(data, kBytes, MADV_NOHUGEPAGE);  // Small pages first, whatever the system does by itself.
  for (int64_t i = 0; i < kBytes; ++i)
    static_cast<uint8_t*>(data)[i] = static_cast<uint8_t>(i * 7 + i / 4096);
  return static_cast<uint8_t*>(data);
}

// Bytes in large pages in the mapping that begins at or before `data` and ends behind it.
int64_t LargePageBytesAt(const uint8_t* data) {
  std::ifstream file("/proc/self/smaps");
  const auto address = reinterpret_cast<uintptr_t>(data);
  bool is_ours = false;
  for (std::string line; std::getline(file, line);) {
    unsigned long begin, end;
    long kib;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2) is_ours = begin <= address && address < end;
    if (is_ours && std::sscanf(line.c_str(), "AnonHugePages: %ld kB", &kib) == 1) return int64_t{kib} << 10;
  }
  return 0;
}

void CheckGathered() {
  uint8_t* data = Map();
  const auto address = reinterpret_cast<uintptr_t>(data);
  assert(GatherIntoLargePages(address, kBytes) == 0);  // Its owner wants none.
  madvise(data, kBytes, MADV_HUGEPAGE);
  const int64_t gathered = GatherIntoLargePages(address + kOffset, kBytes - kOffset);
  if (gathered == 0) {
    std::printf("large_pages_test: no large pages here, that they are used is not checked\n");
  } else {
    assert(gathered % kLargePageBytes == 0 && gathered >= kBytes - 2 * kLargePageBytes);
    // At times the kernel gathers more by itself.
    assert(LargePageBytesAt(data + kLargePageBytes) >= gathered);
  }
  for (int64_t i = 0; i < kBytes; ++i) assert(data[i] == static_cast<uint8_t>(i * 7 + i / 4096));
  munmap(data, kBytes);
}

void CheckLeftAlone() {
  uint8_t* data = Map();
  const auto address = reinterpret_cast<uintptr_t>(data);
  madvise(data, kBytes, MADV_HUGEPAGE);
  for (int64_t num_bytes : {int64_t{-1}, int64_t{0}, int64_t{1}, kLargePageBytes - 1}) {
    assert(GatherIntoLargePages(address, num_bytes) == 0);
  }
  assert(GatherIntoLargePages((address + kLargePageBytes) / kLargePageBytes * kLargePageBytes + 1,
                              2 * kLargePageBytes - 2) == 0);  // No whole page.
  munmap(data, kBytes);
  assert(GatherIntoLargePages(address, kBytes) == 0);  // Nothing there any more.
}

}  // namespace

int main() {
  CheckGathered();
  CheckLeftAlone();
}
