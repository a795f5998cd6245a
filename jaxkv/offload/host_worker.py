"""Moves chunks between cache arrays and the slots of a host pool. ``BlockTransfer`` copies."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import jax

from jaxkv.errors import JaxKVError
from jaxkv.keys import JobId
from jaxkv.offload.base import DeviceBlocks, JobResult, OffloadingWorker, TransferJob
from jaxkv.offload.host_manager import HostSlots
from jaxkv.slots import Slots
from jaxkv.transfer import BlockTransfer
from jaxkv.transfer.ticket import Ticket


@final
@dataclass(slots=True)
class _RunningJob:
    """One ticket per group; ``error`` is why the job's other groups were not started."""

    job_id: JobId
    tickets: list[Ticket] = field(default_factory=list)
    error: str | None = None

    def done(self) -> bool:
        return all(ticket.done() for ticket in self.tickets)

    def wait(self) -> JobResult:
        results = [ticket.wait() for ticket in self.tickets]
        errors = [result.error for result in results if result.error is not None]
        if self.error is not None:
            errors.append(self.error)
        return JobResult(
            self.job_id,
            num_bytes=sum(result.num_bytes for result in results),
            elapsed_s=sum(result.elapsed_s for result in results),
            error="; ".join(errors) or None,
            cancelled=self.error is None
            and bool(errors)
            and all(result.error is None or result.cancelled for result in results),
        )


@final
class HostOffloadingWorker(OffloadingWorker):
    """One transfer per job and group. A job that cannot be started, or stops half way, is a failed result."""

    def __init__(self, transfer: BlockTransfer, blocks_per_chunk: int) -> None:
        self._transfer = transfer
        self._blocks_per_chunk = blocks_per_chunk
        self._running: dict[JobId, _RunningJob] = {}

    @property
    def layout_fingerprint(self) -> str:
        """See ``OffloadingWorker``."""
        return self._transfer.canonical.fingerprint

    def warm_up(self, kv_caches: Any, max_blocks: int) -> Any:
        """See ``OffloadingWorker``."""
        return self._transfer.warm_up(kv_caches, max_blocks)

    def submit_store(self, job: TransferJob, kv_caches: Any) -> None:
        """See ``OffloadingWorker``."""
        running = self._running[job.job_id] = _RunningJob(job.job_id)
        try:
            for blocks, slots in self._by_group(job):
                ticket = self._transfer.offload(kv_caches, blocks.group, blocks.block_ids, slots)
                running.tickets.append(ticket)
        except (JaxKVError, jax.errors.JaxRuntimeError) as error:
            running.error = str(error)

    def submit_load(self, job: TransferJob, kv_caches: Any) -> Any:
        """See ``OffloadingWorker``. What is refused is refused before the caches are consumed.

        What XLA raises is passed on: the caches may be lost then, and only the serving loop makes new ones.
        """
        running = self._running[job.job_id] = _RunningJob(job.job_id)
        try:
            for blocks, slots in self._by_group(job):
                kv_caches, ticket = self._transfer.restore(kv_caches, blocks.group, blocks.block_ids, slots)
                running.tickets.append(ticket)
        except JaxKVError as error:
            running.error = str(error)
        return kv_caches

    def cancel(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``."""
        for job_id in job_ids:
            if job_id in self._running:
                for ticket in self._running[job_id].tickets:
                    ticket.cancel()

    def get_finished(self) -> list[JobResult]:
        """See ``OffloadingWorker``."""
        ended = [job for job in self._running.values() if job.done()]
        for job in ended:
            del self._running[job.job_id]
        return [job.wait() for job in ended]

    def wait(self, job_ids: Collection[JobId]) -> None:
        """See ``OffloadingWorker``."""
        for job_id in job_ids:
            if job_id in self._running:
                self._running[job_id].wait()

    def shutdown(self) -> None:
        """See ``OffloadingWorker``."""
        self.wait(tuple(self._running))
        self._running.clear()

    def _by_group(self, job: TransferJob) -> Iterator[tuple[DeviceBlocks, Slots]]:
        assert isinstance(job.spec, HostSlots)
        first = 0
        for blocks in job.blocks:
            end = first + len(blocks.block_ids) // self._blocks_per_chunk
            yield blocks, job.spec.of_group(blocks.group, first, end)
            first = end
