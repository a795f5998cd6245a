"""Counters that say why: what was stored, skipped, hit, deferred, failed and evicted, per group.

Every call takes constant time, or time that grows with runs of keys rather than with keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.histogram import (
    BYTES_BUCKETS,
    LOOKUP_BUCKETS,
    WAIT_BUCKETS,
    Histogram,
    HistogramStats,
)
from jaxkv.connector.jobs import Job, JobKind
from jaxkv.connector.lookup import Deferral
from jaxkv.connector.store_plan import SkipReason
from jaxkv.keys import GroupId, OffloadKey, count_by_group
from jaxkv.offload.base import JobResult
from jaxkv.spec import kind_name


@final
@dataclass(slots=True)
class GroupStats:
    """Chunks of one group since the connector was made; bytes are those of the blocks moved.

    ``kind`` names the kind of its layers as vLLM does, such as ``"sliding_window"``.
    """

    kind: str
    stored_chunks: int = 0
    stored_bytes: int = 0
    loaded_chunks: int = 0
    loaded_bytes: int = 0
    hit_chunks: int = 0
    failed_store_chunks: int = 0
    failed_load_chunks: int = 0
    evicted_chunks: int = 0
    skipped_chunks: Counter[SkipReason] = field(default_factory=Counter)


@final
@dataclass(frozen=True, slots=True)
class ConnectorStats:
    """A snapshot of all counters. Seconds are summed over jobs, which may run at the same time.

    ``queried_tokens`` are those that admitted requests did not find on the device, ``hit_tokens`` those of
    them that the host had. ``store_sizes`` and ``load_sizes`` count the bytes of jobs that ended well,
    ``lookup_seconds`` the time of each lookup, ``wait_seconds`` that from a request's first deferred lookup
    to the one that was answered, or to the request's end.
    """

    groups: tuple[GroupStats, ...]
    store_seconds: float
    load_seconds: float
    hit_tokens: int
    queried_tokens: int
    deferred: Mapping[Deferral, int]
    store_sizes: HistogramStats
    load_sizes: HistogramStats
    lookup_seconds: HistogramStats
    wait_seconds: HistogramStats
    backend: Any

    @property
    def stored_bytes(self) -> int:
        """Bytes stored in all groups."""
        return sum(group.stored_bytes for group in self.groups)

    @property
    def loaded_bytes(self) -> int:
        """Bytes loaded in all groups."""
        return sum(group.loaded_bytes for group in self.groups)

    @property
    def evicted_chunks(self) -> int:
        """Chunks the backend evicted to make room, in all groups."""
        return sum(group.evicted_chunks for group in self.groups)


@final
class Metrics:
    """Counts; read it with ``snapshot``, from any thread."""

    def __init__(self, caches: ChunkedCaches) -> None:
        self._blocks_per_chunk = caches.blocks_per_chunk
        self._block_bytes = [group.page_size_bytes for group in caches.config.groups]
        self._groups = [GroupStats(kind_name(group.spec)) for group in caches.config.groups]
        self._deferred: Counter[Deferral] = Counter()
        self._seconds = dict.fromkeys(JobKind, 0.0)
        self._sizes = {kind: Histogram(BYTES_BUCKETS) for kind in JobKind}
        self._lookup_seconds = Histogram(LOOKUP_BUCKETS)
        self._wait_seconds = Histogram(WAIT_BUCKETS)
        self._hit_tokens = 0
        self._queried_tokens = 0

    def skipped(self, group: GroupId, reason: SkipReason, num_chunks: int = 1) -> None:
        """Chunks were not stored."""
        if num_chunks:
            self._groups[group].skipped_chunks[reason] += num_chunks

    def evicted(self, keys: Collection[OffloadKey]) -> None:
        """Chunks had to go."""
        for group, num_chunks in count_by_group(keys):
            self._groups[group].evicted_chunks += num_chunks

    def looked_up(self, elapsed_s: float) -> None:
        """One lookup took this long, whatever it found."""
        self._lookup_seconds.observe(elapsed_s)

    def deferred(self, reason: Deferral) -> None:
        """A request was asked to wait."""
        self._deferred[reason] += 1

    def waited(self, elapsed_s: float) -> None:
        """A request that was asked to wait has its answer, or is over."""
        self._wait_seconds.observe(elapsed_s)

    def queried(self, num_tokens: int) -> None:
        """A request was admitted that found all but ``num_tokens`` tokens on the device."""
        self._queried_tokens += num_tokens

    def hit(self, num_tokens: int, keys: Collection[OffloadKey]) -> None:
        """A promised hit is being loaded."""
        self._hit_tokens += num_tokens
        for group, num_chunks in count_by_group(keys):
            self._groups[group].hit_chunks += num_chunks

    def job_ended(self, job: Job, result: JobResult) -> None:
        """A transfer is over. One that was cancelled is neither done nor failed."""
        self._seconds[job.kind] += result.elapsed_s
        if result.cancelled:
            return
        failed = result.error is not None
        moved = 0
        for blocks in job.transfer.blocks:
            stats = self._groups[blocks.group]
            num_chunks = len(blocks.block_ids) // self._blocks_per_chunk
            _count_chunks(stats, job.kind, num_chunks, failed=failed)
            if not failed:
                num_bytes = blocks.num_blocks * self._block_bytes[blocks.group]
                _count_bytes(stats, job.kind, num_bytes)
                moved += num_bytes
        if not failed:
            self._sizes[job.kind].observe(moved)

    def snapshot(self, backend: Any) -> ConnectorStats:
        """All counters as they stand, with the backend's own."""
        return ConnectorStats(
            groups=tuple(_copy(group) for group in self._groups),
            store_seconds=self._seconds[JobKind.STORE],
            load_seconds=self._seconds[JobKind.LOAD],
            hit_tokens=self._hit_tokens,
            queried_tokens=self._queried_tokens,
            deferred=Counter(dict(self._deferred)),
            store_sizes=self._sizes[JobKind.STORE].snapshot(),
            load_sizes=self._sizes[JobKind.LOAD].snapshot(),
            lookup_seconds=self._lookup_seconds.snapshot(),
            wait_seconds=self._wait_seconds.snapshot(),
            backend=backend,
        )


def _count_chunks(group: GroupStats, kind: JobKind, num_chunks: int, *, failed: bool) -> None:
    match kind, failed:
        case JobKind.STORE, False:
            group.stored_chunks += num_chunks
        case JobKind.STORE, True:
            group.failed_store_chunks += num_chunks
        case JobKind.LOAD, False:
            group.loaded_chunks += num_chunks
        case JobKind.LOAD, True:
            group.failed_load_chunks += num_chunks


def _count_bytes(group: GroupStats, kind: JobKind, num_bytes: int) -> None:
    match kind:
        case JobKind.STORE:
            group.stored_bytes += num_bytes
        case JobKind.LOAD:
            group.loaded_bytes += num_bytes


def _copy(group: GroupStats) -> GroupStats:
    return replace(group, skipped_chunks=Counter(dict(group.skipped_chunks)))
