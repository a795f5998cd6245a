"""Which chunks host memory holds, and who is using them. Moves no bytes; ``ffi/chunk_index.h`` decides."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import numpy as np
import numpy.typing as npt

from jaxkv.errors import PoolClosedError
from jaxkv.host_pool import load_native
from jaxkv.keys import GroupId, KeyRun, KeyRuns, OffloadKey, get_offload_group
from jaxkv.offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadingManager,
    OffloadPolicy,
    PrefixLookup,
    PrepareStoreOutput,
    ReqContext,
    StepStoreOutput,
)
from jaxkv.offload.policies import MakePolicy, find_policy
from jaxkv.offload.slots import SlotPool
from jaxkv.slots import Slots

if TYPE_CHECKING:
    from jaxkv._native import ChunkIndex

MEDIUM = "host"
"""How this backend names itself in events."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class HostSlots(LoadStoreSpec):
    """The pool slots of a job's chunks, in the order of the job: int64 arrays of shape ``(num_chunks,)``.

    ``slot_bytes`` are the sizes of slots, by group.
    """

    offsets: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int64]
    slot_bytes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets)

    def of_group(self, group: GroupId, first: int, end: int) -> Slots:
        """The slots of chunks ``first`` to ``end`` of the job, which are those of one group."""
        return Slots(self.offsets[first:end], self.epochs[first:end], self.slot_bytes[group])


@final
@dataclass(frozen=True, slots=True)
class HostManagerStats:
    """What the host backend holds now, and what it did since it was made.

    ``num_busy`` chunks are used by jobs, ``num_quarantined`` of them are forgotten already. ``num_evicted``
    chunks were given up; ``num_below_threshold`` keys were not stored because they were offered too seldom.
    """

    num_chunks: int
    num_busy: int
    num_quarantined: int
    num_evicted: int
    num_below_threshold: int
    used_bytes: int
    capacity_bytes: int


