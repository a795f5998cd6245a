"""The scheduler side of the connector: follows each request through its steps, from arrival to last store.

Value semantics are the fence. A store planned in ``build_connector_meta`` of step k+1 covers what was
complete at the end of step k, and is given the arrays as they are before any load or forward pass of step
k+1. Blocks that the loop freed, preempted, skipped behind a window, copied to or gave to another request
while it planned step k+1 still hold their old bytes in those arrays, so nothing has to be held back.

The cost of a step grows with the requests it schedules and with the chunks that became complete, not with the
length of contexts or the size of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from jaxkv.connector.base import KVConnectorOutput
from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.events import EventLog, KVCacheEvent
from jaxkv.connector.jobs import Job, JobKind, JobTable
from jaxkv.connector.loads import LoadPlanner
from jaxkv.connector.lookup import Deferral
from jaxkv.connector.metadata import OffloadingConnectorMetadata, OffloadingWorkerMetadata
from jaxkv.connector.metrics import ConnectorStats, Metrics
from jaxkv.connector.protocols import BlockTables, PartialTailOffload, Request, SchedulerOutput
from jaxkv.connector.request_params import RequestParams
from jaxkv.connector.request_state import RequestState, Tenure
from jaxkv.connector.retention import prompt_boundaries
from jaxkv.connector.store_queue import StoreQueue
from jaxkv.connector.stores import StorePlanner
from jaxkv.connector.tenures import StorePolicy, Tenures
from jaxkv.errors import RequestError
from jaxkv.keys import GroupId
from jaxkv.offload.base import JobResult, OffloadingManager, ReqContext, TransferJob


@final
class OffloadingScheduler:
    """Keeps one state per request and one table of jobs; asks the manager for everything else."""

    def __init__(
        self,
        caches: ChunkedCaches,
        manager: OffloadingManager,
        events: EventLog,
        policy: StorePolicy | None = None,
        *,
        num_workers: int = 1,
    ) -> None:
        self._caches = caches
        self._manager = manager
        self._events = events
        self._tenures = Tenures(caches, policy or StorePolicy())
        self._metrics = Metrics(caches)
        self._jobs = JobTable(num_workers)
        self._loads = LoadPlanner(caches, manager, self._jobs, self._metrics)
        planner = StorePlanner(caches, manager, self._jobs, self._metrics, events)
        self._to_store = StoreQueue(caches, planner, self._jobs)
        self._requests: dict[str, RequestState] = {}
        self._step: Mapping[str, int] = {}
        self._last_step: Mapping[str, int] = {}
        self._left_in_step: list[tuple[Tenure, int]] = []
        self._unconfirmed: list[Tenure] = []
        self._departed: list[ReqContext] = []
        self._admitted: set[str] = set()
        self._kept_blocks: set[str] = set()

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
        policy = params.policy(self._manager.on_new_request(ctx))
        self._requests[request.request_id] = RequestState(request, ctx, params, policy)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See ``KVConnectorBase``."""
        state = self._state_of(request)
        self._drop_promise(state)
        if state.tenure is not None:
            state.tenure.unconfirmed_tokens = 0  # That stay is over; what the request counts now is the next.
        if state.load is not None:
            self._metrics.deferred(Deferral.IN_FLIGHT)
            return None, False
        found = self._loads.find(state, num_computed_tokens)
        if isinstance(found, Deferral):
            return None, False
        state.device_hit_tokens = num_computed_tokens
        state.branch_tokens = found.branch_tokens
        if not found.num_tokens:
            return 0, False
        self._loads.promise(state, found)
        return found.num_tokens, True

    def update_state_after_alloc(
        self, request: Request, blocks: BlockTables, num_external_tokens: int
    ) -> None:
        """See ``KVConnectorBase``. ``num_external_tokens`` is what was promised, or 0 to decline it."""
        state = self._state_of(request)
        if num_external_tokens:
            self._loads.start(state, blocks, num_external_tokens)
        self._begin_tenure(state, blocks, num_external_tokens)

    def get_snapshot_boundaries(self, request: Request) -> tuple[int, ...]:
        """See ``KVConnectorBase``."""
        state = self._requests.get(request.request_id)
        branch = state.branch_tokens if state is not None else None
        return prompt_boundaries(self._caches, request.num_prompt_tokens, branch)

    def _begin_tenure(self, state: RequestState, blocks: BlockTables, num_external_tokens: int) -> None:
        if state.tenure is not None and state.tenure.running:
            self._retire(state.tenure)
            state.tenure = None
        self._admitted.add(state.ctx.req_id)
        if state.device_hit_tokens is not None and not state.params.skip_reading:
            self._metrics.queried(state.request.num_tokens - state.device_hit_tokens)
        state.tenure = self._tenures.begin(state, blocks, num_external_tokens)
        state.device_hit_tokens = state.retry_until_s = None

    # -- one step ---------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> OffloadingConnectorMetadata:
        """See ``KVConnectorBase``. Stores cover what was complete when the last step ended."""
        self._lose_step()
        self._confirm_step()
        self._end_preempted(scheduler_output)
        self._take_handed_states(scheduler_output)
        stores = self._to_store.plan_before_step(self._last_step)
        for ctx in self._departed:
            self._manager.on_request_finished(ctx)
        self._departed.clear()
        self._loads.drop_all()
        self._begin_step(scheduler_output)
        self._manager.on_schedule_end()
        return OffloadingConnectorMetadata(stores, self._loads.take_unsent(), self._loads.take_cancelled())

    def _begin_step(self, scheduler_output: SchedulerOutput) -> None:
        for req_id, new_blocks in scheduler_output.new_block_ids.items():
            state = self._requests.get(req_id)
            if state is not None and state.tenure is not None and new_blocks:
                state.tenure.add_blocks(new_blocks)
        self._step, self._last_step = scheduler_output.num_scheduled_tokens, {}

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """See ``KVConnectorBase``. It says that the step ran; without it a step is not stored."""
        self._end_step()
        if not isinstance(output.worker_meta, OffloadingWorkerMetadata):
            return
        for result in output.worker_meta.results:
            ended = self._jobs.report(result)
            if ended is not None:
                self._end_job(*ended)

    def _end_step(self) -> None:
        for req_id, num_tokens in self._step.items():
            state = self._requests.get(req_id)
            tenure = state.tenure if state is not None else None
            if tenure is None:
                continue
            if tenure.end_step(num_tokens):
                self._to_store.add(tenure)
            if tenure.unconfirmed_tokens:
                self._unconfirmed.append(tenure)
        for tenure, num_tokens in self._left_in_step:
            tenure.end_step(num_tokens)
            self._to_store.add(tenure)
        if self._step:
            self._step, self._last_step = {}, self._step
        self._left_in_step = []

    def _lose_step(self) -> None:
        """A step that is still open broke off, or ran and was not reported."""
        if not self._step:
            return
        for req_id in self._step.keys() & self._requests.keys() - self._admitted:
            tenure = self._requests[req_id].tenure
            if tenure is not None:
                tenure.lose_step(self._step[req_id])
        for tenure, num_tokens in self._left_in_step:
            tenure.lose_step(num_tokens)
        self._step, self._last_step, self._left_in_step = {}, self._step, []

    def _confirm_step(self) -> None:
        """A loop may say what was computed before ``update_connector_output`` or, at the latest, by now."""
        for tenure in self._unconfirmed:
            if tenure.confirm():
                self._to_store.add(tenure)
        self._unconfirmed.clear()

    def has_pending_push_work(self) -> bool:
        """See ``KVConnectorBase``: requests that ended since the last step was planned, or jobs under way."""
        return bool(self._departed or len(self._jobs) or self._manager.has_pending_work())

    def has_pending_block_frees(self) -> bool:
        """See ``KVConnectorBase``: an aborted request frees its blocks when its load has landed."""
        return bool(self._kept_blocks)

    def _take_handed_states(self, scheduler_output: SchedulerOutput) -> None:
        """States belong to the stay that ran in the last step, which may have ended since."""
        handed = scheduler_output.boundary_state_offloads
        if not handed:
            return
        stays = {req_id: state.tenure for req_id in handed if (state := self._requests.get(req_id))}
        stays |= {tenure.ctx.req_id: tenure for tenure in self._to_store if tenure.has_ended}
        for req_id, offloads in handed.items():
            tenure = stays.get(req_id)
            if tenure is not None and tenure.running:
                self._hand_over(tenure, offloads)

    def _hand_over(self, tenure: Tenure, offloads: Sequence[PartialTailOffload]) -> None:
        """States at boundaries that the tables do not show.

        One inside a chunk asks for a tail there, unless one is to be stored that reaches further.
        """
        for group, block, boundary in offloads:
            if not (0 <= group < self._caches.num_groups and self._caches.is_state(group)):
                raise RequestError(
                    f"a state of request {tenure.ctx.req_id!r} was handed over for group {group}, which "
                    "keeps no recurrent states"
                )
            if boundary <= 0 or boundary % self._caches.tokens_per_hash:
                raise RequestError(
                    f"a state of request {tenure.ctx.req_id!r} was handed over at {boundary} tokens; "
                    f"boundaries are multiples of {self._caches.tokens_per_hash}"
                )
            tenure.handed_states[group, boundary] = block
            is_wanted = tenure.limit_tokens is None or boundary <= tenure.limit_tokens
            if is_wanted and boundary % self._caches.tokens_per_chunk(group):
                self._tenures.ask_for_tail(tenure, boundary)
            self._to_store.add(tenure)

    def plan_following(self) -> tuple[TransferJob, ...]:
        """Plan the stores that ``build_connector_meta`` left for later: the step runs and leaves them alone.

        Those that nobody asks for are in the next metadata.
        """
        return self._to_store.plan_behind_step()

    def _end_job(self, job: Job, result: JobResult) -> None:
        success = result.error is None
        self._metrics.job_ended(job, result)
        self._to_store.offer_again()
        if job.kind is JobKind.STORE:
            self._manager.complete_store(job.keys, job.ctx, success=success)
            self._events.store_ended(result.job_id, success=success)
            return
        self._loads.end(job, success=success or result.cancelled)
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
        self._loads.cancel(state)
        if state.tenure is not None:
            state.tenure.complete_tokens = min(state.tenure.complete_tokens, request.num_computed_tokens)
        self._end_tenure(state)
        self._loads.end_wait(state)
        state.finished = True
        if state.load is None:
            self._forget(state)
            return False
        self._kept_blocks.add(request.request_id)
        return True

    def register_finished_partial_tail(
        self, request: Request, partial_tail_offloads: Sequence[PartialTailOffload]
    ) -> None:
        """See ``KVConnectorBase``. To be called before ``request_finished``."""
        state = self._requests.get(request.request_id)
        if state is not None and state.tenure is not None:
            self._hand_over(state.tenure, partial_tail_offloads)

    def _end_tenure(self, state: RequestState) -> None:
        if state.tenure is not None:
            self._retire(state.tenure)
        state.tenure = None

    def _retire(self, tenure: Tenure) -> None:
        """Its last chunks are planned with the next step, those of a step that is running included."""
        tenure.confirm()
        tenure.has_ended = True
        num_tokens = self._step.get(tenure.ctx.req_id)
        if num_tokens is not None:
            self._left_in_step.append((tenure, num_tokens))
        if tenure.running:
            self._to_store.add(tenure)

    def _end_preempted(self, scheduler_output: SchedulerOutput) -> None:
        """Who was preempted and has been admitted again since goes on with the new stay."""
        for req_id in scheduler_output.preempted_req_ids - self._admitted:
            if req_id in self._requests:
                self._end_tenure(self._requests[req_id])
        self._admitted.clear()

    def _forget(self, state: RequestState) -> None:
        del self._requests[state.ctx.req_id]
        self._kept_blocks.discard(state.ctx.req_id)
        self._departed.append(state.ctx)

    def _drop_promise(self, state: RequestState) -> None:
        self._loads.drop(state)
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
        return tuple(self._events.take(self._manager))

    def get_stats(self) -> ConnectorStats:
        """See ``KVConnectorBase``."""
        return self._metrics.snapshot(self._manager.get_stats())

    def reset_cache(self) -> None:
        """Forget every chunk, and never store what is on the device now or what a running step computes.

        Loads under way still land.
        """
        for state in self._requests.values():
            self._drop_promise(state)
            if state.tenure is not None:
                self._tenures.skip(state.tenure, self._step.get(state.ctx.req_id, 0))
        for tenure, num_tokens in self._left_in_step:
            self._tenures.skip(tenure, num_tokens)
        self._to_store.clear()
        self._events.reset(self._manager)

    def leaks(self) -> list[str]:
        """What is still held though nothing runs, one sentence each; empty when all is well."""
        return [
            *(f"job {job.transfer.job_id} ({job.kind.name}) has not been reported" for job in self._jobs),
            *(f"request {req_id!r} has not finished" for req_id in self._requests),
            *(f"request {tenure.ctx.req_id!r} has chunks that were not planned" for tenure in self._to_store),
            *self._loads.leaks(),
            *self._manager.leaks(),
        ]

    def shutdown(self) -> None:
        """Forget all requests. Jobs that are still in the table never reached a worker."""
        for job in list(self._jobs):
            never_sent = JobResult(job.transfer.job_id, 0, 0.0, "the connector was shut down")
            self._end_job(self._jobs.cancel(job.transfer.job_id), never_sent)
        self._loads.drop_all()
        self._loads.take_unsent()
        self._requests.clear()
        self._to_store.clear()
        self._step, self._left_in_step = {}, []
        self._departed.clear()
        self._unconfirmed.clear()
        self._admitted.clear()
        self._kept_blocks.clear()
        self._manager.shutdown()
