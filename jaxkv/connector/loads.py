"""What is loaded for whom: promises, the pins behind them, and the jobs they become."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import final

import numpy as np

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.jobs import Job, JobKind, JobTable, device_blocks
from jaxkv.connector.lookup import Deferral, Hit, HostPresence, Question, find_hit
from jaxkv.connector.metrics import Metrics
from jaxkv.connector.protocols import BlockTables
from jaxkv.connector.request_state import Promise, RequestState
from jaxkv.connector.spans import BlockIds, ChunkSpan, block_ids, payload_blocks
from jaxkv.errors import RequestError
from jaxkv.hits import unread_blocks
from jaxkv.keys import BlockId, GroupId, JobId, KeyRuns
from jaxkv.offload.base import OffloadingManager, TransferJob

MAX_RETRY_S = 10.0
"""How long a request lets a backend answer RETRY; after that it computes what it could not look up."""


@final
class LoadPlanner:
    """Promises hits and loads them. A promise pins its chunks until it is dropped or its load has ended."""

    def __init__(
        self, caches: ChunkedCaches, manager: OffloadingManager, jobs: JobTable, metrics: Metrics
    ) -> None:
        self._caches = caches
        self._manager = manager
        self._jobs = jobs
        self._metrics = metrics
        self._promised: dict[str, RequestState] = {}
        self._unsent: dict[JobId, TransferJob] = {}
        self._loading: dict[JobId, KeyRuns] = {}
        self._cancelled: list[JobId] = []

    def find(self, state: RequestState, device_tokens: int) -> Hit | Deferral:
        """What the host can supply behind the device hit. The last known token is never promised."""
        started_s = time.perf_counter()
        found = self._find(state, device_tokens)
        self._metrics.looked_up(time.perf_counter() - started_s)
        if isinstance(found, Deferral):
            self._metrics.deferred(found)
            if state.deferred_since_s is None:
                state.deferred_since_s = time.monotonic()
            if found is Deferral.RETRY and state.retry_until_s is None:
                state.retry_until_s = time.monotonic() + MAX_RETRY_S
        else:
            self.end_wait(state)
        return found

    def _find(self, state: RequestState, device_tokens: int) -> Hit | Deferral:
        hashes = state.request.block_hashes
        known = min(state.request.num_tokens - 1, self._caches.hashed_tokens(hashes))
        limit = state.params.load_limit(device_tokens, known)
        if limit <= device_tokens:
            return Hit(device_tokens, device_tokens)
        question = Question(hashes, device_tokens, limit)
        gave_up = state.retry_until_s is not None and time.monotonic() > state.retry_until_s
        presence = HostPresence(self._caches, question, self._manager, state.ctx, takes_retry_as_miss=gave_up)
        found = find_hit(self._caches, question, presence)
        if isinstance(found, Hit) and self._is_being_loaded(found):
            return Deferral.LOADING
        return found

    def _is_being_loaded(self, hit: Hit) -> bool:
        return any(
            run.meets(span.keys)
            for loading in self._loading.values()
            for run in loading.runs
            for span in hit.spans
        )

    def end_wait(self, state: RequestState) -> None:
        """A request that was asked to wait need not any more."""
        if state.deferred_since_s is not None:
            self._metrics.waited(time.monotonic() - state.deferred_since_s)
            state.deferred_since_s = None

    # -- promises ---------------------------------------------------------------------------------------

    def promise(self, state: RequestState, hit: Hit) -> None:
        """Pin a hit until ``drop`` or ``start``."""
        state.promise = Promise(hit, self._manager.prepare_load(hit.keys, state.ctx))
        self._promised[state.ctx.req_id] = state

    def drop(self, state: RequestState) -> None:
        """Unpin what was promised and not loaded."""
        if state.promise is not None:
            del self._promised[state.ctx.req_id]
            self._manager.complete_load(state.promise.hit.keys, state.ctx)
            state.promise = None

    def drop_all(self) -> None:
        """Drop every promise; device hits that came with them are void as well."""
        for state in list(self._promised.values()):
            self.drop(state)
            state.device_hit_tokens = None

    # -- loads ------------------------------------------------------------------------------------------

    def start(self, state: RequestState, blocks: BlockTables, num_tokens: int) -> None:
        """Enter the job that loads what was promised into ``blocks``."""
        promise = state.promise
        promised = promise.hit.num_tokens if promise is not None else 0
        if promise is None or num_tokens != promised:
            raise RequestError(
                f"request {state.ctx.req_id!r} was promised {promised} tokens and was allocated for "
                f"{num_tokens}; pass what get_num_new_matched_tokens answered in this step, or 0"
            )
        hit, keys = promise.hit, promise.hit.keys
        targets: dict[GroupId, list[BlockIds]] = {}
        for span in hit.spans:
            targets.setdefault(span.group, []).append(self._targets(hit, span, blocks[span.group]))
        by_group = {group: np.concatenate(parts) for group, parts in targets.items()}
        transfer = self._jobs.start(JobKind.LOAD, state.ctx, keys, device_blocks(by_group), promise.spec)
        self._metrics.hit(hit.num_tokens, keys)
        self._unsent[transfer.job_id] = transfer
        self._loading[transfer.job_id] = keys
        del self._promised[state.ctx.req_id]
        state.load, state.promise = transfer.job_id, None

    def _targets(self, hit: Hit, span: ChunkSpan, table: Sequence[BlockId | None]) -> BlockIds:
        """Where chunks go: the request's blocks behind the device hit, -1 where no later token looks."""
        spec = self._caches.config.groups[span.group].spec
        blocks = self._caches.blocks(span.chunks)
        positions = np.arange(blocks.start, blocks.stop)
        payload, unread = payload_blocks(self._caches, span), unread_blocks(spec, hit.boundary_tokens)
        wanted = np.zeros(len(blocks), bool)
        wanted[payload.start - blocks.start : payload.stop - blocks.start : payload.step] = True
        wanted &= (positions + 1) * spec.block_size > hit.known_tokens
        wanted &= (positions < unread.start) | (positions >= unread.stop)
        ids = block_ids(self._caches, span, table)
        missing = positions[wanted & (ids < 0)]
        if len(missing):
            raise RequestError(
                f"group {span.group} has no block at position {missing[0]}, which a hit of "
                f"{hit.boundary_tokens} tokens is loaded into; allocate it first"
            )
        ids[~wanted] = -1
        return ids

    def take_unsent(self) -> tuple[TransferJob, ...]:
        """Loads that no worker has been given yet; from now on one has."""
        taken = tuple(self._unsent.values())
        self._unsent.clear()
        return taken

    def take_cancelled(self) -> tuple[JobId, ...]:
        """Loads that workers have and that nobody waits for any more."""
        taken = tuple(self._cancelled)
        self._cancelled.clear()
        return taken

    def cancel(self, state: RequestState) -> None:
        """Nobody waits for the request's load any more. One that no worker has been given is over at once."""
        if state.load is None:
            return
        if state.load in self._unsent:
            del self._unsent[state.load]
            self.end(self._jobs.cancel(state.load), success=True)
            state.load = None
        else:
            self._cancelled.append(state.load)

    def end(self, job: Job, *, success: bool) -> None:
        """A load is over."""
        del self._loading[job.transfer.job_id]
        self._manager.complete_load(job.keys, job.ctx, success=success)

    def leaks(self) -> list[str]:
        """What is still held, one sentence each."""
        return [
            *(f"request {req_id!r} was promised chunks" for req_id in self._promised),
            *(f"job {job_id} counts as loading" for job_id in self._loading),
        ]
