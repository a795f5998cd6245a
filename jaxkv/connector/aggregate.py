"""Turns what several workers report of a step into what one would (vLLM: ``KVOutputAggregator``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from typing import final

from jaxkv.connector.base import KVConnectorOutput, LoadFailure
from jaxkv.connector.metadata import OffloadingWorkerMetadata
from jaxkv.errors import ConfigError


@final
class KVOutputAggregator:
    """Names a request as sent or received once all ``num_workers`` workers have named it.

    Until then one of them may still write its blocks. A receive that failed anywhere has failed; it too is
    named when the last worker is done. Make one for each connector and give it the outputs of every step.
    """

    def __init__(self, num_workers: int) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers must be at least 1, got {num_workers}")
        self._num_workers = num_workers
        self._sent: Counter[str] = Counter()
        self._received: Counter[str] = Counter()
        self._failures: dict[str, LoadFailure] = {}

    def aggregate(self, outputs: Sequence[KVConnectorOutput]) -> KVConnectorOutput:
        """One output of a step, from those of all workers."""
        for output in outputs:
            self._sent.update(output.finished_sending)
            self._received.update(output.finished_recving | output.failed_recving.keys())
            for req_id, failure in output.failed_recving.items():
                known = self._failures.get(req_id)
                self._failures[req_id] = failure if known is None else _join(known, failure)
        received = self._take_complete(self._received)
        reports = [
            output.worker_meta
            for output in outputs
            if isinstance(output.worker_meta, OffloadingWorkerMetadata)
        ]
        return KVConnectorOutput(
            finished_sending=self._take_complete(self._sent),
            finished_recving=received,
            failed_recving={
                req_id: self._failures.pop(req_id) for req_id in received & self._failures.keys()
            },
            worker_meta=reduce(OffloadingWorkerMetadata.aggregate, reports) if reports else None,
        )

    def _take_complete(self, counts: Counter[str]) -> set[str]:
        complete = {req_id for req_id, count in counts.items() if count >= self._num_workers}
        for req_id in complete:
            del counts[req_id]
        return complete


def _join(first: LoadFailure, second: LoadFailure) -> LoadFailure:
    return LoadFailure(tuple(dict.fromkeys(first.blocks + second.blocks)), f"{first.error}; {second.error}")
