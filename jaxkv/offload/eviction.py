"""Which chunks to give up so that new ones fit. Keeps the order of use; frees and reserves nothing.

Slots of several sizes share one byte budget: the pool is cut into slabs, and a slab serves one size at a
time. So a slot is gained in two ways: from the coldest chunk of the same size, or by emptying a slab of
another size that has been unused for longer than that chunk, whose room then changes owner.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar, final

from jaxkv.keys import OffloadKey
from jaxkv.offload.policies import CachePolicy, MakePolicy
from jaxkv.offload.slots import Slot

T = TypeVar("T")


@final
@dataclass(slots=True, eq=False)
class Chunk:
    """One chunk in the pool. ``uses`` counts the store that writes it and the loads that read it."""

    key: OffloadKey
    slot: Slot
    slot_bytes: int
    slab: int
    readable: bool = False
    uses: int = 1
    used_at: int = 0


@final
@dataclass(slots=True, eq=False)
class _Slab:
    slot_bytes: int
    chunks: dict[OffloadKey, Chunk] = field(default_factory=dict)
    num_busy: int = 0
    used_at: int = 0


@final
class _Peek(Generic[T]):
    """The first element that was not taken, without taking it."""

    def __init__(self, elements: Iterable[T]) -> None:
        self._rest: Iterator[T] = iter(elements)
        self._head: T | None = next(self._rest, None)

    def first_outside(self, taken: Container[T]) -> T | None:
        while self._head is not None and self._head in taken:
            self._head = next(self._rest, None)
        return self._head


@final
class EvictionOrder:
    """The chunks in the pool by time of last use: one policy per slot size, and the slabs nobody is using."""

    def __init__(self, make_policy: MakePolicy) -> None:
        self._make_policy = make_policy
        self._clock = 0
        self._policies: dict[int, CachePolicy] = {}
        self._evictable: dict[OffloadKey, Chunk] = {}
        self._slabs: dict[int, _Slab] = {}
        self._idle: dict[int, OrderedDict[int, None]] = {}

    @property
    def num_busy(self) -> int:
        """Chunks in use, which are never evicted."""
        return sum(slab.num_busy for slab in self._slabs.values())

    def add(self, chunk: Chunk) -> None:
        """A chunk got its slot and is being written."""
        slab = self._slabs.setdefault(chunk.slab, _Slab(chunk.slot_bytes))
        slab.chunks[chunk.key] = chunk
        self._mark_busy(chunk, slab)

    def begin_use(self, chunk: Chunk) -> None:
        """An evictable chunk is being read."""
        self._drop_from_policy(chunk)
        self._mark_busy(chunk, self._slabs[chunk.slab])

    def end_use(self, chunk: Chunk) -> None:
        """The last use of a chunk ended: from now on it may be evicted."""
        policy = self._policies.setdefault(chunk.slot_bytes, self._make_policy())
        policy.add(chunk.key)
        self._evictable[chunk.key] = chunk
        slab = self._slabs[chunk.slab]
        slab.num_busy -= 1
        self._mark_used(chunk, slab)

    def touch(self, chunk: Chunk) -> None:
        """An evictable chunk was of use."""
        self._policies[chunk.slot_bytes].touch(chunk.key)
        self._mark_used(chunk, self._slabs[chunk.slab])

    def remove(self, chunk: Chunk) -> None:
        """The chunk is given up, in use or not."""
        slab = self._slabs[chunk.slab]
        del slab.chunks[chunk.key]
        if chunk.uses == 0:
            self._drop_from_policy(chunk)
        else:
            slab.num_busy -= 1
        idle = self._idle.setdefault(slab.slot_bytes, OrderedDict())
        if not slab.chunks:
            del self._slabs[chunk.slab]
            idle.pop(chunk.slab, None)
        elif slab.num_busy == 0 and chunk.slab not in idle:
            self._mark_used(chunk, slab)

    def plan_room(self, sizes: Sequence[int], slots_per_slab: dict[int, int]) -> list[Chunk] | None:
        """Chunks to evict so that a slot comes free for each of ``sizes``; ``None`` if that is impossible.

        Changes nothing. Takes time proportional to ``sizes`` and to what is evicted.
        """
        victims: dict[OffloadKey, Chunk] = {}
        closed_slabs: set[int] = set()
        spare: dict[int, int] = {}
        coldest = {size: _Peek(policy) for size, policy in self._policies.items()}
        idle = {size: _Peek(slabs) for size, slabs in self._idle.items()}
        for size in sizes:
            if spare.get(size, 0):
                spare[size] -= 1
                continue
            victim = self._coldest_chunk(coldest.get(size), victims)
            slab_id = self._coldest_idle_slab(idle, size, closed_slabs)
            if slab_id is not None and (victim is None or self._slabs[slab_id].used_at < victim.used_at):
                victims.update(self._slabs[slab_id].chunks)
                closed_slabs.add(slab_id)
                spare[size] = slots_per_slab[size] - 1
            elif victim is not None:
                victims[victim.key] = victim
                closed_slabs.add(victim.slab)
            else:
                return None
        return list(victims.values())

    def _coldest_chunk(
        self, coldest: _Peek[OffloadKey] | None, victims: Container[OffloadKey]
    ) -> Chunk | None:
        key = coldest.first_outside(victims) if coldest is not None else None
        return self._evictable[key] if key is not None else None

    def _coldest_idle_slab(self, idle: dict[int, _Peek[int]], size: int, closed: set[int]) -> int | None:
        others = [peek.first_outside(closed) for other, peek in idle.items() if other != size]
        found = [slab_id for slab_id in others if slab_id is not None]
        return min(found, key=lambda slab_id: self._slabs[slab_id].used_at, default=None)

    def _drop_from_policy(self, chunk: Chunk) -> None:
        self._policies[chunk.slot_bytes].remove(chunk.key)
        del self._evictable[chunk.key]

    def _mark_busy(self, chunk: Chunk, slab: _Slab) -> None:
        slab.num_busy += 1
        self._idle.setdefault(slab.slot_bytes, OrderedDict()).pop(chunk.slab, None)

    def _mark_used(self, chunk: Chunk, slab: _Slab) -> None:
        self._clock += 1
        chunk.used_at = slab.used_at = self._clock
        if slab.num_busy == 0:
            idle = self._idle.setdefault(slab.slot_bytes, OrderedDict())
            idle[chunk.slab] = None
            idle.move_to_end(chunk.slab)
