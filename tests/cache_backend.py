"""A backend that sees everything: the real manager behind a watcher, and NumPy pages that move when told to.

The watcher tells the model which chunks can be loaded and holds the manager to its contract. The worker
compares what is stored with what the model says the key stands for, poisons what is loaded into until the
load has landed, and notices when a slot changes hands while it is being read or written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from cache_model import CacheModel, Contents

from jaxkv.keys import OffloadKey
from jaxkv.offload.base import (
    JobResult,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    TransferJob,
)

POISON = -(2**40)
"""What a load's target holds until the load has landed, and for good if it fails."""
_GROUP_BYTES = 4


def chunk_of(key: bytes) -> tuple[int, int]:
    """The layer and the prefix a key names: here block hashes are the numbers of prefixes."""
    return int.from_bytes(key[-_GROUP_BYTES:], "big"), int.from_bytes(key[:-_GROUP_BYTES], "big")


def slots_of(spec: Any) -> Iterator[tuple[int, int]]:
    """Offset and epoch of the slots of a job, in the job's order."""
    return zip(spec.offsets.tolist(), spec.epochs.tolist(), strict=True)


class WatchedManager(OffloadingManager):
    """The manager under test, and what the model must know of it.

    ``refuse`` and ``retry`` are how often it refuses a store, and answers RETRY to a lookup, for no reason.
    """

    def __init__(self, manager: OffloadingManager, model: CacheModel, draw: Random, counts: Counter) -> None:
        self.refuse = self.retry = 0.0
        self.num_evicted = self.num_refused = 0
        self.keys: dict[int, OffloadKey] = {}
        self._manager = manager
        self.model = model
        self._draw = draw
        self._counts = counts
        self._pins: Counter[OffloadKey] = Counter()
        self._stores: dict[OffloadKey, int] = {}
        self._resets = 0

    def lookup(self, key, ctx):
        if self.retry and self._draw.random() < self.retry:
            self._counts["lookups told to retry"] += 1
            return LookupResult.RETRY
        return self._manager.lookup(key, ctx)

    def lookup_prefix(self, keys, ctx):
        return super().lookup_prefix(keys, ctx) if self.retry else self._manager.lookup_prefix(keys, ctx)

    def lookup_suffix(self, keys, ctx):
        return super().lookup_suffix(keys, ctx) if self.retry else self._manager.lookup_suffix(keys, ctx)

    def prepare_load(self, keys, ctx):
        self._pins.update(keys)
        spec = self._manager.prepare_load(keys, ctx)
        slots = [self.keys[offset] for offset, _ in slots_of(spec)]
        assert slots == list(keys), "slots of other chunks were handed out"
        return spec

    def complete_load(self, keys, ctx, *, success=True):
        self._pins.subtract(keys)
        if not success:
            self.model.dropped(map(chunk_of, keys))
        self._manager.complete_load(keys, ctx, success=success)

    def prepare_store(self, keys, ctx) -> PrepareStoreOutput | None:
        if self.refuse and self._draw.random() < self.refuse:
            self._counts["stores refused at random"] += 1
            return None
        output = self._manager.prepare_store(keys, ctx)
        if output is None:
            self._counts["stores refused for want of room"] += 1
            self.num_refused += 1
            return None
        stored = list(output.keys_to_store)
        if output.evicted_keys:
            self._check_evicted(output.evicted_keys, keys)
        assert self._stores.keys().isdisjoint(stored), "a chunk is being stored twice"
        self._stores.update(dict.fromkeys(stored, self._resets))
        self.keys.update(
            (offset, key) for key, (offset, _) in zip(stored, slots_of(output.store_spec), strict=True)
        )
        return output

    def _check_evicted(self, evicted: Collection[OffloadKey], offered: Collection[OffloadKey]) -> None:
        self._counts["chunks evicted"] += len(evicted)
        self.num_evicted += len(evicted)
        assert not any(self._pins[key] for key in evicted), "a chunk in use was evicted"
        assert self._stores.keys().isdisjoint(evicted), "a chunk that is being written was evicted"
        assert set(evicted).isdisjoint(offered), "chunks were evicted to make room for themselves"
        self.model.dropped(map(chunk_of, evicted))

    def complete_store(self, keys, ctx, *, success=True):
        for key in keys:
            if self._stores.pop(key) == self._resets and success:
                self.model.stored([chunk_of(key)])
        self._manager.complete_store(keys, ctx, success=success)

    def reset_cache(self):
        self._resets += 1
        self.model.forget_all()
        self._manager.reset_cache()

    def check_idle(self) -> None:
        """Nothing is pinned and nothing is being stored."""
        assert not +self._pins, f"pins are left: {+self._pins}"
        assert not self._stores, f"stores never ended: {self._stores}"

    def touch(self, keys, ctx):
        self._manager.touch(keys, ctx)

    def on_new_request(self, ctx):
        return self._manager.on_new_request(ctx)

    def on_request_finished(self, ctx):
        self._manager.on_request_finished(ctx)

    def on_schedule_end(self):
        self._manager.on_schedule_end()

    def has_pending_work(self):
        return self._manager.has_pending_work()

    def take_events(self):
        return self._manager.take_events()

    def get_stats(self):
        return self._manager.get_stats()

    def leaks(self):
        return self._manager.leaks()

    def shutdown(self):
        self._manager.shutdown()


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


