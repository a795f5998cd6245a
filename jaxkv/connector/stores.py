"""Turns store plans into jobs: finds room for what became complete and remembers what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import JobKind, JobTable, device_blocks
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.request_state import Tenure
from jaxkv.connector.store_plan import PlannedChunk, SkipReason, plan_stores, shrinking_prefixes
from jaxkv.offload.base import OffloadingManager, PrepareStoreOutput, TransferJob


@final
class StorePlanner:
    """Plans the stores of one request at a time; what the manager refuses is offered again the next time."""

    def __init__(
        self,
        caches: ChunkedCaches,
        manager: OffloadingManager,
        jobs: JobTable,
        metrics: Metrics,
        *,
        offload_prompt_only: bool,
    ) -> None:
        self._caches = caches
        self._manager = manager
        self._jobs = jobs
        self._metrics = metrics
        self._offload_prompt_only = offload_prompt_only

    def plan(self, tenure: Tenure, num_computed_tokens: int) -> TransferJob | None:
        """The job that stores the chunks which became complete; ``None`` where there is nothing to write."""
        if not tenure.running:
            return None
        request = tenure.request
        limit = request.num_prompt_tokens if self._offload_prompt_only else request.num_tokens
        limit = tenure.params.store_limit(min(limit, num_computed_tokens))
        plan = plan_stores(self._caches, tenure.store_view(limit))
        tenure.next_chunk = list(plan.next_chunk)
        for chunk, reason in plan.skipped.items():
            self._metrics.skipped(chunk.group, reason)
        taken, output = self._make_room(tenure, plan.chunks)
        self._offer_again(tenure, plan.chunks, taken)
        if output is None:
            return None
        return self._start_job(tenure, taken, output)

    def _make_room(
        self, tenure: Tenure, chunks: Sequence[PlannedChunk]
    ) -> tuple[Sequence[PlannedChunk], PrepareStoreOutput | None]:
        """The longest prefix of the plan that the manager takes."""
        for prefix in shrinking_prefixes(chunks):
            output = self._manager.prepare_store([chunk.key for chunk in prefix], tenure.ctx)
            if output is not None:
                return prefix, output
        return (), None

    def _offer_again(
        self, tenure: Tenure, chunks: Sequence[PlannedChunk], taken: Sequence[PlannedChunk]
    ) -> None:
        """Go back to the first chunk of each group that was refused."""
        taken_chunks = {planned.chunk for planned in taken}
        for planned in chunks:
            group, index = planned.chunk.group, planned.chunk.index
            if planned.chunk not in taken_chunks:
                tenure.next_chunk[group] = min(tenure.next_chunk[group], index)
                self._metrics.skipped(group, SkipReason.REFUSED)

    def _start_job(
        self, tenure: Tenure, taken: Sequence[PlannedChunk], output: PrepareStoreOutput
    ) -> TransferJob | None:
        to_store = set(output.keys_to_store)
        held = [planned for planned in taken if planned.key not in to_store]
        self._manager.touch([planned.key for planned in held], tenure.ctx)
        for planned in held:
            self._metrics.skipped(planned.chunk.group, SkipReason.HELD)
        self._metrics.evicted(output.evicted_keys)
        if not to_store:
            return None
        targets = [(planned.chunk, planned.block_ids) for planned in taken if planned.key in to_store]
        blocks = device_blocks(targets)
        return self._jobs.start(JobKind.STORE, tenure.ctx, output.keys_to_store, blocks, output.store_spec)
