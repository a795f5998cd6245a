#include "copy_loops.h"

#include <cstdlib>
#include <cstring>

namespace jaxkv {
namespace {

// The library's memcpy, with the start of the next run on its way meanwhile.
void CopyPortable(const Run* runs, int64_t count, Stores) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + 1 < count) __builtin_prefetch(runs[i + 1].from);
    std::memcpy(runs[i].to, runs[i].from, static_cast<size_t>(runs[i].num_bytes));
  }
}

bool Always() { return true; }

#if defined(__x86_64__)
bool HasAvx512() { return __builtin_cpu_supports("avx512f"); }
bool HasAvx2() { return __builtin_cpu_supports("avx2"); }
#endif

struct Choice {
  const CopyLoop* loop;
  std::optional<std::string> refused;
};

const Choice& ChoiceOfProcess() {
  static const auto* choice = [] {
    const char* name = std::getenv("JAXKV_COPY");
    if (name != nullptr && *name == '\0') name = nullptr;
    const CopyLoop* loop = FindCopyLoop(name);
    return loop != nullptr ? new Choice{loop, std::nullopt} : new Choice{FindCopyLoop(nullptr), name};
  }();
  return *choice;
}

}  // namespace

const std::vector<CopyLoop>& CopyLoops() {
  static const auto* loops = new std::vector<CopyLoop>{
#if defined(__x86_64__)
      {"avx512", HasAvx512, CopyAvx512},
      {"avx2", HasAvx2, CopyAvx2},
#elif defined(__aarch64__)
      {"neon", Always, CopyNeon},
#endif
      {"portable", Always, CopyPortable},
  };
  return *loops;
}

const CopyLoop* FindCopyLoop(const char* name) {
  for (const CopyLoop& loop : CopyLoops()) {
    if (loop.runs_here() && (name == nullptr || std::strcmp(name, loop.name) == 0)) return &loop;
  }
  return nullptr;
}

const CopyLoop& ActiveCopyLoop() { return *ChoiceOfProcess().loop; }

const std::optional<std::string>& RefusedCopyLoop() { return ChoiceOfProcess().refused; }

}  // namespace jaxkv
