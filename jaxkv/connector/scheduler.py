"""The scheduler side of the connector: what to load, what to store, and when.

Value semantics are the fence. A store planned in ``build_connector_meta`` of step k+1 covers what was
complete at the end of step k, and is given the arrays as they are before any load or forward pass of step
k+1. Blocks that the loop freed, preempted, skipped behind a window or gave to another request while it
planned step k+1 still hold their old bytes in those arrays, so nothing has to be held back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import final

from jaxkv.connector.base import KVConnectorOutput
from jaxkv.connector.chunks import ChunkedCaches, ChunkId
from jaxkv.connector.events import EventLog, KVCacheEvent
from jaxkv.connector.jobs import Job, JobKind, JobTable, device_blocks
from jaxkv.connector.lookup import Deferral, Hit, find_hit
from jaxkv.connector.metadata import OffloadingConnectorMetadata, OffloadingWorkerMetadata
from jaxkv.connector.metrics import ConnectorStats, Metrics
from jaxkv.connector.protocols import BlockTables, Request, SchedulerOutput
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.request_state import Promise, RequestState, Tenure
from jaxkv.connector.stores import StorePlanner
from jaxkv.errors import RequestError
from jaxkv.hits import unread_blocks
from jaxkv.keys import BlockId, GroupId, JobId, OffloadKey
from jaxkv.offload.base import JobResult, LookupResult, OffloadingManager, ReqContext, TransferJob

MAX_RETRY_S = 10.0
"""How long a request lets a backend answer RETRY; after that it computes what it could not look up."""


@final
class OffloadingScheduler:
    """Keeps one state per request and one table of jobs; asks the manager for everything else."""

    def __init__(
        self,
        caches: ChunkedCaches,
        manager: OffloadingManager,
        events: EventLog,
        *,
        offload_prompt_only: bool,
    ) -> None:
        self._caches = caches
        self._manager = manager
        self._events = events
        self._metrics = Metrics(caches)
        self._jobs = JobTable()
        self._stores = StorePlanner(
            caches, manager, self._jobs, self._metrics, offload_prompt_only=offload_prompt_only
        )
        self._requests: dict[str, RequestState] = {}
        self._unsent_loads: dict[JobId, TransferJob] = {}
        self._loading_keys: set[OffloadKey] = set()
        self._retired: list[Tenure] = []
        self._departed: list[ReqContext] = []

    # -- admission --------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """See ``KVConnectorBase``."""
        if request.request_id in self._requests:
            raise RequestError(
                f"request {request.request_id!r} is known already; ids must be unique among requests that "
                "have not finished, or whose load has not landed"
            )
        params = RequestParams.of(request)
        ctx = params.context(request.request_id)
        self._requests[request.request_id] = RequestState(request, ctx, params)
        self._manager.on_new_request(ctx)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See ``KVConnectorBase``. The last known token is never promised: its logits are still needed."""
        state = self._state_of(request)
        self._drop_promise(state)
        if state.load is not None:
            self._metrics.deferred(Deferral.IN_FLIGHT)
            return None, False
        found = find_hit(
            self._caches,
            request.block_hashes,
            num_computed_tokens,
            state.params.load_limit(num_computed_tokens, request.num_tokens - 1),
            self._lookup(state),
        )
        if isinstance(found, Hit) and not self._loading_keys.isdisjoint(found.keys):
            found = Deferral.LOADING
        if isinstance(found, Deferral):
            if found is Deferral.RETRY and state.retry_until_s is None:
                state.retry_until_s = time.monotonic() + MAX_RETRY_S
            self._metrics.deferred(found)
            return None, False
        state.device_hit_tokens = num_computed_tokens
        if not found.keys:
            return 0, False
        state.promise = Promise(found, self._manager.prepare_load(found.keys, state.ctx))
        return found.boundary_tokens - found.known_tokens, True

    def _lookup(self, state: RequestState) -> Callable[[OffloadKey], LookupResult]:
        gave_up = state.retry_until_s is not None and time.monotonic() > state.retry_until_s

        def lookup(key: OffloadKey) -> LookupResult:
            answer = self._manager.lookup(key, state.ctx)
            return LookupResult.MISS if gave_up and answer is LookupResult.RETRY else answer

        return lookup

    def update_state_after_alloc(
        self, request: Request, blocks: BlockTables, num_external_tokens: int
    ) -> None:
        """See ``KVConnectorBase``. ``num_external_tokens`` is what was promised, or 0 to decline it."""
        state = self._state_of(request)
        if num_external_tokens:
            self._start_load(state, blocks, num_external_tokens)
        self._begin_tenure(state, blocks, num_external_tokens)

    def _start_load(self, state: RequestState, blocks: BlockTables, num_tokens: int) -> None:
        promise = state.promise
        promised = promise.hit.boundary_tokens - promise.hit.known_tokens if promise is not None else 0
        if promise is None or num_tokens != promised:
            raise RequestError(
                f"request {state.ctx.req_id!r} was promised {promised} tokens and was allocated for "
                f"{num_tokens}; pass what get_num_new_matched_tokens answered in this step, or 0"
            )
        unread = [
            unread_blocks(group.spec, promise.hit.boundary_tokens) for group in self._caches.config.groups
        ]
        targets = [
            (chunk, self._load_targets(promise.hit, chunk, blocks[chunk.group], unread[chunk.group]))
            for chunk in promise.hit.chunks
        ]
        transfer = self._jobs.start(
            JobKind.LOAD, state.ctx, promise.hit.keys, device_blocks(targets), promise.spec
        )
        self._metrics.hit(promised, promise.hit.keys)
        self._unsent_loads[transfer.job_id] = transfer
        self._loading_keys.update(promise.hit.keys)
        state.load, state.promise = transfer.job_id, None

    def _load_targets(
        self, hit: Hit, chunk: ChunkId, table: Sequence[BlockId | None], unread: range
    ) -> tuple[int, ...]:
        """Where a chunk goes: the request's blocks behind the device hit, -1 where no later token looks."""
        block_size = self._caches.config.groups[chunk.group].block_size
        payload = self._caches.payload_blocks(chunk)
        targets: list[int] = []
        for position in self._caches.blocks(chunk):
            block = table[position] if position < len(table) else None
            on_device = (position + 1) * block_size <= hit.known_tokens
            if on_device or position not in payload or position in unread:
                targets.append(-1)
            elif block is None:
                raise RequestError(
                    f"group {chunk.group} has no block at position {position}, which a hit of "
                    f"{hit.boundary_tokens} tokens is loaded into; allocate it first"
                )
            else:
                targets.append(block)
        return tuple(targets)

    def _begin_tenure(self, state: RequestState, blocks: BlockTables, num_external_tokens: int) -> None:
        tenure = state.tenure
        if tenure is not None and tenure.running:
            self._retired.append(tenure)
            tenure = None
        if state.device_hit_tokens is not None:
            start = state.device_hit_tokens + num_external_tokens
        else:
            start = tenure.complete_tokens if tenure is not None else state.request.num_computed_tokens
        state.device_hit_tokens = None
        # A loop may find all tokens on the device; it computes the last one again, for its logits.
        start = min(start, state.request.num_tokens - 1)
        tables = [list(table) for table in blocks]
        state.retry_until_s = None
        state.tenure = Tenure(
            state.request, state.ctx, state.params, tables, start, start, next_chunk=[0] * len(tables)
        )

    # -- one step ---------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> OffloadingConnectorMetadata:
        """See ``KVConnectorBase``. Stores cover what was complete when the last step ended."""
        for req_id in scheduler_output.preempted_req_ids:
            self._end_preempted(self._requests.get(req_id))
        stores = self._plan_stores()
        for ctx in self._departed:
            self._manager.on_request_finished(ctx)
        self._departed.clear()
        for req_id, state in self._requests.items():
            self._drop_promise(state)
            if state.tenure is not None:
                new_blocks = scheduler_output.new_block_ids.get(req_id, ())
                state.tenure.begin_step(new_blocks, scheduler_output.num_scheduled_tokens.get(req_id, 0))
        loads = tuple(self._unsent_loads.values())
        self._unsent_loads.clear()
        return OffloadingConnectorMetadata(stores, loads)

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """See ``KVConnectorBase``. It says that the step ran; without it a step is not stored."""
        for state in self._requests.values():
            if state.tenure is not None:
                state.tenure.end_step()
        if not isinstance(output.worker_meta, OffloadingWorkerMetadata):
            return
        for result in output.worker_meta.results:
            ended = self._jobs.report(result)
            if ended is not None:
                self._end_job(*ended)

    def has_pending_push_work(self) -> bool:
        """See ``KVConnectorBase``: last chunks to plan, or jobs that have not been reported."""
        return bool(self._retired or self._departed or len(self._jobs))

    def has_pending_block_frees(self) -> bool:
        """See ``KVConnectorBase``: an aborted request frees its blocks when its load has landed."""
        return any(state.finished for state in self._requests.values())

    def _plan_stores(self) -> tuple[TransferJob, ...]:
        running = [state.tenure for state in self._requests.values() if state.tenure is not None]
        jobs = [
            *(self._stores.plan(tenure, tenure.complete_tokens) for tenure in self._retired),
            *(self._stores.plan(tenure, tenure.request.num_computed_tokens) for tenure in running),
        ]
        self._retired.clear()
        return tuple(job for job in jobs if job is not None)

    def _end_job(self, job: Job, result: JobResult) -> None:
        success = result.error is None
        self._metrics.job_ended(job, result)
        if job.kind is JobKind.STORE:
            self._manager.complete_store(job.keys, job.ctx, success=success)
            return
        self._loading_keys.difference_update(job.keys)
        self._manager.complete_load(job.keys, job.ctx, success=success)
        state = self._requests[job.ctx.req_id]
        state.load = None
        if not success:
            state.tenure = None
        if state.finished:
            self._forget(state)

    # -- the end of a request ---------------------------------------------------------------------------

    def request_finished(self, request: Request) -> bool:
        """Whether the loop must keep the request's blocks until ``finished_recving`` names it."""
        state = self._requests.get(request.request_id)
        if state is None:
            return False
        self._drop_promise(state)
        if state.load in self._unsent_loads:
            self._cancel_load(state)
        if state.tenure is not None:
            state.tenure.complete_tokens = min(state.tenure.complete_tokens, request.num_computed_tokens)
        self._end_tenure(state)
        state.finished = True
        if state.load is None:
            self._forget(state)
        return state.load is not None

    def _end_tenure(self, state: RequestState) -> None:
        if state.tenure is not None and state.tenure.running:
            self._retired.append(state.tenure)
        state.tenure = None

    def _end_preempted(self, state: RequestState | None) -> None:
        """A preempted request may have been admitted again since: then the new stay goes on."""
        if state is None or any(tenure.request is state.request for tenure in self._retired):
            return
        self._end_tenure(state)

    def _forget(self, state: RequestState) -> None:
        del self._requests[state.ctx.req_id]
        self._departed.append(state.ctx)

    def _cancel_load(self, state: RequestState) -> None:
        assert state.load is not None
        del self._unsent_loads[state.load]
        job = self._jobs.cancel(state.load)
        self._loading_keys.difference_update(job.keys)
        self._manager.complete_load(job.keys, job.ctx)
        state.load = None

    def _drop_promise(self, state: RequestState) -> None:
        if state.promise is not None:
            self._manager.complete_load(state.promise.hit.keys, state.ctx)
        state.promise = None
        state.device_hit_tokens = None

    def _state_of(self, request: Request) -> RequestState:
        if request.request_id not in self._requests:
            self.on_new_request(request)
        return self._requests[request.request_id]

    # -- everything else --------------------------------------------------------------------------------

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[GroupId, ...]:
        """See ``KVConnectorBase``."""
        state = self._requests.get(request.request_id)
        if state is None or state.load is None:
            return ()
        return tuple(blocks.group for blocks in self._jobs[state.load].transfer.blocks)

    def take_events(self) -> Sequence[KVCacheEvent]:
        """See ``KVConnectorBase``."""
        return self._events.take(self._manager)

    def get_stats(self) -> ConnectorStats:
        """See ``KVConnectorBase``."""
        return self._metrics.snapshot(self._manager.get_stats())

    def reset_cache(self) -> None:
        """Forget every chunk, and never store what was computed before now. Loads under way still land."""
        for state in self._requests.values():
            self._drop_promise(state)
            if state.tenure is not None:
                state.tenure.skip_to_present(self._caches)
        self._retired.clear()
        self._events.reset(self._manager)

    def leaks(self) -> list[str]:
        """What is still held though nothing runs, one sentence each; empty when all is well."""
        return [
            *(f"job {job.transfer.job_id} ({job.kind.name}) has not been reported" for job in self._jobs),
            *(f"request {req_id!r} has not finished" for req_id in self._requests),
            *(f"request {tenure.ctx.req_id!r} has chunks that were not planned" for tenure in self._retired),
            *(f"chunk {key.hex()} counts as being loaded" for key in self._loading_keys),
            *self._manager.leaks(),
        ]

    def shutdown(self) -> None:
        """Forget all requests. Jobs that are still in the table never reached a worker."""
        for job in list(self._jobs):
            never_sent = JobResult(job.transfer.job_id, 0, 0.0, "the connector was shut down")
            self._end_job(self._jobs.cancel(job.transfer.job_id), never_sent)
        for state in self._requests.values():
            self._drop_promise(state)
        self._requests.clear()
        self._unsent_loads.clear()
        self._retired.clear()
        self._departed.clear()
        self._manager.shutdown()
