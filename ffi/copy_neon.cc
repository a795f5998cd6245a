// The copy loop in NEON, which every 64-bit ARM CPU has.
#include <arm_neon.h>

#include "copy_streams.h"

namespace jaxkv {
namespace {

struct LineNeon {
  uint8x16_t a, b, c, d;

  static LineNeon Load(const uint8_t* from) {
    return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
  }
  void StoreCached(uint8_t* to) const {
    vst1q_u8(to, a), vst1q_u8(to + 16, b), vst1q_u8(to + 32, c), vst1q_u8(to + 48, d);
  }
  // Pairs stored with the hint that nobody reads them soon. They are ordered as other stores are.
  void StoreStreaming(uint8_t* to) const {
    asm volatile(
        "stnp %q[a], %q[b], [%[to]]\n\t"
        "stnp %q[c], %q[d], [%[to], #32]"
        :
        : [a] "w"(a), [b] "w"(b), [c] "w"(c), [d] "w"(d), [to] "r"(to)
        : "memory");
  }
  static void Prefetch(const uint8_t* from) { __builtin_prefetch(from, 0, 0); }
  static void Fence() {}
};

}  // namespace

void CopyNeon(const Run* runs, int64_t count, Stores stores) { CopyRuns<LineNeon>(runs, count, stores); }

}  // namespace jaxkv
