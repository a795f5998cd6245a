"""Counters that say why: what was stored, skipped, hit, deferred, failed and evicted, per group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import Job, JobKind
from jaxkv.connector.lookup import Deferral, Hit
from jaxkv.connector.store_plan import SkipReason
from jaxkv.keys import GroupId, OffloadKey, get_offload_group
from jaxkv.offload.base import JobResult


@final
@dataclass(slots=True)
class GroupStats:
    """Chunks of one group since the connector was made; bytes are those of the blocks moved."""

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
    """A snapshot of all counters. Seconds are summed over jobs, which may run at the same time."""

    groups: tuple[GroupStats, ...]
    store_seconds: float
    load_seconds: float
    hit_tokens: int
    deferred: Mapping[Deferral, int]
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
    """Counts; read it with ``snapshot``."""

    def __init__(self, caches: ChunkedCaches) -> None:
        self._block_bytes = [group.page_size_bytes for group in caches.config.groups]
        self._groups = [GroupStats() for _ in self._block_bytes]
        self._deferred: Counter[Deferral] = Counter()
        self._seconds = dict.fromkeys(JobKind, 0.0)
        self._hit_tokens = 0

    def skipped(self, group: GroupId, reason: SkipReason) -> None:
        """A chunk was not stored."""
        self._groups[group].skipped_chunks[reason] += 1

    def evicted(self, keys: Iterable[OffloadKey]) -> None:
        """Chunks had to go."""
        for key in keys:
            self._groups[get_offload_group(key)].evicted_chunks += 1

    def deferred(self, reason: Deferral) -> None:
        """A request was asked to wait."""
        self._deferred[reason] += 1

    def hit(self, hit: Hit) -> None:
        """A promised hit is being loaded."""
        self._hit_tokens += hit.boundary_tokens - hit.known_tokens
        for chunk in hit.chunks:
            self._groups[chunk.group].hit_chunks += 1

    def job_ended(self, job: Job, result: JobResult) -> None:
        """A transfer is over."""
        self._seconds[job.kind] += result.elapsed_s
        for key in job.keys:
            self._count_chunk(self._groups[get_offload_group(key)], job.kind, failed=result.error is not None)
        if result.error is None:
            for blocks in job.transfer.blocks:
                num_bytes = int(np.count_nonzero(blocks.block_ids >= 0)) * self._block_bytes[blocks.group]
                self._count_bytes(self._groups[blocks.group], job.kind, num_bytes)

    def snapshot(self, backend: Any) -> ConnectorStats:
        """All counters as they stand, with the backend's own."""
        return ConnectorStats(
            groups=tuple(_copy(group) for group in self._groups),
            store_seconds=self._seconds[JobKind.STORE],
            load_seconds=self._seconds[JobKind.LOAD],
            hit_tokens=self._hit_tokens,
            deferred=dict(self._deferred),
            backend=backend,
        )

    def _count_chunk(self, group: GroupStats, kind: JobKind, *, failed: bool) -> None:
        match kind, failed:
            case JobKind.STORE, False:
                group.stored_chunks += 1
            case JobKind.STORE, True:
                group.failed_store_chunks += 1
            case JobKind.LOAD, False:
                group.loaded_chunks += 1
            case JobKind.LOAD, True:
                group.failed_load_chunks += 1

    def _count_bytes(self, group: GroupStats, kind: JobKind, num_bytes: int) -> None:
        match kind:
            case JobKind.STORE:
                group.stored_bytes += num_bytes
            case JobKind.LOAD:
                group.loaded_bytes += num_bytes


def _copy(group: GroupStats) -> GroupStats:
    return replace(group, skipped_chunks=Counter(group.skipped_chunks))
