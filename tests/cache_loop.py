"""The serving loop of the cache machine: queues and blocks on the real block pools, without a model.

It does what ``jaxkv.serving.Scheduler`` does, and more: drafted tokens, copied blocks, emitted states,
admissions that are declined or end before their load was sent, steps that leave requests out or break off.
"""

from __future__ import annotations

from collections import Counter, deque
from random import Random

from cache_chunks import ChunkChooser
from cache_model import CacheModel
from cache_request import MachineRequest, Part
from cache_setup import MAX_TOKENS, Setup

from jaxkv.connector import KVConnectorOutput, OffloadingConnector, SchedulerOutput
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk

Handed = dict[str, list[tuple[int, int, int]]]


class MachineLoop:
    """Who waits, runs and loads. ``dying`` were aborted while a load into their blocks was under way.

    ``ended`` are requests that made a step and gave their blocks back since it was cleared, with the tokens
    they had computed. ``handed`` are states in blocks of their own that the last step left.
    """

    def __init__(
        self, setup: Setup, connector: OffloadingConnector, model: CacheModel, draw: Random, counts: Counter
    ) -> None:
        self.setup = setup
        self.connector = connector
        self.model = model
        self.draw = draw
        self.counts = counts
        self.cache = CacheManager(setup.config, MAX_TOKENS + setup.max_drafts)
        self.requests: dict[str, MachineRequest] = {}
        self.waiting: list[MachineRequest] = []
        self.running: list[MachineRequest] = []
        self.loading: dict[str, tuple[MachineRequest, int]] = {}
        self.dying: dict[str, MachineRequest] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.handed: Handed = {}
        self.ended: list[tuple[MachineRequest, int]] = []
        self.served: list[MachineRequest] = []
        self.events: deque[str] | None = None
        self._chooser = ChunkChooser(setup, self.cache, draw, counts)
        self._finished: set[str] = set()
        self._preempted: set[str] = set()

    @property
    def is_busy(self) -> bool:
        """Whether somebody wants tokens or blocks are kept, or the connector has not been told all."""
        return bool(
            self.waiting
            or self.running
            or self.loading
            or self.dying
            or self.handed
            or self._finished
            or self._preempted
            or self.connector.has_pending_push_work()
        )

    def log(self, *parts: object) -> None:
        """Remember what happened, where somebody wants to read it."""
        if self.events is not None:
            self.events.append(" ".join(map(str, parts)))

    # -- events -----------------------------------------------------------------------------------------

    def add(self, request: MachineRequest) -> None:
        """A request arrives."""
        self.requests[request.request_id] = request
        self.connector.on_new_request(request)
        self.waiting.append(request)
        self.counts["requests arrived"] += 1
        self.log(request, "arrives", request.wishes)

    def abort(self, request: MachineRequest) -> None:
        """End a request at whatever stage it is."""
        stage = self._leave_queues(request)
        if request.request_id in self._preempted:
            # The connector learns of both at once, and of no more than what is computed now.
            self.ended = [(other, computed) for other, computed in self.ended if other is not request]
        self.counts[f"aborted while {stage}"] += 1
        self.log(request, "is aborted while", stage)
        self._tell_end(request)

    def _leave_queues(self, request: MachineRequest) -> str:
        if request in self.waiting:
            self.waiting.remove(request)
            return "waiting"
        if request in self.running:
            self.running.remove(request)
            return "running"
        return "loading"

    def _tell_end(self, request: MachineRequest) -> None:
        tables = self.cache.all_tables(request)
        request.has_ended = True
        self._note_end(request)
        handed = self.handed.pop(request.request_id, [])
        if handed:
            self.counts["states handed over at the end"] += 1
            assert not self.connector.register_finished_partial_tail(request, tables, handed)
        keep, _ = self.connector.request_finished_all_groups(request, tables)
        self._finished.add(request.request_id)
        self._give_back(handed)
        loads = self.loading.pop(request.request_id, None)
        if keep:
            assert loads is not None, "only a load into a request's blocks may keep them"
            self.dying[request.request_id] = request
        else:
            self.cache.release(request)

    def _note_end(self, request: MachineRequest) -> None:
        """A request that made a step gives its blocks back, or goes on as if it had just been admitted."""
        if request.has_run:
            self.ended.append((request, request.num_computed_tokens))
        request.has_run = False

    def _give_back(self, handed: list[tuple[int, int, int]]) -> None:
        for group, block, _ in handed:
            self.cache.pools[group].release(block)

    def preempt(self, request: MachineRequest) -> None:
        """Take the blocks of a running request; it starts again from what can be found."""
        self.counts["preemptions"] += 1
        self.log(request, "is preempted")
        self.running.remove(request)
        self._note_end(request)
        self._restart(request)
        self._preempted.add(request.request_id)

    def _restart(self, request: MachineRequest) -> None:
        self.cache.release(request)
        request.num_computed_tokens = 0
        request.volatile = False
        self.waiting.insert(0, request)

    def break_off(self, parts: list[Part]) -> None:
        """The step that was planned is never computed: who runs starts again."""
        self.counts["steps that broke off"] += 1
        self.log("the step breaks off")
        for part in parts:
            self._give_back(part.emitted)
        for request in tuple(self.running):
            self.preempt(request)

    def copy_block(self, request: MachineRequest, group: int, index: int) -> bool:
        """Let a running request go on in a copy of one of its blocks; ``False`` where there is no room."""
        pool = self.cache.pools[group]
        row = self.cache.row(request, group)
        if row[index] < 0 or not pool.num_free:
            return False
        old, new = int(row[index]), pool.allocate()
        row[index] = new
        self.copies.append((group, old, new))
        pool.release(old)
        self._note_end(request)
        tables = self.cache.loaded_tables(request, request.num_computed_tokens)
        self.connector.update_state_after_alloc(request, tables, 0)
        self.counts["blocks copied on write"] += 1
        self.log(request, "goes on in a copy of block", old, "of group", group, "in block", new)
        return True

    # -- planning ---------------------------------------------------------------------------------------

    def schedule(self) -> tuple[list[Part], SchedulerOutput]:
        """Decide who computes what, and take the blocks."""
        handed, self.handed = self.handed, {}
        for states in handed.values():
            self._give_back(states)
        parts: list[Part] = []
        before = self.counts["preemptions"]
        if self._schedule_running(parts) and self.counts["preemptions"] == before:
            self._admit_waiting(parts)
        new_blocks = {}
        for part in parts:
            tables = self.cache.new_tables(part.request)
            if tables is not None:
                new_blocks[part.request.request_id] = tables
        output = SchedulerOutput(
            {part.request.request_id: part.end - part.start for part in parts},
            new_blocks,
            frozenset(self._finished),
            frozenset(self._preempted),
            handed,
        )
        self._finished.clear()
        self._preempted.clear()
        return parts, output

    def _schedule_running(self, parts: list[Part]) -> bool:
        nobody_waits = True
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if self.draw.random() < 0.03:
                self.counts["left out of a step"] += 1
                index += 1
                continue
            chunk = self._extend(request)
            if chunk is not None:
                parts.append(self._chooser.make_part(request, chunk))
            else:
                nobody_waits = False
                if not self._must_wait_for_load(request):
                    self.preempt(self.running[-1])
                    continue
            index += 1
        return nobody_waits

    def _must_wait_for_load(self, request: MachineRequest) -> bool:
        is_last = request is self.running[-1]
        return self.connector.has_pending_block_frees() or (is_last and bool(self.loading))

    def _extend(self, request: MachineRequest) -> Chunk | None:
        start = request.num_computed_tokens
        choices = self._chooser.choices(request, start, self._stops(request, start), self.setup.max_drafts)
        return next((chunk for chunk in choices if self.cache.extend(request, chunk)), None)

    def _stops(self, request: MachineRequest, start: int) -> tuple[int, ...]:
        return self.connector.get_snapshot_boundaries(request) if start < request.num_prompt_tokens else ()

    # -- admission --------------------------------------------------------------------------------------

    def _admit_waiting(self, parts: list[Part]) -> None:
        for request in tuple(self.waiting):
            if len(self.running) + len(self.loading) >= self.setup.max_seqs:
                return
            if not self._admit(request, parts) and self.draw.random() < 0.5:
                return

    def _admit(self, request: MachineRequest, parts: list[Part]) -> bool:
        device_hit = self.cache.find_hit(request)
        external, is_async = self.connector.get_num_new_matched_tokens(request, device_hit)
        if external is None:
            self.counts["admissions deferred"] += 1
            return False
        self._check_promise(request, device_hit, external, is_async)
        if external and self.draw.random() < 0.03:
            self.counts["promises declined"] += 1
            external = 0
        boundary = device_hit + external
        start = min(boundary, request.num_tokens - 1)
        for chunk in self._chooser.choices(request, start, self._stops(request, start)):
            if self.cache.admit(request, device_hit, boundary, chunk):
                break
        else:
            self.counts["admissions without room"] += 1
            self.counts["promises that found no room"] += external > 0
            return False
        self.counts["device hit tokens"] += device_hit
        self.log(request, "is admitted behind", device_hit, "device and", external, "host tokens")
        request.num_computed_tokens = device_hit
        self.connector.update_state_after_alloc(request, self.cache.all_tables(request), external)
        self.waiting.remove(request)
        if external:
            self._begin_load(request, external)
        else:
            request.num_computed_tokens = start
            self.running.append(request)
            parts.append(self._chooser.make_part(request, chunk))
        return True

    def _begin_load(self, request: MachineRequest, external: int) -> None:
        boundary = request.num_computed_tokens + external
        self.loading[request.request_id] = request, boundary
        self.counts["host hits"] += 1
        self.counts["host hits of tails"] += boundary % self.setup.alignment != 0
        self.counts["host hit tokens"] += external
        if self.draw.random() < 0.02:
            self.counts["aborted before the load was sent"] += 1
            self.log(request, "is aborted before its load was sent")
            self._tell_end(request)
            assert request.request_id not in self.dying, "nothing is under way yet"

    def _check_promise(self, request: MachineRequest, known: int, external: int, is_async: bool) -> None:
        """A promise can be kept, and is never less than what can be served.

        It may be more than ``longest_hit``: a boundary that is still being stored lets tails behind it count.
        """
        assert is_async == (external > 0)
        question = request.question(known)
        promised, most = known + external, self.model.longest_hit(question)
        assert promised in (known, most) or self.model.can_serve(question, promised), (
            f"{request} was promised {external} tokens behind {known}, which cannot be served"
        )
        assert promised >= most, (
            f"{request} was promised {external} tokens behind {known}, {most - known} can be served"
        )

    # -- the end of a step ------------------------------------------------------------------------------

    def update(self, parts: list[Part], results: KVConnectorOutput | None) -> None:
        """Take in a step that ran: computed tokens, ended transfers, finished requests.

        Without ``results`` the connector does not hear of it.
        """
        for part in parts:
            request = part.request
            request.generate(max(0, part.kept - request.num_tokens))
            self.cache.register(request, part.start)
            self.cache.register(request, part.kept)
            request.num_computed_tokens = part.kept
            request.has_run = True
            request.volatile = part.samples
            if part.emitted:
                self.handed[request.request_id] = part.emitted
        if self.setup.finishes_first:
            self._generate(parts)
            self._take_results(results)
        else:
            self._take_results(results)
            self._generate(parts)

    def _generate(self, parts: list[Part]) -> None:
        for part in parts:
            request = part.request
            if part.samples:
                request.generate(1)
                if request.is_complete:
                    self._finish(request)

    def _take_results(self, results: KVConnectorOutput | None) -> None:
        if results is None:
            return
        self.connector.update_connector_output(results)
        for request_id in results.failed_recving:
            self._load_failed(request_id)
        for request_id in results.finished_recving - results.failed_recving.keys():
            self._load_landed(request_id)

    def _finish(self, request: MachineRequest) -> None:
        self.running.remove(request)
        self._tell_end(request)
        assert request.request_id not in self.dying, "the blocks of a finished request are free at once"
        self.counts["requests served"] += 1
        self.served.append(request)
        self.log(request, "is finished")

    def _load_landed(self, request_id: str) -> None:
        if request_id in self.dying:
            self.cache.release(self.dying.pop(request_id))
            return
        request, boundary = self.loading.pop(request_id)
        self.cache.register(request, boundary)
        request.num_computed_tokens = boundary
        self.running.append(request)
        self.connector.update_state_after_alloc(request, self.cache.loaded_tables(request, boundary), 0)
        self.counts["loads landed"] += 1

    def _load_failed(self, request_id: str) -> None:
        self.counts["loads failed"] += 1
        if request_id in self.dying:
            self.cache.release(self.dying.pop(request_id))
            return
        request, _ = self.loading.pop(request_id)
        self.log(request, "lost its load")
        self._restart(request)
