"""Which requests run in the next step and on which blocks. Owns the queues; touches no device array.

The scheduler speaks to the connector's scheduler side only. A request is in ``_requests`` from ``add`` until
its last block is given back; the queues hold references to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import final

from jaxkv.connector.base import KVConnectorBase, KVConnectorMetadata, KVConnectorOutput
from jaxkv.connector.protocols import BlockTables, SchedulerOutput
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk, ChunkRules, chunk_choices
from jaxkv.serving.request import Request, RequestStatus


@final
@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One request's part of a step. A chunk that reaches the last known token yields the next one."""

    request: Request
    chunk: Chunk
    samples: bool


@final
@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, and what it asks of the connector's worker side."""

    prefills: tuple[ScheduledChunk, ...]
    decodes: tuple[ScheduledChunk, ...]
    output: SchedulerOutput
    metadata: KVConnectorMetadata

    @property
    def chunks(self) -> tuple[ScheduledChunk, ...]:
        """All parts of the step."""
        return self.prefills + self.decodes


@final
@dataclass(slots=True)
class _Loading:
    """A request that waits for a load: what it will hold, and whether the caches were replaced meanwhile."""

    request: Request
    boundary: int
    caches_lost: bool = False


class _Admission(Enum):
    ADMITTED = auto()
    LATER = auto()
    NO_ROOM = auto()


