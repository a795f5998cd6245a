// Copies runs of bytes, several abreast, by the widest loop this CPU has. Raw pointers only: knows neither
// plans nor threads.
#ifndef JAXKV_COPY_LOOPS_H_
#define JAXKV_COPY_LOOPS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace jaxkv {

struct Run {
  uint8_t* to;
  const uint8_t* from;
  int64_t num_bytes;
};

// Where copied bytes go: into the caches, for who reads them next, or past them to memory. All of them can be
// read by other threads that synchronise with the caller.
enum class Stores { kCached, kStreaming };

struct CopyLoop {
  const char* name;
  bool (*runs_here)();  // whether this CPU and its system can execute it
  // Copies runs that share no written byte, of any alignment and of any length from 0.
  void (*copy)(const Run* runs, int64_t count, Stores stores);
};

// What was compiled for this architecture, the preferred first, the portable one last.
const std::vector<CopyLoop>& CopyLoops();

// The loop of this name, or the first that runs here where `name` is null; null where it does not run here.
const CopyLoop* FindCopyLoop(const char* name);

// The loop all copies of this process use: the one that the environment variable JAXKV_COPY names when it is
// first asked for, otherwise the first that runs here.
const CopyLoop& ActiveCopyLoop();

// What JAXKV_COPY names, where that does not run here.
const std::optional<std::string>& RefusedCopyLoop();

// One per instruction set, each in a file of its own that is compiled for it.
void CopyAvx512(const Run* runs, int64_t count, Stores stores);
void CopyAvx2(const Run* runs, int64_t count, Stores stores);
void CopyNeon(const Run* runs, int64_t count, Stores stores);

}  // namespace jaxkv

#endif  // JAXKV_COPY_LOOPS_H_
