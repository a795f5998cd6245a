"""Turns store plans into jobs: finds room for what became complete and remembers what was refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.events import EventLog
from jaxkv.connector.jobs import JobKind, JobTable, device_blocks
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.request_state import Tail, Tenure
from jaxkv.connector.spans import ChunkSpan, PlannedSpan, shrinking_prefixes
from jaxkv.connector.store_plan import (
    SkipReason,
    StorePlan,
    next_due_tokens,
    plan_stores,
)
from jaxkv.keys import KeyRuns, OffloadKey
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
        events: EventLog,
    ) -> None:
        self._caches = caches
        self._manager = manager
        self._jobs = jobs
        self._metrics = metrics
        self._events = events

    def plan(self, tenure: Tenure) -> TransferJob | None:
        """The job that stores the chunks which became complete; ``None`` where there is nothing to write."""
        plan = plan_stores(self._caches, tenure)
        for (group, reason), num_chunks in plan.skipped.items():
            self._metrics.skipped(group, reason, num_chunks)
        taken, keys, output = self._make_room(tenure, plan)
        self._advance(tenure, plan, self._refused(plan, taken))
        return self._start_job(tenure, taken, keys, output) if output is not None else None

    def _advance(self, tenure: Tenure, plan: StorePlan, refused: Sequence[ChunkSpan]) -> None:
        """Go on behind what was taken; what was refused is offered again, from the first such chunk on."""
        tenure.next_chunk = plan.next_chunk
        tenure.tail = plan.tail
        tenure.handed_states = {}
        tenure.previous_tokens = tenure.complete_tokens
        for span in refused:
            self._metrics.skipped(span.group, SkipReason.REFUSED, len(span))
            if span.cut_tokens is None:
                tenure.next_chunk[span.group] = min(tenure.next_chunk[span.group], span.chunks.start)
            else:
                waiting = tenure.tail.groups if tenure.tail is not None else ()
                tenure.tail = Tail(span.cut_tokens, (*waiting, span.group))
        tenure.due_tokens = tenure.complete_tokens if refused else next_due_tokens(self._caches, tenure)

    def _refused(self, plan: StorePlan, taken: Sequence[PlannedSpan]) -> Sequence[ChunkSpan]:
        """What of the plan was not taken: spans as a whole, or from some chunk on."""
        if taken is plan.spans:
            return ()
        kept = {(part.span.group, part.span.chunks.start, part.span.cut_tokens): part.span for part in taken}
        refused = []
        for planned in plan.spans:
            span = planned.span
            part = kept.get((span.group, span.chunks.start, span.cut_tokens))
            num_kept = 0 if part is None else len(part)
            if num_kept < len(span):
                refused.append(replace(span, chunks=span.chunks[num_kept:], keys=span.keys[num_kept:]))
        return refused

    def _make_room(
        self, tenure: Tenure, plan: StorePlan
    ) -> tuple[Sequence[PlannedSpan], KeyRuns, PrepareStoreOutput | None]:
        """The longest prefix of the plan that the manager takes, and its keys."""
        for prefix in shrinking_prefixes(self._caches, plan.spans):
            keys = KeyRuns([planned.span.keys for planned in prefix])
            output = self._manager.prepare_store(keys, tenure.ctx)
            if output is not None:
                return prefix, keys, output
        return (), KeyRuns(()), None

    def _start_job(
        self, tenure: Tenure, taken: Sequence[PlannedSpan], keys: KeyRuns, output: PrepareStoreOutput
    ) -> TransferJob | None:
        to_store: Sequence[OffloadKey] = keys
        if output.evicted_keys:
            self._metrics.evicted(output.evicted_keys)
        if not output.keys_to_store:
            self._note_held(taken)
            return None
        if len(output.keys_to_store) < len(keys):
            to_store = output.keys_to_store
            taken = self._without_held(taken, set(to_store))
        blocks = device_blocks([(planned.span.group, planned.block_ids) for planned in taken])
        job = self._jobs.start(JobKind.STORE, tenure.ctx, to_store, blocks, output.store_spec)
        self._events.store_started(job.job_id, tenure.request, keys)
        return job

    def _without_held(self, taken: Sequence[PlannedSpan], to_store: set[OffloadKey]) -> Sequence[PlannedSpan]:
        """The spans' blocks less those of chunks the backend has already."""
        left = []
        for planned in taken:
            wanted = np.fromiter((key in to_store for key in planned.span.keys), bool, len(planned.span))
            ids = planned.block_ids.reshape(len(planned.span), -1)[wanted]
            left.append(PlannedSpan(planned.span, ids.reshape(-1)))
            self._metrics.skipped(planned.span.group, SkipReason.HELD, int(np.count_nonzero(~wanted)))
        return left

    def _note_held(self, taken: Sequence[PlannedSpan]) -> None:
        for planned in taken:
            self._metrics.skipped(planned.span.group, SkipReason.HELD, len(planned.span))