@final
class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute.

    At most ``max_num_seqs`` requests hold blocks, and a step computes at most ``prefill_budget`` tokens of
    prompts. ``step`` of the engine is ``schedule``, the device's work, then ``update``; between the
    two only ``restart_all`` may be called.
    """

    def __init__(
        self,
        cache: CacheManager,
        rules: ChunkRules,
        connector: KVConnectorBase,
        *,
        max_num_seqs: int,
        prefill_budget: int,
    ) -> None:
        self.cache = cache
        self.num_preemptions = 0
        self._rules = rules
        self._connector = connector
        self._max_num_seqs = max_num_seqs
        self._prefill_budget = prefill_budget
        self._requests: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._loading: dict[str, _Loading] = {}
        self._ending: deque[Request] = deque()
        self._finished_ids: set[str] = set()
        self._preempted_ids: set[str] = set()

    # -- requests ---------------------------------------------------------------------------------------

    def __contains__(self, request_id: str) -> bool:
        """Whether this id is in use: not finished, or finished with blocks that a transfer still touches."""
        return request_id in self._requests

    @property
    def has_unfinished(self) -> bool:
        """Whether a request still wants tokens."""
        return any(not _is_over(request) for request in self._requests.values())

    @property
    def has_loose_ends(self) -> bool:
        """Whether empty steps are needed: something to tell the connector, or transfers under way."""
        untold = bool(self._finished_ids or self._preempted_ids)
        kept = any(_is_over(request) for request in self._requests.values())
        return untold or kept or self._connector.has_pending_push_work()

    @property
    def unfinished_ids(self) -> tuple[str, ...]:
        """Ids of requests that still want tokens, oldest first."""
        return tuple(key for key, request in self._requests.items() if not _is_over(request))

    def add(self, request: Request) -> None:
        """Queue a new request."""
        self._connector.on_new_request(request)
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def finish(self, request_id: str, status: RequestStatus) -> Request | None:
        """End a request at whatever stage it is; ``None`` if no unfinished request has this id.

        Its blocks are free at once, unless the connector asks to keep them until a load into them has ended.
        If the connector raises, the request is over all the same, and the next step tells it again.
        """
        request = self._requests.get(request_id)
        if request is None or _is_over(request):
            return None
        request.status = status
        self._ending.append(request)
        if request in self._waiting:
            self._waiting.remove(request)
        if request in self._running:
            self._running.remove(request)
        self._announce_ends()
        return request

    def _announce_ends(self) -> None:
        """Tell the connector who is over, and give their blocks back."""
        while self._ending:
            request = self._ending[0]
            keep, _ = self._connector.request_finished_all_groups(request, self.cache.all_tables(request))
            self._finished_ids.add(request.request_id)
            if not keep:
                self._loading.pop(request.request_id, None)
                self._drop(request)
            self._ending.popleft()

    # -- one step ---------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step, take its blocks, and close the connector's planning."""
        self._announce_ends()
        budget = self._prefill_budget
        chunks: list[ScheduledChunk] = []
        nobody_waits = self._schedule_running(chunks)
        budget -= _prefill_tokens(chunks)
        if nobody_waits and not self._preempted_ids:
            self._admit_waiting(chunks, budget)
        output = SchedulerOutput(
            num_scheduled_tokens={part.request.request_id: part.chunk.num_new for part in chunks},
            new_block_ids=self._new_block_ids(chunks),
            finished_req_ids=frozenset(self._finished_ids),
            preempted_req_ids=frozenset(self._preempted_ids),
        )
        metadata = self._connector.build_connector_meta(output)
        self._finished_ids.clear()
        self._preempted_ids.clear()
        return StepPlan(
            prefills=tuple(part for part in chunks if part.chunk.shape > 1),
            decodes=tuple(part for part in chunks if part.chunk.shape == 1),
            output=output,
            metadata=metadata,
        )

    def update(self, plan: StepPlan, results: KVConnectorOutput) -> list[ScheduledChunk]:
        """Take in a step that ran: computed tokens, ended transfers. Answers the parts that yield a token.

        A request whose load failed has computed nothing of worth; it goes back to the queue instead.
        """
        valid = [part for part in plan.chunks if part.request.request_id not in results.failed_recving]
        for part in valid:
            self.cache.register(part.request, part.chunk.start)
            self.cache.register(part.request, part.chunk.end)
            part.request.num_computed_tokens = part.chunk.end
        self.take_results(results)
        return [part for part in valid if part.samples]

    def take_results(self, results: KVConnectorOutput) -> None:
        """Take in ended transfers. To be called again with the same ``results`` if it breaks off."""
        self._connector.update_connector_output(results)
        for request_id in results.failed_recving:
            self._load_failed(request_id)
        for request_id in results.finished_recving:
            if request_id not in results.failed_recving:
                self._load_landed(request_id)
        for request_id in results.finished_sending:
            self._drop_if_over(request_id)

    def restart_all(self, *, caches_lost: bool) -> None:
        """After a step that broke off: every request that holds blocks starts over, in its old order.

        Blocks that a load still writes to are kept until it ended. With ``caches_lost`` cached prefixes are
        forgotten, and what loads bring is not used.
        """
        for loading in self._loading.values():
            loading.caches_lost = loading.caches_lost or caches_lost
        restarted = [request for request in self._requests.values() if self.cache.holds(request)]
        for request in restarted:
            if request.request_id not in self._loading and not _is_over(request):
                self._preempt(request)
        self._running = []
        self._waiting = deque(
            request
            for request in self._requests.values()
            if not _is_over(request) and request.request_id not in self._loading
        )
        if caches_lost:
            self.cache.clear_cache()

    # -- running requests -------------------------------------------------------------------------------

    def _schedule_running(self, chunks: list[ScheduledChunk]) -> bool:
        """Schedule who is running, eldest first; whether none of them was left waiting for blocks."""
        nobody_waits = True
        budget = self._prefill_budget
        index = 0
        while index < len(self._running):
            request = self._running[index]
            choices = self._choices(request, budget)
            chunk = next((choice for choice in choices if self.cache.extend(request, choice)), None)
            if chunk is not None:
                chunks.append(_scheduled(request, chunk))
                budget -= _prefill_tokens(chunks[-1:])
            elif choices:
                nobody_waits = False
                if not self._must_wait_for_load(request):
                    # Whoever was admitted last gives way; all behind ``index`` are unscheduled.
                    self._preempt(self._running[-1])
                    continue
            index += 1
        return nobody_waits

    def _must_wait_for_load(self, request: Request) -> bool:
        """Whether a load will free blocks, or its request can give way once it has landed.

        Giving way itself would not help ``request``: two requests could go on loading in each other's place.
        """
        is_last = request is self._running[-1]
        return self._connector.has_pending_block_frees() or (is_last and bool(self._loading))

    def _preempt(self, request: Request) -> None:
        self._preempted_ids.add(request.request_id)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        if request in self._running:
            self._running.remove(request)
        self._waiting.appendleft(request)
        self.num_preemptions += 1
        self.cache.release(request)  # Last: while it holds blocks, ``restart_all`` finds it.

    def _choices(self, request: Request, budget: int) -> Sequence[Chunk]:
        return self._chunks_from(request, request.num_computed_tokens, budget)

    def _chunks_from(self, request: Request, start: int, budget: int) -> Sequence[Chunk]:
        stops = self._connector.get_snapshot_boundaries(request) if start < request.num_prompt_tokens else ()
        return list(chunk_choices(self._rules, start, request.num_tokens, budget, stops))

    # -- admission --------------------------------------------------------------------------------------

    def _admit_waiting(self, chunks: list[ScheduledChunk], budget: int) -> None:
        for request in tuple(self._waiting):
            seats = self._max_num_seqs - len(self._running) - len(self._loading)
            if seats <= 0 or budget < self._rules.shapes[0]:
                return
            admitted_before = len(chunks)
            if self._admit(request, chunks, budget) is _Admission.NO_ROOM:
                return
            budget -= _prefill_tokens(chunks[admitted_before:])

    def _admit(self, request: Request, chunks: list[ScheduledChunk], budget: int) -> _Admission:
        device_hit = self.cache.find_hit(request)
        external, is_async = self._connector.get_num_new_matched_tokens(request, device_hit)
        if external is None:
            return _Admission.LATER
        boundary = device_hit + external
        start = min(boundary, request.num_tokens - 1)
        choices = self._chunks_from(request, start, budget)
        chunk = next((c for c in choices if self.cache.admit(request, device_hit, boundary, c)), None)
        if chunk is None:
            return _Admission.NO_ROOM
        request.num_computed_tokens = device_hit
        self._connector.update_state_after_alloc(request, self.cache.all_tables(request), external)
        self._waiting.remove(request)
        request.note_hit(device_hit, start - device_hit)
        if external and is_async:
            request.status = RequestStatus.LOADING
            self._loading[request.request_id] = _Loading(request, start)
            return _Admission.ADMITTED
        request.num_computed_tokens = start
        request.status = RequestStatus.RUNNING
        self._running.append(request)
        chunks.append(_scheduled(request, chunk))
        return _Admission.ADMITTED

    # -- transfers --------------------------------------------------------------------------------------

    def _load_landed(self, request_id: str) -> None:
        loading = self._loading.get(request_id)
        if loading is not None and loading.caches_lost:
            self._load_failed(request_id)
            return
        self._loading.pop(request_id, None)
        if self._drop_if_over(request_id) or loading is None:
            return
        request = loading.request
        self.cache.register(request, loading.boundary)
        request.num_computed_tokens = loading.boundary
        request.status = RequestStatus.RUNNING
        self._running.append(request)
        tables = self.cache.loaded_tables(request, loading.boundary)
        self._connector.update_state_after_alloc(request, tables, 0)

    def _load_failed(self, request_id: str) -> None:
        """Give the blocks back and queue the request as one that was never admitted."""
        self._loading.pop(request_id, None)
        if self._drop_if_over(request_id):
            return
        request = self._requests[request_id]
        if request in self._waiting:
            return
        self.cache.release(request)
        request.num_computed_tokens = 0
        request.forget_hit()
        request.status = RequestStatus.WAITING
        if request in self._running:
            self._running.remove(request)
        self._waiting.appendleft(request)

    def _drop_if_over(self, request_id: str) -> bool:
        request = self._requests.get(request_id)
        if request is None:
            return True
        if _is_over(request):
            self._drop(request)
            return True
        return False

    def _drop(self, request: Request) -> None:
        self.cache.release(request)
        self._requests.pop(request.request_id, None)

    def _new_block_ids(self, chunks: Sequence[ScheduledChunk]) -> Mapping[str, BlockTables]:
        new = {part.request.request_id: self.cache.new_tables(part.request) for part in chunks}
        return {request_id: tables for request_id, tables in new.items() if tables is not None}


def _is_over(request: Request) -> bool:
    return request.status in {RequestStatus.FINISHED, RequestStatus.ABORTED}


def _scheduled(request: Request, chunk: Chunk) -> ScheduledChunk:
    return ScheduledChunk(request, chunk, samples=chunk.end == request.num_tokens)


def _prefill_tokens(chunks: Sequence[ScheduledChunk]) -> int:
    return sum(part.chunk.shape for part in chunks if part.chunk.shape > 1)
