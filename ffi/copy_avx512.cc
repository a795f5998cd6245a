// The copy loop in AVX-512. Compiled for it, so nothing here runs before the CPU was asked.
#include <immintrin.h>

#include "copy_streams.h"

namespace jaxkv {
namespace {

struct Line512 {
  __m512i value;

  static Line512 Load(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
  void StoreCached(uint8_t* to) const { _mm512_store_si512(to, value); }
  void StoreStreaming(uint8_t* to) const { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value); }
  static void Prefetch(const uint8_t* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_NTA);
  }
  static void Fence() { _mm_sfence(); }
};

}  // namespace

void CopyAvx512(const Run* runs, int64_t count, Stores stores) { CopyRuns<Line512>(runs, count, stores); }

}  // namespace jaxkv
