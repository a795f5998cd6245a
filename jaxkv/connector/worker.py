"""The worker side of the connector: submits the jobs of a step and reports how they ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import final

from jaxkv.connector.base import KVCaches, LoadFailure
from jaxkv.connector.metadata import OffloadingConnectorMetadata
from jaxkv.errors import ConnectorStateError
from jaxkv.keys import BlockId, GroupId, JobId
from jaxkv.offload.base import JobResult, OffloadingWorker, TransferJob


@final
class OffloadingConnectorWorker:
    """Drives one ``OffloadingWorker``. Every job is submitted once, though a loop may send metadata again
    because the step broke off. Every end of a job is reported once.

    Jobs are numbered in the order in which they are planned.
    """

    def __init__(self, worker: OffloadingWorker) -> None:
        self._worker = worker
        self._submitted: set[JobId] = set()
        self._last_store = self._last_load = JobId(-1)
        self._following: list[TransferJob] = []
        self._loads: dict[JobId, TransferJob] = {}
        self._results: list[JobResult] = []
        self._received: set[str] = set()
        self._failed: dict[str, LoadFailure] = {}

    @property
    def layout_fingerprint(self) -> str:
        """See ``OffloadingWorker``."""
        return self._worker.layout_fingerprint

    def warm_up(self, kv_caches: KVCaches, max_blocks: int) -> KVCaches:
        """Compile what transfers need; answers the caches to go on with."""
        warmed: KVCaches = self._worker.warm_up(kv_caches, max_blocks)
        return warmed

    def submit_stores(self, metadata: OffloadingConnectorMetadata, kv_caches: KVCaches) -> None:
        """Submit what must be read before the step, and what is left of the step before.

        Loads that nobody waits for any more are called off.
        """
        self._worker.cancel(metadata.cancelled)
        self.submit_following((), kv_caches)
        for job in metadata.stores:
            if job.job_id <= self._last_store:
                continue
            if job.may_follow_step:
                self._following.append(job)
            else:
                self._submit_store(job, kv_caches)
            self._last_store = job.job_id

    def submit_following(self, stores: Iterable[TransferJob], kv_caches: KVCaches) -> None:
        """Submit ``stores`` and those left that may follow the step, which runs meanwhile or has run."""
        self._following += stores
        while self._following:
            self._submit_store(self._following[0], kv_caches)
            del self._following[0]

    def _submit_store(self, job: TransferJob, kv_caches: KVCaches) -> None:
        self._submitted.add(job.job_id)
        self._worker.submit_store(job, kv_caches)

    def submit_loads(self, metadata: OffloadingConnectorMetadata, kv_caches: KVCaches) -> KVCaches:
        """Submit every load of the step; answers the caches to go on with.

        Raises ``ConnectorStateError`` while stores of the step are not submitted: they may be of blocks that
        it writes to.
        """
        if metadata.stores and metadata.stores[-1].job_id > self._last_store:
            raise ConnectorStateError(
                "the stores of this step were not submitted; call handle_preemptions first in every step"
            )
        for job in metadata.loads:
            if job.job_id <= self._last_load:
                continue
            self._submitted.add(job.job_id)
            self._loads[job.job_id] = job
            kv_caches = self._worker.submit_load(job, kv_caches)
            self._last_load = job.job_id
        return kv_caches

    def take_received(self) -> set[str]:
        """Requests whose load arrived, since the last call. Looks for jobs that ended, as no other call does:
        what is then taken of failures and results belongs to the same jobs.
        """
        self._poll()
        taken, self._received = self._received, set()
        return taken

    def take_failed(self) -> Mapping[str, LoadFailure]:
        """Requests whose load did not arrive, since the last call, as of the last ``take_received``."""
        taken, self._failed = self._failed, {}
        return taken

    def take_results(self) -> tuple[JobResult, ...]:
        """Jobs that ended, since the last call, as of the last ``take_received``."""
        taken, self._results = self._results, []
        return tuple(taken)

    def drain(self) -> None:
        """Block until every job has ended. Stores that were to follow a step have failed."""
        for job in self._following:
            self._results.append(JobResult(job.job_id, 0, 0.0, "the connector was shut down first"))
        self._following.clear()
        self._worker.wait(tuple(self._submitted))
        self._poll()

    def shutdown(self) -> None:
        """End all work."""
        self._worker.shutdown()

    def _poll(self) -> None:
        for result in self._worker.get_finished():
            self._submitted.discard(result.job_id)
            self._results.append(result)
            load = self._loads.pop(result.job_id, None)
            if load is None:
                continue
            if result.error is None:
                self._received.add(load.req_id)
            else:
                self._failed[load.req_id] = LoadFailure(_targets(load), result.error)


def _targets(load: TransferJob) -> tuple[tuple[GroupId, BlockId], ...]:
    return tuple(
        (blocks.group, BlockId(int(block)))
        for blocks in load.blocks
        for block in blocks.block_ids
        if block >= 0
    )
