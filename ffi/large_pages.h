// Has the kernel hold memory that others allocated in large pages. Knows addresses only.
#ifndef JAXKV_LARGE_PAGES_H_
#define JAXKV_LARGE_PAGES_H_

#include <cstdint>

namespace jaxkv {

constexpr int64_t kLargePageBytes = 2 << 20;

// Gathers memory of this process into pages of 2 MiB, those that lie wholly in these bytes. What the bytes
// hold stays as it is, and anyone may go on reading and writing them, also before this returns; a range that
// was unmapped in the meantime does no harm. Linux from 6.1 on can do it, unless its administrator wants no
// such pages; a refusal is harmless. Returns how many bytes the kernel was asked for and did not refuse.
int64_t GatherIntoLargePages(uintptr_t address, int64_t num_bytes);

}  // namespace jaxkv

#endif  // JAXKV_LARGE_PAGES_H_
