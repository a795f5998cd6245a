// The copy loop over whatever moves 64 bytes. Included only by the files that are each compiled for an
// instruction set; nothing here may be shared between them, so it has no linkage and calls no inline function
// of other headers.
//
// One run after the other, a copy waits for memory at the start of every page: the hardware's prefetchers
// stop there. Several runs abreast wait together. Measured on a Zen 4 with two threads, leaf in pages of
// memory of 4 KiB, as shares of what contiguous streaming stores reach, median of nine interleaved rounds,
// offload | restore, random pages of 4 KiB, 16 KiB, 64 KiB and 2 MiB:
//   two abreast    0.65 | 0.63   0.64 | 0.75   0.80 | 0.90   0.88 | 0.94
//   four           0.79 | 0.75   0.85 | 0.87   1.06 | 0.96   1.03 | 1.00
//   six            0.83 | 0.79   0.85 | 0.93   1.03 | 0.98   1.05 | 1.00
//   eight          0.83 | 0.79   0.88 | 0.90   0.93 | 0.96   1.02 | 1.00
// (Two with four lines a turn, the others with two.) memcpy page by page: less than half of six at 4 KiB.
#ifndef JAXKV_COPY_STREAMS_H_
#define JAXKV_COPY_STREAMS_H_

#include <string.h>

#include "copy_loops.h"

