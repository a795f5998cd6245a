"""The loop with several workers, each with caches and a medium of its own."""

from __future__ import annotations

from connector_loop import Loop
from loop_model import make_caches

from jaxkv.connector import (
    KVConnectorOutput,
    KVOutputAggregator,
    OffloadingConnectorWorker,
)
from jaxkv.connector.metadata import OffloadingWorkerMetadata
from jaxkv.testing.fake_worker import FakeWorker


class WorkersLoop(Loop):
    """Pages of worker ``i`` hold ``i`` more than those of the first. Workers can be delayed one by one."""

    def __init__(self, num_workers=2, **options):
        super().__init__(num_workers=num_workers, **options)
        size = options.get("blocks_per_chunk", 1)
        self.workers = [FakeWorker(self.config, size) for _ in range(num_workers)]
        self.halves = [OffloadingConnectorWorker(worker) for worker in self.workers]
        self.shards = [make_caches(self.config) for _ in range(num_workers)]
        self.aggregator = KVOutputAggregator(num_workers)
        self.shard = 0

    def work(self, metadata, output):
        for half, caches in zip(self.halves, self.shards, strict=True):
            half.submit_stores(metadata, caches)
            half.submit_loads(metadata, caches)
        self.compute(output)
        return self.aggregator.aggregate([self.report(half) for half in self.halves])

    def report(self, half: OffloadingConnectorWorker) -> KVConnectorOutput:
        """What one worker says of a step."""
        received, failed, results = half.take_received(), half.take_failed(), half.take_results()
        return KVConnectorOutput(
            finished_recving=received | failed.keys(),
            failed_recving=failed,
            worker_meta=OffloadingWorkerMetadata(results) if results else None,
        )

    def compute_tokens(self, request, start, end):
        for shard, caches in enumerate(self.shards):
            self.shard, self.caches = shard, caches
            super().compute_tokens(request, start, end)

    def content(self, request, group, place):
        return super().content(request, group, place) + self.shard

    def delay(self, *, delayed: bool) -> None:
        """Hold jobs of all workers back, or let them end."""
        for worker in self.workers:
            worker.delayed = delayed
            if not delayed:
                worker.finish()
