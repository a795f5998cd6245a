"""A complete offloading backend in one page: chunks as compressed bytes in a dictionary.

    OffloadingConnector(OffloadingConfig(host_bytes="1GiB", backend="dict_backend.DictSpec"), kv_cache_config)

``host_bytes`` limits what the chunks would take uncompressed. Stores go through a small staging pool.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, final

from jaxkv import BlockTransfer, HostPool, JaxKVError, canonicalize
from jaxkv.keys import JobId, OffloadKey, get_offload_group
from jaxkv.offload import (
    BackendOptions,
    JobResult,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    PrepareStoreOutput,
    ReqContext,
    TransferJob,
)

_STAGING_BYTES = 64 << 20


@final
@dataclass(frozen=True, slots=True)
class Names(LoadStoreSpec):
    """Where the worker finds the chunks of a job: under their keys."""

    keys: tuple[OffloadKey, ...]


@final
class DictManager(OffloadingManager):
    """Least recently used chunks go first. ``chunk_bytes`` has one entry per group."""

    def __init__(
        self, capacity_bytes: int, chunk_bytes: tuple[int, ...], data: dict[OffloadKey, bytes]
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._chunk_bytes = chunk_bytes
        self._data = data
        self._held: OrderedDict[OffloadKey, bool] = OrderedDict()  # True once loadable
        self._pins: Counter[OffloadKey] = Counter()

    def lookup(self, key: OffloadKey, ctx: ReqContext) -> LookupResult:
        """See ``OffloadingManager``."""
        if key not in self._held:
            return LookupResult.MISS
        return LookupResult.HIT if self._held[key] else LookupResult.HIT_PENDING

    def touch(self, keys: Collection[OffloadKey], ctx: ReqContext) -> None:
        """See ``OffloadingManager``."""
        for key in reversed(tuple(keys)):
            if key in self._held:
                self._held.move_to_end(key)

    def prepare_load(self, keys: Collection[OffloadKey], ctx: ReqContext) -> Names:
        """See ``OffloadingManager``."""
        self._pins.update(keys)
        self.touch(keys, ctx)
        return Names(tuple(keys))

    def complete_load(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        self._pins -= Counter(keys)
        if not success:
            for key in keys:
                self._drop(key)

    def prepare_store(self, keys: Collection[OffloadKey], ctx: ReqContext) -> PrepareStoreOutput | None:
        """See ``OffloadingManager``."""
        new = tuple(key for key in keys if key not in self._held)
        excess = sum(map(self._size, (*self._held, *new))) - self._capacity_bytes
        evicted: list[OffloadKey] = []
        for key, loadable in self._held.items():
            if excess <= 0:
                break
            if loadable and not self._pins[key] and key not in keys:
                evicted.append(key)
                excess -= self._size(key)
        if excess > 0:
            return None
        for key in evicted:
            self._drop(key)
        self._held.update(dict.fromkeys(new, False))
        return PrepareStoreOutput(new, Names(new), tuple(evicted))

    def complete_store(self, keys: Collection[OffloadKey], ctx: ReqContext, *, success: bool = True) -> None:
        """See ``OffloadingManager``."""
        for key in keys:
            if success and key in self._held:
                self._held[key] = True
            else:
                self._drop(key)

    def reset_cache(self) -> None:
        """See ``OffloadingManager``."""
        for key in tuple(self._held):
            self._drop(key)

    def _size(self, key: OffloadKey) -> int:
        return self._chunk_bytes[get_offload_group(key)]

    def _drop(self, key: OffloadKey) -> None:
        self._held.pop(key, None)
        self._data.pop(key, None)


@final
class DictWorker(OffloadingWorker):
    """Moves chunks through one staging slot at a time; every job has ended when its submission returns."""

    def __init__(self, transfer: BlockTransfer, data: dict[OffloadKey, bytes]) -> None:
        self._transfer = transfer
        self._data = data
        self._ended: list[JobResult] = []

    @property
    def layout_fingerprint(self) -> str:
        """See ``OffloadingWorker``."""
        return self._transfer.canonical.fingerprint

    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        """See ``OffloadingWorker``."""
        start_s, num_bytes, error = time.perf_counter(), 0, None
        try:
            for key, group, blocks in _chunks(job, self._transfer.blocks_per_chunk):
                with self._transfer.reserve(group, 1) as slots:
                    result = self._transfer.offload(kv_caches, group, blocks, slots).wait()
                    with self._transfer.pool.view(slots[0]) as view:
                        self._data[key] = zlib.compress(view, level=1)
                num_bytes, error = num_bytes + result.num_bytes, error or result.error
        except JaxKVError as failed:
            error = str(failed)
        self._ended.append(JobResult(job.job_id, num_bytes, time.perf_counter() - start_s, error))

    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        """See ``OffloadingWorker``."""
        start_s, num_bytes, error = time.perf_counter(), 0, None
        try:
            for key, group, blocks in _chunks(job, self._transfer.blocks_per_chunk):
                with self._transfer.reserve(group, 1) as slots:
                    with self._transfer.pool.view(slots[0]) as view:
                        view[:] = zlib.decompress(self._data[key])
                    kv_caches, ticket = self._transfer.restore(kv_caches, group, blocks, slots)
                    result = ticket.wait()
                num_bytes, error = num_bytes + result.num_bytes, error or result.error
        except (JaxKVError, KeyError, zlib.error) as failed:  # KeyError: dropped by a reset on its way
            error = repr(failed)
        self._ended.append(JobResult(job.job_id, num_bytes, time.perf_counter() - start_s, error))
        return kv_caches

    def get_finished(self) -> list[JobResult]:
        """See ``OffloadingWorker``."""
        ended, self._ended = self._ended, []
        return ended

    def wait(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``."""

    def shutdown(self) -> None:
        """See ``OffloadingWorker``."""


def _chunks(job: TransferJob, blocks_per_chunk: int) -> Iterator[tuple[OffloadKey, Any, Any]]:
    """(key, group, block ids) of every chunk of a job; the keys stand group after group, as the blocks do."""
    assert isinstance(job.spec, Names)
    keys = iter(job.spec.keys)
    for blocks in job.blocks:
        for first in range(0, len(blocks.block_ids), blocks_per_chunk):
            yield next(keys), blocks.group, blocks.block_ids[first : first + blocks_per_chunk]


@final
class DictSpec(OffloadingSpec):
    """Makes both halves over one dictionary."""

    def __init__(self, options: BackendOptions) -> None:
        self._options = options
        self._data: dict[OffloadKey, bytes] = {}
        self._staging = HostPool(_STAGING_BYTES)
        chunk_bytes = tuple(
            group.page_size_bytes * options.blocks_per_chunk for group in options.kv_cache_config.groups
        )
        self._manager = DictManager(options.host_bytes, chunk_bytes, self._data)

    def get_manager(self) -> DictManager:
        """See ``OffloadingSpec``."""
        return self._manager

    def get_worker(self, kv_caches: Any) -> DictWorker:
        """See ``OffloadingSpec``."""
        canonical = canonicalize(kv_caches, self._options.kv_cache_config, self._options.hints)
        transfer = BlockTransfer(canonical, self._staging, self._options.blocks_per_chunk)
        return DictWorker(transfer, self._data)

    def shutdown(self) -> None:
        """See ``OffloadingSpec``."""
        self._data.clear()
        self._staging.close()