namespace jaxkv {
namespace {

constexpr int kStreams = 6;
constexpr int64_t kLineBytes = 64;
// Two lines of a run, then the next run's. One line, or four, reach 0.73 to 0.98 with six abreast.
constexpr int64_t kTurnBytes = 2 * kLineBytes;
// Twice as far reaches 0.77 to 0.95.
constexpr int64_t kAheadBytes = 4 * kLineBytes;

// Runs this short are over before a turn of all streams would pay: each is copied at once, while those
// further on are requested. GB/s with two threads, runs of 64, 128, 256 and 512 bytes: memcpy 3.0, 4.8, 5.4
// and 7.1, as streams 4.7, 5.7, 8.7 and 11.1, at once 5.0, 6.3, 8.6 and 10.7 with less bookkeeping.
constexpr int64_t kShortBytes = 256;
constexpr int64_t kShortAhead = 8;

// A run under way: whole lines, then fewer bytes than a line.
struct Stream {
  uint8_t* to;
  const uint8_t* from;
  int64_t line_bytes;
  int64_t tail_bytes;
};

template <typename Line, Stores kStores>
inline void CopyLine(uint8_t* to, const uint8_t* from) {
  kStores == Stores::kStreaming ? Line::Load(from).StoreStreaming(to) : Line::Load(from).StoreCached(to);
}

// Copies num_bytes, whole lines, of each stream. `following[s]` is read after that in place of stream s.
template <typename Line, Stores kStores, int kCount>
void CopyAbreast(Stream* streams, const uint8_t* const* following, int64_t num_bytes) {
  uint8_t* to[kCount];
  const uint8_t* from[kCount];
  for (int s = 0; s < kCount; ++s) to[s] = streams[s].to, from[s] = streams[s].from;
  int64_t at = 0;
  for (; at + kAheadBytes < num_bytes; at += kTurnBytes) {
    for (int s = 0; s < kCount; ++s) {
      Line::Prefetch(from[s] + at + kAheadBytes);
      Line::Prefetch(from[s] + at + kAheadBytes + kLineBytes);
    }
    for (int s = 0; s < kCount; ++s) {
      CopyLine<Line, kStores>(to[s] + at, from[s] + at);
      CopyLine<Line, kStores>(to[s] + at + kLineBytes, from[s] + at + kLineBytes);
    }
  }
  for (int64_t ahead = 0; at < num_bytes; at += kLineBytes, ahead += kLineBytes) {
    for (int s = 0; s < kCount; ++s) Line::Prefetch(following[s] + ahead);
    for (int s = 0; s < kCount; ++s) CopyLine<Line, kStores>(to[s] + at, from[s] + at);
  }
  for (int s = 0; s < kCount; ++s) {
    streams[s].to += num_bytes;
    streams[s].from += num_bytes;
    streams[s].line_bytes -= num_bytes;
  }
}

template <typename Line, Stores kStores>
void CopyAbreast(int count, Stream* streams, const uint8_t* const* following, int64_t num_bytes) {
  static_assert(kStreams == 6, "a case for each number of streams");
  switch (count) {
    case 1:
      return CopyAbreast<Line, kStores, 1>(streams, following, num_bytes);
    case 2:
      return CopyAbreast<Line, kStores, 2>(streams, following, num_bytes);
    case 3:
      return CopyAbreast<Line, kStores, 3>(streams, following, num_bytes);
    case 4:
      return CopyAbreast<Line, kStores, 4>(streams, following, num_bytes);
    case 5:
      return CopyAbreast<Line, kStores, 5>(streams, following, num_bytes);
    default:
      return CopyAbreast<Line, kStores, 6>(streams, following, num_bytes);
  }
}

// Copies what lies before the first whole line of the destination.
inline Stream Begin(const Run& run) {
  int64_t head = -reinterpret_cast<intptr_t>(run.to) & (kLineBytes - 1);
  if (head > run.num_bytes) head = run.num_bytes;
  if (head > 0) memcpy(run.to, run.from, static_cast<size_t>(head));
  const int64_t tail = (run.num_bytes - head) & (kLineBytes - 1);
  return {run.to + head, run.from + head, run.num_bytes - head - tail, tail};
}

inline void CopyTail(const Stream& stream) {
  if (stream.tail_bytes > 0) memcpy(stream.to, stream.from, static_cast<size_t>(stream.tail_bytes));
}

template <typename Line, Stores kStores>
inline void CopyShort(const Run& run) {
  Stream stream = Begin(run);
  for (; stream.line_bytes > 0; stream.line_bytes -= kLineBytes) {
    CopyLine<Line, kStores>(stream.to, stream.from);
    stream.to += kLineBytes;
    stream.from += kLineBytes;
  }
  CopyTail(stream);
}

template <typename Line>
inline void PrefetchShort(const Run& run) {
  for (int64_t at = 0; at < run.num_bytes && at < kShortBytes; at += kLineBytes)
    Line::Prefetch(run.from + at);
}

// Drops the streams that have no whole line left, with the bytes behind it copied. Returns how many remain.
inline int End(Stream* streams, int count) {
  int kept = 0;
  for (int s = 0; s < count; ++s) {
    if (streams[s].line_bytes > 0) {
      streams[kept++] = streams[s];
    } else {
      CopyTail(streams[s]);
    }
  }
  return kept;
}

template <typename Line, Stores kStores>
void CopyRuns(const Run* runs, int64_t count) {
  Stream streams[kStreams];
  int active = 0;
  for (int64_t next = 0;;) {
    for (; active < kStreams && next < count; ++next) {
      if (runs[next].num_bytes > kShortBytes) {
        streams[active++] = Begin(runs[next]);
      } else {
        if (next + kShortAhead < count) PrefetchShort<Line>(runs[next + kShortAhead]);
        CopyShort<Line, kStores>(runs[next]);
      }
    }
    if (active == 0) break;
    int64_t num_bytes = streams[0].line_bytes;
    for (int s = 1; s < active; ++s) {
      if (streams[s].line_bytes < num_bytes) num_bytes = streams[s].line_bytes;
    }
    const uint8_t* following[kStreams];
    int64_t upcoming = next;
    for (int s = 0; s < active; ++s) {
      const bool ends = streams[s].line_bytes == num_bytes && upcoming < count;
      following[s] = ends ? runs[upcoming++].from : streams[s].from + num_bytes;
    }
    CopyAbreast<Line, kStores>(active, streams, following, num_bytes);
    active = End(streams, active);
  }
}

template <typename Line>
void CopyRuns(const Run* runs, int64_t count, Stores stores) {
  if (stores == Stores::kCached) return CopyRuns<Line, Stores::kCached>(runs, count);
  CopyRuns<Line, Stores::kStreaming>(runs, count);
  Line::Fence();
}

}  // namespace
}  // namespace jaxkv

#endif  // JAXKV_COPY_STREAMS_H_