FindContents = Callable[[str], Contents]


class ShardWorker(OffloadingWorker):
    """One worker's copies. ``caches`` are one array (num_blocks, values of a block) per group.

    ``shard`` is added to every value of this worker's caches. Jobs land only through ``land``.
    """

    def __init__(self, manager: WatchedManager, find_contents: FindContents, chunk_blocks: int, shard: int):
        self.flights: dict[int, Flight] = {}
        self._manager = manager
        self._layers = manager.model.layers
        self._find_contents = find_contents
        self._chunk_blocks = chunk_blocks
        self._shard = shard
        self._medium: dict[int, _Entry] = {}
        self._results: list[JobResult] = []
        self._caches: Sequence[np.ndarray] = ()

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
        self._check_stored(job, parts, entries)
        self.flights[job.job_id] = Flight(job, False, parts, entries)

    def _check_stored(self, job: TransferJob, parts, entries) -> None:
        contents = self._find_contents(job.req_id)
        first = 0
        for group, block_ids, pages in parts:
            count = len(block_ids) // self._chunk_blocks
            names = [chunk_of(self._manager.keys[offset]) for offset, _ in entries[first : first + count]]
            first += count
            assert all(layer == group for layer, _ in names), "a key of another group"
            blocks = contents.blocks[group]
            held = block_ids >= 0
            last = self._last_blocks(contents, group, [prefix for _, prefix in names])
            places = (last[:, None] + np.arange(1 - self._chunk_blocks, 1)).ravel()
            wanted = blocks[places[held]]
            wanted = wanted + self._shard
            if not np.array_equal(pages[held], wanted):
                raise AssertionError(
                    f"{job.req_id} stores of group {group} the pages\n{pages[held]}\nfrom blocks "
                    f"{block_ids[held]}, but its table positions {places[held]} hold\n{wanted}"
                )
            assert held.any(), "a job stores chunks of which nothing is kept"
        assert first == len(entries), "a job has more slots than chunks"

    def _last_blocks(self, contents: Contents, group: int, prefixes: list[int]) -> np.ndarray:
        """Table positions of the blocks that end with these prefixes."""
        lasts = np.searchsorted(contents.ids, prefixes)
        assert np.array_equal(contents.ids[lasts], prefixes), "a key of another request's prefix"
        return (lasts + 1) // self._layers[group].block - 1

    def submit_load(self, job: TransferJob, kv_caches: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Poison the targets."""
        self._caches = kv_caches
        entries = []
        for offset, epoch in slots_of(job.spec):
            entry = self._medium.get(offset)
            assert entry is not None, f"nothing was ever written to the slot at {offset}"
            assert entry.epoch == epoch, (
                f"the slot at {offset} has epoch {entry.epoch}, the load asks for {epoch}"
            )
            assert entry.pages is not None, f"the slot at {offset} has not been written"
            entries.append((offset, entry))
        parts = []
        for blocks in job.blocks:
            targets = blocks.block_ids[blocks.block_ids >= 0]
            assert len(np.unique(targets)) == len(targets), "two pages are loaded into one block"
            kv_caches[blocks.group][targets] = POISON
            parts.append((blocks.group, blocks.block_ids, None))
        self.flights[job.job_id] = Flight(job, True, parts, entries)
        return kv_caches

    def land(self, job_id: int, error: str | None = None) -> Flight:
        """End a job."""
        flight = self.flights.pop(job_id)
        for offset, entry in flight.entries:
            assert self._medium[offset] is entry, f"the slot at {offset} changed hands under job {job_id}"
        num_bytes = 0
        if error is None:
            num_bytes = self._land_load(flight) if flight.is_load else self._land_store(flight)
        self._results.append(JobResult(flight.job.job_id, num_bytes, 0.0, error))
        return flight

    def _land_store(self, flight: Flight) -> int:
        entries = iter(flight.entries)
        size = self._chunk_blocks
        for _, block_ids, pages in flight.parts:
            held = block_ids >= 0
            for first in range(0, len(block_ids), size):
                _, entry = next(entries)
                entry.pages, entry.held = pages[first : first + size], held[first : first + size]
        return 1

    def _land_load(self, flight: Flight) -> int:
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
        return 1

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


class MachineSpec(OffloadingSpec):
    """The watched manager and one worker; the driver makes those of further shards itself."""

    def __init__(self, manager: WatchedManager, worker: ShardWorker) -> None:
        self.manager = manager
        self.worker = worker

    def get_manager(self) -> WatchedManager:
        return self.manager

    def get_worker(self, kv_caches: Any) -> ShardWorker:
        del kv_caches
        return self.worker

    def shutdown(self) -> None:
        self.manager.shutdown()
