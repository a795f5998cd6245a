"""Turns store plans into jobs: finds room for what became complete and remembers what was refused.

All stores of a step are one job where the backend takes them together: a program call for each group, however
many requests have something to store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
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
    stays_whole,
)
from jaxkv.keys import GroupId, KeyRun, KeyRuns, OffloadKey
from jaxkv.offload.base import LoadStoreSpec, OffloadingManager, TransferJob


@final
@dataclass(slots=True, eq=False)
class _Offer:
    """Chunks of one request that the backend is asked to take. Not to be changed."""

    tenure: Tenure
    spans: Sequence[PlannedSpan]
    keys: KeyRuns


@final
class StorePlanner:
    """Plans the stores of a step; what the manager refuses is offered again the next time."""

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

    def plan(self, tenures: Iterable[Tenure]) -> list[TransferJob]:
        """The jobs that store the chunks which became complete."""
        offers: list[tuple[_Offer, StorePlan]] = []
        for tenure in tenures:
            plan = plan_stores(self._caches, tenure)
            for (group, reason), num_chunks in plan.skipped.items():
                self._metrics.skipped(group, reason, num_chunks)
            if plan.spans:
                offers.append((_offer(tenure, plan.spans), plan))
            else:
                self._advance(tenure, plan, ())
        return self._store_together(offers) if offers else []

    def _store_together(self, offers: Sequence[tuple[_Offer, StorePlan]]) -> list[TransferJob]:
        output = self._manager.prepare_stores([(offer.keys, offer.tenure.ctx) for offer, _ in offers])
        if output is None:
            return [job for offer, plan in offers for job in self._store_alone(offer, plan)]
        self._note_evicted(output.evicted_keys)
        jobs: list[TransferJob] = []
        taken: list[tuple[_Offer, Sequence[OffloadKey]]] = []
        for (offer, plan), keys_to_store in zip(offers, output.keys_to_store, strict=True):
            if keys_to_store is None:
                jobs += self._store_some(offer.tenure, plan)
            else:
                self._advance(offer.tenure, plan, ())
                taken.append((offer, keys_to_store))
        return [*jobs, *self._start_job(taken, output.store_spec)]

    def _store_alone(self, offer: _Offer, plan: StorePlan) -> list[TransferJob]:
        output = self._manager.prepare_store(offer.keys, offer.tenure.ctx)
        if output is None:
            return self._store_some(offer.tenure, plan)
        self._note_evicted(output.evicted_keys)
        self._advance(offer.tenure, plan, ())
        return self._start_job([(offer, output.keys_to_store)], output.store_spec)

    def _store_some(self, tenure: Tenure, plan: StorePlan) -> list[TransferJob]:
        """What the manager refused as a whole: the longest prefix of it that it takes."""
        for prefix in islice(shrinking_prefixes(self._caches, plan.spans), 1, None):
            offer = _offer(tenure, prefix)
            output = self._manager.prepare_store(offer.keys, tenure.ctx)
            if output is not None:
                self._note_evicted(output.evicted_keys)
                self._advance(tenure, plan, _refused(plan, prefix))
                return self._start_job([(offer, output.keys_to_store)], output.store_spec)
        self._advance(tenure, plan, _refused(plan, ()))
        return []

    def _advance(self, tenure: Tenure, plan: StorePlan, refused: Sequence[tuple[ChunkSpan, range]]) -> None:
        """Go on behind what was taken; what was refused is offered again, from the first such chunk on."""
        tenure.next_chunk = plan.next_chunk
        tenure.tail = plan.tail
        if tenure.handed_states:
            tenure.handed_states = {}
        tenure.previous_tokens = tenure.complete_tokens
        tenure.due_tokens = next_due_tokens(self._caches, tenure)
        tenure.was_refused = bool(refused)
        for span, chunks in refused:
            self._metrics.skipped(span.group, SkipReason.REFUSED, len(chunks))
            if span.cut_tokens is None:
                tenure.next_chunk[span.group] = min(tenure.next_chunk[span.group], chunks.start)
            else:
                waiting = tenure.tail.groups if tenure.tail is not None else ()
                tenure.tail = Tail(span.cut_tokens, (*waiting, span.group))

    def _start_job(
        self, taken: Sequence[tuple[_Offer, Sequence[OffloadKey]]], spec: LoadStoreSpec
    ) -> list[TransferJob]:
        """One job for all that must be written; none where the backend holds everything already."""
        blocks: dict[GroupId, list[int]] = {}
        keys, writing = [], []
        for offer, keys_to_store in taken:
            spans = offer.spans
            if not keys_to_store:
                self._note_held(spans)
                continue
            if keys_to_store is not offer.keys and len(keys_to_store) < len(offer.keys):
                spans = self._without_held(spans, set(keys_to_store))
            writing.append(offer)
            keys.append(keys_to_store)
            for planned in spans:
                blocks.setdefault(planned.span.group, []).extend(planned.block_ids)
        if not writing:
            return []
        job = self._jobs.start(
            JobKind.STORE,
            writing[0].tenure.ctx,
            _join(keys),
            device_blocks(blocks),
            spec,
            may_follow_step=not any(map(self._caches.is_state, blocks))
            and all(stays_whole(self._caches, offer.tenure, offer.spans) for offer in writing),
        )
        for offer in writing:
            self._events.store_started(job.job_id, offer.tenure.request, offer.keys)
        return [job]

    def _without_held(self, spans: Sequence[PlannedSpan], to_store: set[OffloadKey]) -> Sequence[PlannedSpan]:
        """The spans' blocks less those of chunks the backend has already."""
        left = []
        for planned in spans:
            wanted = np.fromiter((key in to_store for key in planned.span.keys), bool, len(planned.span))
            ids = np.array(planned.block_ids).reshape(len(planned.span), -1)[wanted]
            left.append(PlannedSpan(planned.span, ids.reshape(-1).tolist()))
            self._metrics.skipped(planned.span.group, SkipReason.HELD, int(np.count_nonzero(~wanted)))
        return left

    def _note_held(self, spans: Sequence[PlannedSpan]) -> None:
        for planned in spans:
            self._metrics.skipped(planned.span.group, SkipReason.HELD, len(planned.span))

    def _note_evicted(self, keys: Sequence[OffloadKey]) -> None:
        if keys:
            self._metrics.evicted(keys)


def _offer(tenure: Tenure, spans: Sequence[PlannedSpan]) -> _Offer:
    return _Offer(tenure, spans, KeyRuns([planned.span.keys for planned in spans]))


def _join(keys: Sequence[Sequence[OffloadKey]]) -> Sequence[OffloadKey]:
    """Keys of one or several requests as one collection, without making them where all are runs."""
    runs: list[KeyRun] = []
    for part in keys:
        if not isinstance(part, KeyRuns):
            return [key for part in keys for key in part]
        runs += part.runs
    return KeyRuns(runs)


def _refused(plan: StorePlan, taken: Sequence[PlannedSpan]) -> Sequence[tuple[ChunkSpan, range]]:
    """Spans of the plan that were not taken as a whole, and which of their chunks were not."""
    kept = {(part.span.group, part.span.chunks.start, part.span.cut_tokens): part.span for part in taken}
    refused = []
    for planned in plan.spans:
        span = planned.span
        part = kept.get((span.group, span.chunks.start, span.cut_tokens))
        num_kept = 0 if part is None else len(part)
        if num_kept < len(span):
            refused.append((span, span.chunks[num_kept:]))
    return refused
