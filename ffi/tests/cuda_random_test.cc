// Thousands of random runs of transfers, steps of a model, failures and everything else, on a fake device.
// Run it under the sanitizers. JAXKV_SEQUENCES says how many, JAXKV_FIRST_SEQUENCE from which on.
#include <cstdio>
#include <cstdlib>

#include "transfer_sequence.h"

namespace {

int64_t FromEnvironment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoll(value) : otherwise;
}

// The thread sanitizer has little to find where one thread does nearly all, and takes its time.
#ifdef __SANITIZE_THREAD__
constexpr int64_t kSequences = 2000;
#else
constexpr int64_t kSequences = 10000;
#endif

constexpr const char* kMustHappen[] = {
    "devices lost",           "entries of fate 0",         "entries of fate 1",
    "entries of fate 2",      "entries of fate 3",         "entries of fate 4",
    "entries of fate 5",      "entries of fate 7",         "growths",
    "growths refused",        "moves that failed",         "polls of what had ended",
    "polls of what had not",  "pools closed while in use", "prefetches",
    "prefetches that failed", "pools not pinned",          "pools pinned",
    "tags refused",           "transfers closed",          "transfers closed whose program never ran",
    "transfers that failed",
};

}  // namespace

int main() {
  using jaxkv::cuda::Check;
  const int64_t first = FromEnvironment("JAXKV_FIRST_SEQUENCE", 0);
  const int64_t count = FromEnvironment("JAXKV_SEQUENCES", kSequences);
  jaxkv::cuda::Happenings happenings;
  for (int64_t seed = first; seed < first + count; ++seed) {
    jaxkv::cuda::Sequence(static_cast<uint64_t>(seed), happenings).Run();
  }
  for (const auto& [what, times] : happenings)
    std::printf("%8lld %s\n", static_cast<long long>(times), what.c_str());
  for (const char* what : kMustHappen) {
    if (count >= 1000) Check(happenings[what] > 0, std::string("this happens: ") + what);
  }
  std::printf("cuda_random_test: %lld sequences ok\n", static_cast<long long>(count));
}
