// The copy loop in AVX2. Compiled for it, so nothing here runs before the CPU was asked.
#include <immintrin.h>

#include "copy_streams.h"

namespace jaxkv {
namespace {

struct Line256 {
  __m256i low, high;

  static Line256 Load(const uint8_t* from) {
    const auto* vectors = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
  }
  void StoreCached(uint8_t* to) const {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to) + 1, high);
  }
  void StoreStreaming(uint8_t* to) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, high);
  }
  static void Prefetch(const uint8_t* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_NTA);
  }
  static void Fence() { _mm_sfence(); }
};

}  // namespace

void CopyAvx2(const Run* runs, int64_t count, Stores stores) { CopyRuns<Line256>(runs, count, stores); }

}  // namespace jaxkv