@final
class HostOffloadingManager(OffloadingManager):
    """Chunks in a host pool (vLLM: ``CPUOffloadingManager``), with slots of one size per group.

    A chunk forgotten while a job still reads or writes it is quarantined: its slot comes back when the last
    such job ends, and until then its key is not stored anew, so that a late completion is never taken for
    that of a newer job.

    ``policy`` is a name that ``find_policy`` knows, or makes a ``CachePolicy`` for each slot size. From
    ``store_threshold`` 2 on a key is stored only when it is offered for that time; the offers of
    ``max_tracked_keys`` keys are remembered, of those offered last.

    A key, or a completion, that fits nothing prepared raises ``ValueError`` and changes nothing.
    """

    def __init__(
        self,
        pool: SlotPool,
        slot_bytes: Sequence[int],
        policy: str | MakePolicy = "lru",
        *,
        store_threshold: int = 0,
        max_tracked_keys: int = 64_000,
        enable_events: bool = False,
    ) -> None:
        pool.fit_slabs(slot_bytes)
        native = load_native()
        self._pool = pool
        self._slot_bytes = tuple(slot_bytes)
        self._index: ChunkIndex = native.ChunkIndex(
            pool.slot_pool,
            self._slot_bytes,
            find_policy(policy) if isinstance(policy, str) else policy,
            store_threshold,
            max_tracked_keys,
        )
        self._answers = {
            native.Found.MISS: LookupResult.MISS,
            native.Found.READABLE: LookupResult.HIT,
            native.Found.PENDING: LookupResult.HIT_PENDING,
        }
        self._events: list[OffloadingEvent] | None = [] if enable_events else None

    def lookup(self, key: OffloadKey, ctx: ReqContext) -> LookupResult:
        """See ``OffloadingManager``."""
        return self._answers[self._index.lookup(key)] if ctx.may_load_from(MEDIUM) else LookupResult.MISS

    def lookup_prefix(self, keys: Sequence[OffloadKey], ctx: ReqContext) -> PrefixLookup:
        """See ``OffloadingManager``."""
        return _to_lookup(*self._index.lookup_prefix(keys)) if ctx.may_load_from(MEDIUM) else PrefixLookup(0)

    def lookup_suffix(self, keys: Sequence[OffloadKey], ctx: ReqContext) -> PrefixLookup:
        """See ``OffloadingManager``."""
        return _to_lookup(*self._index.lookup_suffix(keys)) if ctx.may_load_from(MEDIUM) else PrefixLookup(0)

    def on_new_request(self, ctx: ReqContext) -> OffloadPolicy:
        """See ``OffloadingManager``."""
        self._index.begin_request(ctx.req_id)
        return OffloadPolicy.CHUNK_LEVEL

    def on_request_finished(self, ctx: ReqContext) -> None:
        """See ``OffloadingManager``. Only now the chunks it asked for count as used, the first key last."""
        self._index.end_request(ctx.req_id)

    def prepare_load(self, keys: Collection[OffloadKey], ctx: ReqContext) -> HostSlots:
        """See ``OffloadingManager``."""
        self._require_open()
        return HostSlots(*self._index.prepare_load(ctx.req_id, keys), self._slot_bytes)

    def complete_load(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        self._emit(self._index.complete_load(keys, success), removed=True)

    def prepare_store(self, keys: Collection[OffloadKey], ctx: ReqContext) -> PrepareStoreOutput | None:
        """See ``OffloadingManager``."""
        self._require_open()
        accepted, some, offsets, epochs, evicted = self._index.prepare_store(ctx.req_id, keys)
        self._emit(evicted, removed=True)
        if not accepted:
            return None
        # Nearly always all are stored, and then runs are handed on without making keys of them.
        whole = keys if isinstance(keys, KeyRun | KeyRuns) else tuple(keys)
        to_store = whole if some is None else some
        return PrepareStoreOutput(to_store, HostSlots(offsets, epochs, self._slot_bytes), evicted)

    def prepare_stores(self, offers: Sequence[tuple[Sequence[OffloadKey], ReqContext]]) -> StepStoreOutput:
        """See ``OffloadingManager``."""
        self._require_open()
        asked = [(ctx.req_id, keys) for keys, ctx in offers]
        answers, offsets, epochs, evicted = self._index.prepare_stores(asked)
        self._emit(evicted, removed=True)
        to_store = [_chosen(keys, answer) for (keys, _), answer in zip(offers, answers, strict=True)]
        return StepStoreOutput(to_store, HostSlots(offsets, epochs, self._slot_bytes), evicted)

    def complete_store(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        landed = self._index.complete_store(keys, success, self._events is not None)
        self._emit(landed, removed=False)

    def touch(self, keys: Collection[OffloadKey], ctx: ReqContext) -> None:
        """See ``OffloadingManager``."""
        self._index.touch(keys)

    def reset_cache(self) -> None:
        """See ``OffloadingManager``."""
        self._emit(self._index.reset(), removed=True)

    def take_events(self) -> Sequence[OffloadingEvent]:
        """See ``OffloadingManager``; empty unless the manager was made with events."""
        if self._events is None:
            return ()
        taken, self._events = self._events, []
        return taken

    def get_stats(self) -> HostManagerStats:
        """See ``OffloadingManager``."""
        counts = self._index.counts
        return HostManagerStats(
            num_chunks=counts.num_chunks,
            num_busy=counts.num_in_use,
            num_quarantined=counts.num_forgotten,
            num_evicted=counts.num_evicted,
            num_below_threshold=counts.num_below_threshold,
            used_bytes=self._pool.used_bytes,
            capacity_bytes=self._pool.capacity_bytes,
        )

    def leaks(self) -> Sequence[str]:
        """See ``OffloadingManager``."""
        return [
            f"chunk {key.hex()} of group {get_offload_group(key)} has {uses} uses"
            for key, uses in self._index.in_use()
        ]

    def shutdown(self) -> None:
        """See ``OffloadingManager``. Jobs must have ended: slots still in use are freed as well."""
        self.reset_cache()
        self._index.abandon()

    def _require_open(self) -> None:
        if self._pool.closed:
            raise PoolClosedError("the host pool was closed; open a new one, and a connector over it")

    def _emit(self, keys: Sequence[OffloadKey], *, removed: bool) -> None:
        if self._events is not None and keys:
            self._events.append(OffloadingEvent(tuple(keys), MEDIUM, removed))


def _to_lookup(num_found: int, readable: bool) -> PrefixLookup:
    return PrefixLookup(num_found, LookupResult.HIT if readable else LookupResult.HIT_PENDING)


def _chosen(
    offered: Sequence[OffloadKey], answer: tuple[OffloadKey, ...] | bool | None
) -> Sequence[OffloadKey] | None:
    """The keys to store out of those offered: nearly always all, and then runs are handed on as they are."""
    if isinstance(answer, bool):
        return offered
    return answer
