"""The best any pool could have done: an upper bound on host hits that knows the future.

What is bounded is the number of prompt tokens a host pool of a given size supplies over a whole trace,
with the device hits of the replay as they were. The argument:

* A prefix is cut into pieces of one link of the hash chain. To supply a piece, the pool must hold what
  full attention (and MLA) layers cached for it. That many bytes of each piece are counted and no others:
  neither windows nor recurrent states, nor alignment, padding, slabs, unfinished transfers. So a real
  pool holds, between two requests, at most ``capacity_bytes // bytes of a piece`` supplied pieces.
* All pieces are equally large, so this is paging with unit sizes. A pool gains a piece each time a
  request needs it behind the device hit and it is there. It was there only if it was kept since the last
  request that had it on the device, whether that computed it, loaded it or found it: so each gain is an
  interval between two requests, and at no time can more intervals be kept than the pool holds pieces.
  Whatever no request needs from the host before it is on the device again is not worth keeping at all.
* The largest number of intervals is kept by giving up, whenever there are too many, the one that ends
  last: Belady's MIN (1966), which is optimal for unit sizes, with the freedom not to keep something at
  all.
* Pieces count wherever they lie in a prompt, also behind a missing one, though a real hit has no gaps, and a
  hybrid model also needs its windows and states. Both can only make a real pool worse.

For a model of full attention alone and one request at a time the bound is nearly tight. For hybrids it
says what would be possible if windows and states took no room, which is what retention aims at. For a
model without layers that read the whole prefix nothing is bounded but by what was ever seen before.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from jaxkv.keys import BlockHash
from jaxkv.replay.models import bytes_per_token, whole_prefix_groups
from jaxkv.spec import KVCacheConfig


@final
@dataclass(slots=True)
class HostAccesses:
    """What requests wanted of the host, as pieces of their prefixes; requests come in order.

    ``_gaps[i][j]`` counts pieces that request ``j`` needs of the host and request ``i`` was the last
    before to have on the device.
    """

    _last_seen: dict[BlockHash, int] = field(default_factory=dict)
    _gaps: defaultdict[int, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    _num_requests: int = 0

    def add(self, pieces: Sequence[BlockHash], wanted: range) -> None:
        """A request had ``pieces`` on the device in the end, and needed those in ``wanted`` of the host."""
        now = self._num_requests
        for index, piece in enumerate(pieces):
            before = self._last_seen.get(piece)
            if before is not None and index in wanted:
                self._gaps[before][now] += 1
            self._last_seen[piece] = now
        self._num_requests += 1

    def optimal_hits(self, capacity: int | None) -> int:
        """The most pieces a pool that holds ``capacity`` of them supplies; ``None`` for one without limit."""
        if capacity is None:
            return sum(gaps.total() for gaps in self._gaps.values())
        kept: Counter[int] = Counter()
        farthest: list[int] = []
        num_kept = hits = 0
        for now in range(self._num_requests):
            gained = kept.pop(now, 0)
            hits += gained
            num_kept -= gained
            for end, number in self._gaps.get(now, Counter()).items():
                if end not in kept:
                    heapq.heappush(farthest, -end)
                kept[end] += number
                num_kept += number
            while num_kept > capacity:
                end = -farthest[0]
                dropped = min(kept[end], num_kept - capacity)
                kept[end] -= dropped
                num_kept -= dropped
                if not kept[end]:
                    del kept[end]
                    heapq.heappop(farthest)
        return hits


def capacity_in_pieces(config: KVCacheConfig, capacity_bytes: int) -> int | None:
    """Pieces of ``config.hash_block_size`` tokens a pool can supply; ``None`` where nothing limits them."""
    whole = whole_prefix_groups(config)
    if not whole:
        return None
    return int(capacity_bytes / (config.hash_block_size * sum(map(bytes_per_token, whole))))
