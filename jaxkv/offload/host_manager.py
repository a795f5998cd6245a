"""Which chunks host memory holds, and who is using them. Moves no bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

from jaxkv.keys import OffloadKey, get_offload_group
from jaxkv.offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    PrepareStoreOutput,
    ReqContext,
)
from jaxkv.offload.eviction import Chunk, EvictionOrder
from jaxkv.offload.policies import LRUPolicy, MakePolicy
from jaxkv.offload.slots import Slot, SlotPool

MEDIUM = "host"
"""How this backend names itself in events."""


@final
@dataclass(frozen=True, slots=True)
class HostSlots(LoadStoreSpec):
    """The pool slots of a job's chunks, in the order of the job."""

    slots: tuple[Slot, ...]


@final
@dataclass(frozen=True, slots=True)
class HostManagerStats:
    """What the host backend holds now, and what it evicted since it was made."""

    num_chunks: int
    num_busy: int
    num_quarantined: int
    num_evicted: int
    used_bytes: int
    capacity_bytes: int


@final
class HostOffloadingManager(OffloadingManager):
    """Chunks in a host pool (vLLM: ``CPUOffloadingManager``), with slots of one size per group.

    A chunk forgotten while a job still reads or writes it is quarantined: its slot comes back when the last
    such job ends, and until then its key is not stored anew, so that a late completion is never taken for
    that of a newer job.
    """

    def __init__(
        self,
        pool: SlotPool,
        slot_bytes: Sequence[int],
        make_policy: MakePolicy = LRUPolicy,
        *,
        enable_events: bool = False,
    ) -> None:
        pool.fit_slabs(slot_bytes)
        self._pool = pool
        self._slot_bytes = tuple(slot_bytes)
        self._slots_per_slab = {size: pool.max_slots(size) // pool.num_slabs for size in self._slot_bytes}
        self._order = EvictionOrder(make_policy)
        self._chunks: dict[OffloadKey, Chunk] = {}
        self._quarantine: dict[OffloadKey, Chunk] = {}
        self._num_evicted = 0
        self._events: list[OffloadingEvent] | None = [] if enable_events else None

    def lookup(self, key: OffloadKey, ctx: ReqContext) -> LookupResult:
        """See ``OffloadingManager``."""
        chunk = self._chunks.get(key)
        if chunk is None or not ctx.may_load_from(MEDIUM):
            return LookupResult.MISS
        return LookupResult.HIT if chunk.readable else LookupResult.HIT_PENDING

    def prepare_load(self, keys: Collection[OffloadKey], ctx: ReqContext) -> HostSlots:
        """See ``OffloadingManager``."""
        chunks = [self._chunks[key] for key in keys]
        assert all(chunk.readable for chunk in chunks), "only chunks that answered HIT can be loaded"
        for chunk in chunks:
            if chunk.uses == 0:
                self._order.begin_use(chunk)
            chunk.uses += 1
        return HostSlots(tuple(chunk.slot for chunk in chunks))

    def complete_load(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        lost = [key for key in keys if key in self._chunks and not success]
        for key in lost:
            self._forget(key)
        for key in reversed(list(keys)):
            self._end_use(key)
        self._emit(lost, removed=True)

    def prepare_store(self, keys: Collection[OffloadKey], ctx: ReqContext) -> PrepareStoreOutput | None:
        """See ``OffloadingManager``."""
        wanted = dict.fromkeys(keys)
        if any(key in self._quarantine for key in wanted):
            return None
        held = [key for key in wanted if key in self._chunks and self._chunks[key].readable]
        self.prepare_load(held, ctx)
        try:
            return self._store_new(tuple(key for key in wanted if key not in self._chunks))
        finally:
            self.complete_load(held, ctx)

    def complete_store(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        landed = [key for key in keys if key in self._chunks]
        for key in reversed(list(keys)):
            if success and key in self._chunks:
                self._chunks[key].readable = True
            elif not success:
                self._forget(key)
            self._end_use(key)
        if success:
            self._emit(landed, removed=False)

    def touch(self, keys: Collection[OffloadKey], ctx: ReqContext) -> None:
        """See ``OffloadingManager``."""
        for key in reversed(list(keys)):
            chunk = self._chunks.get(key)
            if chunk is not None and chunk.uses == 0:
                self._order.touch(chunk)

    def reset_cache(self) -> None:
        """See ``OffloadingManager``."""
        readable = [chunk.key for chunk in self._chunks.values() if chunk.readable]
        for key in list(self._chunks):
            self._forget(key)
        self._emit(readable, removed=True)

    def take_events(self) -> Sequence[OffloadingEvent]:
        """See ``OffloadingManager``; empty unless the manager was made with events."""
        if self._events is None:
            return ()
        taken, self._events = self._events, []
        return taken

    def get_stats(self) -> HostManagerStats:
        """See ``OffloadingManager``."""
        return HostManagerStats(
            num_chunks=len(self._chunks),
            num_busy=self._order.num_busy,
            num_quarantined=len(self._quarantine),
            num_evicted=self._num_evicted,
            used_bytes=self._pool.used_bytes,
            capacity_bytes=self._pool.capacity_bytes,
        )

    def leaks(self) -> Sequence[str]:
        """See ``OffloadingManager``."""
        owned = (*self._chunks.values(), *self._quarantine.values())
        return [
            f"chunk {chunk.key.hex()} of group {get_offload_group(chunk.key)} has {chunk.uses} uses"
            for chunk in owned
            if chunk.uses
        ]

    def shutdown(self) -> None:
        """See ``OffloadingManager``. Jobs must have ended: slots still in use are freed as well."""
        if self._pool.closed:
            self._chunks.clear()
            self._quarantine.clear()
            return
        self.reset_cache()
        for chunk in self._quarantine.values():
            self._free(chunk)
        self._quarantine.clear()

    def _store_new(self, keys: tuple[OffloadKey, ...]) -> PrepareStoreOutput | None:
        lacking = self._add_where_free(keys)
        victims = self._order.plan_room([self._size_of(key) for key in lacking], self._slots_per_slab)
        if victims is not None:
            self._evict(victims)
            lacking = self._add_where_free(lacking)
        # A slot that somebody still views does not come back when it is freed, so this can fail once more.
        if lacking:
            for key in keys:
                chunk = self._chunks.pop(key, None)
                if chunk is not None:
                    self._free(chunk)
            return None
        evicted = tuple(victim.key for victim in victims or ())
        return PrepareStoreOutput(keys, HostSlots(tuple(self._chunks[key].slot for key in keys)), evicted)

    def _evict(self, victims: Sequence[Chunk]) -> None:
        for victim in victims:
            self._forget(victim.key)
        self._num_evicted += len(victims)
        self._emit([victim.key for victim in victims], removed=True)

    def _add_where_free(self, keys: Sequence[OffloadKey]) -> list[OffloadKey]:
        """Give slots to those keys for which the pool has one free; answers the others."""
        full: set[int] = set()
        lacking: list[OffloadKey] = []
        for key in keys:
            size = self._size_of(key)
            slot = self._pool.try_reserve(size) if size not in full else None
            if slot is None:
                full.add(size)
                lacking.append(key)
            else:
                self._chunks[key] = Chunk(key, slot, size, self._pool.slab_of(slot))
                self._order.add(self._chunks[key])
        return lacking

    def _size_of(self, key: OffloadKey) -> int:
        return self._slot_bytes[get_offload_group(key)]

    def _forget(self, key: OffloadKey) -> None:
        """Take a chunk out of the index; its slot comes back when nobody uses it."""
        chunk = self._chunks.pop(key, None)
        if chunk is None:
            return
        if chunk.uses:
            self._quarantine[key] = chunk
        else:
            self._free(chunk)

    def _end_use(self, key: OffloadKey) -> None:
        chunk = self._chunks.get(key) or self._quarantine[key]
        if chunk.uses > 1:
            chunk.uses -= 1
        elif key in self._chunks:
            chunk.uses = 0
            self._order.end_use(chunk)
        else:
            del self._quarantine[key]
            self._free(chunk)

    def _free(self, chunk: Chunk) -> None:
        self._order.remove(chunk)
        self._pool.free(chunk.slot)

    def _emit(self, keys: Collection[OffloadKey], *, removed: bool) -> None:
        if self._events is not None and keys:
            self._events.append(OffloadingEvent(tuple(keys), MEDIUM, removed))
