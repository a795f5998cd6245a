"""What the two halves of the connector tell each other once a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxkv.connector.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from jaxkv.keys import JobId
from jaxkv.offload.base import JobResult, TransferJob


@final
@dataclass(frozen=True, slots=True)
class OffloadingConnectorMetadata(KVConnectorMetadata):
    """Jobs to submit: ``stores`` before anything of the step, then ``loads``.

    ``cancelled`` are loads of steps before, of requests that have ended since.
    """

    stores: tuple[TransferJob, ...] = ()
    loads: tuple[TransferJob, ...] = ()
    cancelled: tuple[JobId, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class OffloadingWorkerMetadata(KVConnectorWorkerMetadata):
    """Jobs one worker has ended, in the order they ended."""

    results: tuple[JobResult, ...]

    def aggregate(self, other: OffloadingWorkerMetadata) -> OffloadingWorkerMetadata:
        """What this and another worker report, for the scheduler side (vLLM: ``aggregate``)."""
        return OffloadingWorkerMetadata(self.results + other.results)
