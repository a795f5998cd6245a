#include "large_pages.h"

#include <sys/mman.h>

#include <fstream>
#include <iterator>
#include <string>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace jaxkv {
namespace {

// MADV_COLLAPSE alone would not ask for the administrator's will.
bool MayHaveLargePages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  const std::string modes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return !modes.empty() && modes.find("[never]") == std::string::npos;
}

}  // namespace

int64_t GatherIntoLargePages(uintptr_t address, int64_t num_bytes) {
  constexpr auto kPage = static_cast<uintptr_t>(kLargePageBytes);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      num_bytes < kLargePageBytes ? 0 : (address + static_cast<uintptr_t>(num_bytes)) / kPage * kPage;
  if (end <= begin || !MayHaveLargePages()) return 0;
  const bool gathered = madvise(reinterpret_cast<void*>(begin), end - begin, MADV_COLLAPSE) == 0;
  return gathered ? static_cast<int64_t>(end - begin) : 0;
}

}  // namespace jaxkv
