"""Workers that move NumPy pages when they are told to, and look at every byte they move.

What is stored is compared with what the model says the key stands for. What is loaded into is poisoned
until the load has landed. A slot that changes hands while it is being read or written is noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from cache_manager_watch import WatchedManager, slots_of
from cache_model import Layer
from cache_request import MachineRequest

from jaxkv.keys import JobId
from jaxkv.offload.base import JobResult, OffloadingSpec, OffloadingWorker, TransferJob

POISON = -(2**40)
"""What a load's target holds until the load has landed, and for good if it fails."""


class _Entry:
    """What a slot holds: ``pages`` (blocks, values), ``None`` until they were written; ``held`` (blocks,)."""

    __slots__ = ("epoch", "held", "pages")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.pages: np.ndarray | None = None
        self.held: np.ndarray | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """A job that has not landed. ``parts`` has a layer, its block ids and, of a store, their pages."""

    job: TransferJob
    is_load: bool
    parts: list[tuple[int, np.ndarray, np.ndarray | None]]
    entries: list[tuple[int, _Entry]]
    cancelled: bool = False


class ShardWorker(OffloadingWorker):
    """One worker's copies. ``caches`` are one array (num_blocks, values of a block) per group.

    ``shard`` is added to every value of this worker's caches. Jobs land only through ``land``.
    """

    def __init__(
        self,
        manager: WatchedManager,
        find_request: Callable[[str], MachineRequest],
        chunk_blocks: int,
        shard: int,
    ) -> None:
        self.flights: dict[int, Flight] = {}
        self._manager = manager
        self._model = manager.model
        self._find_request = find_request
        self._chunk_blocks = chunk_blocks
        self._shard = shard
        self._medium: dict[int, _Entry] = {}
        self._loading: set[int] = set()
        self._cancelled: set[JobId] = set()
        self._results: list[JobResult] = []
        self._caches: Sequence[np.ndarray] = ()

    # -- stores -----------------------------------------------------------------------------------------

    def submit_store(self, job: TransferJob, kv_caches: Sequence[np.ndarray]) -> None:
        """Take the pages as they are now."""
        parts = [
            (blocks.group, blocks.block_ids, kv_caches[blocks.group][blocks.block_ids])
            for blocks in job.blocks
        ]
        entries = []
        for offset, epoch in slots_of(job.spec):
            entry = self._medium[offset] = _Entry(epoch)
            entries.append((offset, entry))
        self.flights[job.job_id] = Flight(job, False, parts, entries)
        names = [self._manager.names[offset] for offset, _ in entries]
        for group, block_ids, pages in parts:
            held = (block_ids >= 0).reshape(-1, self._chunk_blocks)
            of_group, names = names[: len(held)], names[len(held) :]
            assert all(layer == group for (layer, _), _ in of_group), "a key of another group"
            found = pages.reshape(*held.shape, -1)
            end = 0
            for request_id, chunks in groupby(of_group, itemgetter(1)):
                prefixes = [prefix for (_, prefix), _ in chunks]
                first, end = end, end + len(prefixes)
                request = self._find_request(request_id)
                self._check_stored(request, group, held[first:end], found[first:end], prefixes)
        assert not names, "a job has more slots than chunks"

    def _check_stored(
        self, request: MachineRequest, group: int, held: np.ndarray, found: np.ndarray, prefixes: list[int]
    ) -> None:
        """Whether ``found`` are the pages of the chunks that ``prefixes`` name."""
        layer, ids, size = self._model.layers[group], request.contents.ids, self._chunk_blocks
        lasts = np.searchsorted(ids, prefixes)
        assert np.array_equal(ids[lasts], prefixes), "a key of another request's prefix"
        assert lasts.max() < request.store_limit, f"{request} wants to be stored up to {request.store_limit}"
        ends = lasts + 1 - self._model.lookahead(group)
        assert held.any(axis=1).all(), "nothing is kept of a chunk"
        whole = ends % layer.chunk == 0
        places = (ends[whole] // layer.block)[:, None] + np.arange(-size, 0)
        kept = held[whole]
        wanted = request.contents.blocks[group][places[kept]] + self._shard
        if not _equal_where_read(layer, found[whole][kept], wanted, places[kept]):
            raise AssertionError(
                f"{request} stores of group {group} the pages\n{found[whole][kept]}\nbut its table positions "
                f"{places[kept]} hold\n{wanted}"
            )
        for chunk in np.flatnonzero(~whole):
            self._check_tail(request, group, int(ends[chunk]), held[chunk], found[chunk])

    def _check_tail(
        self, request: MachineRequest, group: int, end: int, held: np.ndarray, pages: np.ndarray
    ) -> None:
        """Whether ``pages`` are what the chunk that ``end`` cuts holds before it."""
        layer, values = self._model.layers[group], request.contents.tokens[group]
        start = (end - 1) // layer.chunk * layer.chunk
        last = (end - 1 - start) // layer.block
        assert not held[last + 1 :].any(), "a tail has blocks behind its end"
        if layer.kind == "state":
            assert held[last], "the block of the state is left out"
            assert held.sum() == 1, "there is one state"
            found, wanted = pages[last], np.array([values[end - 1], end])
        else:
            is_kept = np.repeat(held, layer.block)[: end - start] & _is_read(
                layer, np.arange(start, end), end
            )
            found, wanted = pages.reshape(-1)[: end - start][is_kept], values[start:end][is_kept]
        assert np.array_equal(found, wanted + self._shard), (
            f"{request} stores of group {group} the tail {found} that ends at {end}, not {wanted}"
        )

    # -- loads ------------------------------------------------------------------------------------------

    def submit_load(self, job: TransferJob, kv_caches: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Poison the targets."""
        self._caches = kv_caches
        entries = []
        for offset, epoch in slots_of(job.spec):
            entry = self._medium.get(offset)
            assert entry is not None, f"nothing was ever written to the slot at {offset}"
            assert entry.epoch == epoch, f"the slot at {offset} has epoch {entry.epoch}, not {epoch}"
            assert entry.pages is not None, f"the slot at {offset} has not been written"
            entries.append((offset, entry))
        assert self._loading.isdisjoint(offset for offset, _ in entries), "a chunk is loaded twice at a time"
        self._loading.update(offset for offset, _ in entries)
        parts = []
        for blocks in job.blocks:
            targets = blocks.block_ids[blocks.block_ids >= 0]
            assert len(np.unique(targets)) == len(targets), "two pages are loaded into one block"
            kv_caches[blocks.group][targets] = POISON
            parts.append((blocks.group, blocks.block_ids, None))
        self.flights[job.job_id] = Flight(job, True, parts, entries)
        return kv_caches

    # -- the end of a job -------------------------------------------------------------------------------

    def land(self, job_id: int, error: str | None = None) -> Flight:
        """End a job. Of those that were called off every other one had begun before."""
        flight = self.flights.pop(job_id)
        flight.cancelled = job_id in self._cancelled and job_id % 2 == 0
        if flight.cancelled:
            error = "cancelled"
        for offset, entry in flight.entries:
            assert self._medium[offset] is entry, f"the slot at {offset} changed hands under job {job_id}"
        if flight.is_load:
            self._loading.difference_update(offset for offset, _ in flight.entries)
        if error is not None:
            if not flight.cancelled:
                self._model.dropped(self._manager.names[offset][0] for offset, _ in flight.entries)
        elif flight.is_load:
            self._land_load(flight)
        else:
            self._land_store(flight)
        self._results.append(JobResult(flight.job.job_id, int(error is None), 0.0, error, flight.cancelled))
        return flight

    def _land_store(self, flight: Flight) -> None:
        entries = iter(flight.entries)
        size = self._chunk_blocks
        for _, block_ids, pages in flight.parts:
            held = block_ids >= 0
            for first in range(0, len(block_ids), size):
                _, entry = next(entries)
                entry.pages, entry.held = pages[first : first + size], held[first : first + size]

    def _land_load(self, flight: Flight) -> None:
        first = 0
        for group, block_ids, _ in flight.parts:
            count = len(block_ids) // self._chunk_blocks
            entries = [entry for _, entry in flight.entries[first : first + count]]
            first += count
            wanted = block_ids >= 0
            assert np.concatenate([entry.held for entry in entries])[wanted].all(), (
                f"{flight.job.req_id} loads blocks of group {group} that were never stored"
            )
            pages = np.concatenate([entry.pages for entry in entries])
            self._caches[group][block_ids[wanted]] = pages[wanted]

    def cancel(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``. Only loads of requests that have ended may be called off."""
        for job_id in job_ids:
            if (flight := self.flights.get(job_id)) is not None:
                assert flight.is_load, "a store was called off"
                assert self._find_request(flight.job.req_id).has_ended, "a request waits for this load"
                self._cancelled.add(job_id)

    def get_finished(self) -> list[JobResult]:
        """See ``OffloadingWorker``."""
        taken, self._results = self._results, []
        return taken

    def wait(self, job_ids: Collection[Any]) -> None:
        """See ``OffloadingWorker``."""
        for job_id in job_ids:
            if job_id in self.flights:
                self.land(job_id)

    def shutdown(self) -> None:
        """See ``OffloadingWorker``."""
        self.wait(tuple(self.flights))


def _is_read(layer: Layer, positions: np.ndarray, ends: Any) -> np.ndarray:
    """Whether the token at ``ends``, or any behind it, reads those before it at ``positions``."""
    return (positions >= layer.first_reads(np.asarray(ends))) | (positions < layer.sinks)


def _equal_where_read(layer: Layer, found: np.ndarray, wanted: np.ndarray, places: np.ndarray) -> bool:
    """Compares blocks at table positions ``places`` in what anybody reads."""
    differ = found != wanted
    if not differ.any():
        return True
    if layer.kind == "state":
        return False
    positions = places[:, None] * layer.block + np.arange(layer.block)
    chunk_ends = positions // layer.chunk * layer.chunk + layer.chunk
    return not (differ & _is_read(layer, positions, chunk_ends)).any()


class MachineSpec(OffloadingSpec):
    """A manager and a worker, made beforehand."""

    def __init__(self, manager: WatchedManager, worker: ShardWorker) -> None:
        self._manager = manager
        self._worker = worker

    def get_manager(self) -> WatchedManager:
        return self._manager

    def get_worker(self, kv_caches: Any) -> ShardWorker:
        del kv_caches
        return self._worker

    def shutdown(self) -> None:
        self._manager.shutdown()
