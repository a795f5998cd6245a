"""A backend for tests: real bookkeeping over a fake pool, NumPy pages, and jobs that end when told to.

Caches are ``{layer_name: numpy array}`` with the block axis first, and are written in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from jaxkv.keys import GroupId, JobId
from jaxkv.offload.base import JobResult, OffloadingSpec, OffloadingWorker, TransferJob
from jaxkv.offload.host_manager import HostOffloadingManager, HostSlots
from jaxkv.spec import KVCacheConfig
from jaxkv.testing.fake_pool import FakePool

Pages = list[bytes | None]
"""The pages of one chunk, block after block and layer after layer; ``None`` where a block was skipped."""
Fail = Callable[[TransferJob], str | None]
"""Why a job fails, or ``None`` to let it succeed."""

GARBAGE = 0xAB
"""What every byte of a load's target holds until the load has landed, and for good if it fails."""


@final
@dataclass(slots=True)
class _Delayed:
    job: TransferJob
    pages: list[Pages]
    kv_caches: Any | None


@final
class FakeWorker(OffloadingWorker):
    """Moves pages between NumPy arrays and a dictionary.

    A store keeps the pages as they are when it is submitted. A load overwrites its targets with garbage at
    once and with the pages when it ends; it asserts that nobody rewrote its slots in between.

    While ``delayed`` is true jobs end only through ``finish``, in the order it is told. ``fail`` decides
    which jobs fail.
    """

    def __init__(self, config: KVCacheConfig, blocks_per_chunk: int = 1) -> None:
        self.delayed = False
        self.fail: Fail = lambda _: None
        self.medium: dict[tuple[int, int], Pages] = {}
        self._config = config
        self._blocks_per_chunk = blocks_per_chunk
        self._jobs: dict[JobId, _Delayed] = {}
        self._cancelled: set[JobId] = set()
        self._results: list[JobResult] = []

    @property
    def job_ids(self) -> list[JobId]:
        """Jobs that have not ended, oldest first."""
        return list(self._jobs)

    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        """See ``OffloadingWorker``."""
        self._submit(_Delayed(job, self._read_blocks(job, kv_caches), None))

    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        """See ``OffloadingWorker``."""
        pages = [self.medium[slot] for slot in _slots(job)]
        for group, block, _ in self._targets(job, pages):
            for layer in self._config.groups[group].layer_names:
                kv_caches[layer][block].view(np.uint8)[...] = GARBAGE
        self._submit(_Delayed(job, pages, kv_caches))
        return kv_caches

    def finish(self, job_ids: Collection[JobId] | None = None) -> None:
        """End these jobs in this order; all of them where none are named."""
        for job_id in self.job_ids if job_ids is None else job_ids:
            delayed = self._jobs.pop(job_id)
            error = "cancelled" if job_id in self._cancelled else self.fail(delayed.job)
            if delayed.kv_caches is None:
                self._end_store(delayed, error)
            else:
                self._end_load(delayed, error)
            num_bytes = sum(len(page) for pages in delayed.pages for page in pages if page is not None)
            cancelled = job_id in self._cancelled
            self._results.append(JobResult(job_id, 0 if error else num_bytes, 0.0, error, cancelled))

    def cancel(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``. Of delayed jobs none has begun."""
        self._cancelled.update(set(job_ids) & self._jobs.keys())

    def get_finished(self) -> list[JobResult]:
        """See ``OffloadingWorker``."""
        taken, self._results = self._results, []
        return taken

    def wait(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``."""
        self.finish([job_id for job_id in job_ids if job_id in self._jobs])

    def shutdown(self) -> None:
        """See ``OffloadingWorker``."""
        self.finish()

    def _submit(self, delayed: _Delayed) -> None:
        self._jobs[delayed.job.job_id] = delayed
        if not self.delayed:
            self.finish([delayed.job.job_id])

    def _end_store(self, delayed: _Delayed, error: str | None) -> None:
        for slot, pages in zip(_slots(delayed.job), delayed.pages, strict=True):
            self.medium[slot] = pages if error is None else [None] * len(pages)

    def _end_load(self, delayed: _Delayed, error: str | None) -> None:
        for slot, pages in zip(_slots(delayed.job), delayed.pages, strict=True):
            assert self.medium[slot] is pages, f"{slot} was rewritten while job {delayed.job.job_id} read it"
        if error is not None:
            return
        for group, block, page in self._targets(delayed.job, delayed.pages):
            self._write_block(group, block, page, delayed.kv_caches)

    def _write_block(self, group: GroupId, block: int, page: bytes | None, kv_caches: Any) -> None:
        assert page is not None, f"block {block} of group {group} was never stored"
        offset = 0
        for layer in self._config.groups[group].layer_names:
            target: npt.NDArray[Any] = kv_caches[layer][block]
            part = np.frombuffer(page, target.dtype, target.size, offset)
            target[...] = part.reshape(target.shape)
            offset += target.nbytes

    def _read_blocks(self, job: TransferJob, kv_caches: Any) -> list[Pages]:
        pages: Pages = []
        for blocks in job.blocks:
            layers = self._config.groups[blocks.group].layer_names
            pages.extend(
                b"".join(kv_caches[layer][block].tobytes() for layer in layers) if block >= 0 else None
                for block in blocks.block_ids
            )
        size = self._blocks_per_chunk
        return [pages[start : start + size] for start in range(0, len(pages), size)]

    def _targets(self, job: TransferJob, pages: Sequence[Pages]) -> list[tuple[GroupId, int, bytes | None]]:
        flat = [page for chunk in pages for page in chunk]
        blocks = [(blocks.group, int(block)) for blocks in job.blocks for block in blocks.block_ids]
        return [(group, block, page) for (group, block), page in zip(blocks, flat, strict=True) if block >= 0]


def _slots(job: TransferJob) -> list[tuple[int, int]]:
    """Offset and epoch of each slot of a job."""
    assert isinstance(job.spec, HostSlots)
    return list(zip(job.spec.offsets.tolist(), job.spec.epochs.tolist(), strict=True))


@final
class FakeOffloadingSpec(OffloadingSpec):
    """The host backend's manager over a ``FakePool``, with a ``FakeWorker``."""

    def __init__(self, config: KVCacheConfig, pool: FakePool, *, blocks_per_chunk: int = 1) -> None:
        self.pool = pool
        self.worker = FakeWorker(config, blocks_per_chunk)
        slot_bytes = [group.page_size_bytes * blocks_per_chunk for group in config.groups]
        self._manager = HostOffloadingManager(pool, slot_bytes, enable_events=True)

    def get_manager(self) -> HostOffloadingManager:
        """See ``OffloadingSpec``."""
        return self._manager

    def get_worker(self, kv_caches: Any) -> FakeWorker:
        """See ``OffloadingSpec``."""
        del kv_caches
        return self.worker

    def shutdown(self) -> None:
        """See ``OffloadingSpec``."""
        self._manager.shutdown()
