"""The one table of transfers under way. Knows when a job is over; acts on nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import final

import numpy as np

from jaxkv.connector.spans import BlockIds
from jaxkv.keys import GroupId, JobId, OffloadKey
from jaxkv.offload.base import DeviceBlocks, JobResult, LoadStoreSpec, ReqContext, TransferJob


def device_blocks(by_group: Mapping[GroupId, Sequence[int] | BlockIds]) -> tuple[DeviceBlocks, ...]:
    """The device side of a job: the block ids of its chunks, group after group."""
    return tuple(
        DeviceBlocks(group, np.asarray(by_group[group], np.int32))
        for group in sorted(by_group)
        if len(by_group[group])
    )


class JobKind(Enum):
    """Which way the bytes go."""

    STORE = auto()
    LOAD = auto()


@final
@dataclass(slots=True)
class Job:
    """One transfer: ``keys`` in the order of ``transfer``'s chunks."""

    kind: JobKind
    ctx: ReqContext
    keys: Sequence[OffloadKey]
    transfer: TransferJob
    reports: list[JobResult] = field(default_factory=list)


@final
class JobTable:
    """Jobs from planning until every one of ``num_workers`` workers has reported them."""

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers
        self._jobs: dict[JobId, Job] = {}
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def __getitem__(self, job_id: JobId) -> Job:
        return self._jobs[job_id]

    def start(
        self,
        kind: JobKind,
        ctx: ReqContext,
        keys: Sequence[OffloadKey],
        blocks: Sequence[DeviceBlocks],
        spec: LoadStoreSpec,
        *,
        may_follow_step: bool = False,
    ) -> TransferJob:
        """Enter a new job."""
        transfer = TransferJob(JobId(self._next_id), ctx.req_id, tuple(blocks), spec, may_follow_step)
        self._next_id += 1
        self._jobs[transfer.job_id] = Job(kind, ctx, keys, transfer)
        return transfer

    def cancel(self, job_id: JobId) -> Job:
        """Take out a job that no worker has seen."""
        return self._jobs.pop(job_id)

    def report(self, result: JobResult) -> tuple[Job, JobResult] | None:
        """Take in one worker's result; the job and its overall result once all workers have reported.

        The overall result has the bytes of all workers, the longest time and the first error; it was
        cancelled if it was for one of them and failed for none. Results of jobs that are not in the table are
        ignored.
        """
        job = self._jobs.get(result.job_id)
        if job is None:
            return None
        job.reports.append(result)
        if len(job.reports) < self.num_workers:
            return None
        del self._jobs[result.job_id]
        if self.num_workers == 1:
            return job, result
        return job, replace(
            result,
            num_bytes=sum(report.num_bytes for report in job.reports),
            elapsed_s=max(report.elapsed_s for report in job.reports),
            error=next((report.error for report in job.reports if report.error is not None), None),
            cancelled=any(report.cancelled for report in job.reports)
            and all(report.error is None or report.cancelled for report in job.reports),
        )
