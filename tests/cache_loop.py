"""The serving loop of the cache machine: queues, blocks and chunks on the real block pools, without a model.

It does what ``jaxkv.serving.Scheduler`` does, and more: drafted tokens, copied blocks, admissions that are
declined or end before their load was sent, requests that are left out of a step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from random import Random

from cache_model import CacheModel
from cache_request import MachineRequest, Part
from cache_setup import MAX_TOKENS, Setup

from jaxkv.connector import KVConnectorOutput, OffloadingConnector, SchedulerOutput
from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk


class MachineLoop:
    """Who waits, runs and loads. ``dying`` were aborted while a load into their blocks was under way."""

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
        self.served: list[MachineRequest] = []
        self.events: deque[str] | None = None
        self._has_state = any(layer.kind == "state" for layer in setup.layers)
        self._alignment = self.cache.config.alignment_tokens
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
        self.log(request, "arrives")

    def abort(self, request: MachineRequest) -> None:
        """End a request at whatever stage it is."""
        stage = self._leave_queues(request)
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
        keep, _ = self.connector.request_finished_all_groups(request, tables)
        self._finished.add(request.request_id)
        loads = self.loading.pop(request.request_id, None)
        if keep:
            assert loads is not None, "only a load into a request's blocks may keep them"
            self.dying[request.request_id] = request
        else:
            self.cache.release(request)

    def preempt(self, request: MachineRequest) -> None:
        """Take the blocks of a running request; it starts again from what can be found."""
        self.counts["preemptions"] += 1
        self.log(request, "is preempted")
        self.running.remove(request)
        self._restart(request)
        self._preempted.add(request.request_id)

    def _restart(self, request: MachineRequest) -> None:
        self.cache.release(request)
        request.num_computed_tokens = 0
        request.volatile = False
        self.waiting.insert(0, request)

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
        tables = self.cache.loaded_tables(request, request.num_computed_tokens)
        self.connector.update_state_after_alloc(request, tables, 0)
        self.counts["blocks copied on write"] += 1
        self.log(request, "goes on in a copy of block", old, "of group", group, "in block", new)
        return True

    # -- planning ---------------------------------------------------------------------------------------

    def schedule(self) -> tuple[list[Part], SchedulerOutput]:
        """Decide who computes what, and take the blocks."""
        parts: list[Part] = []
        if self._schedule_running(parts) and not self._preempted:
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
                parts.append(self._part(request, chunk))
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
        known = request.num_tokens
        for chunk in self._choices(request, request.num_computed_tokens, self.setup.max_drafts):
            # Drafted tokens need room as known ones do.
            request.num_tokens = max(known, chunk.end)
            has_room = self.cache.extend(request, chunk)
            request.num_tokens = known
            if has_room:
                return chunk
        return None

    def _choices(self, request: MachineRequest, start: int, max_drafts: int) -> Iterator[Chunk]:
        """Chunks to compute next, the wanted one first; the last one needs least."""
        known = request.num_tokens
        if known - start == 1:
            drafts = self._num_drafts(start, max_drafts)
            if drafts:
                yield Chunk(start, known + drafts, 1)
            yield Chunk(start, known, 1)
            return
        end = min(known, start + self.draw.randrange(1, self.setup.max_step + 1))
        if self._has_state and self.setup.stop_at_blocks:
            last = (known - 1) // self._alignment * self._alignment
            end = min(end, last) if start < last else end
            rounded = end // self._alignment * self._alignment
            end = rounded if rounded > start else end
        yield Chunk(start, end, 1)
        yield Chunk(start, start + 1, 1)

    def _num_drafts(self, start: int, max_drafts: int) -> int:
        """Drafted tokens of a step. A state may end at any of them, so each needs a block that is held."""
        drafts = self.draw.randrange(max_drafts + 1)
        for layer in self.setup.layers:
            if layer.kind == "state" and drafts:
                read, first = (start - 1) // layer.block, start // layer.block
                last = first if read < first else first + 1
                drafts = min(drafts, (last + 1) * layer.block - 1 - start)
        return drafts

    def _part(self, request: MachineRequest, chunk: Chunk) -> Part:
        drafts = max(0, chunk.end - request.num_tokens)
        kept = chunk.end
        if drafts:
            accepted = min(self.draw.randrange(drafts + 1), request.max_tokens - 1 - request.num_tokens)
            kept = request.num_tokens + accepted
            self.counts["drafts accepted"] += accepted
            self.counts["drafts rejected"] += drafts - accepted
        return Part(request, chunk.start, chunk.end, kept)

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
        for chunk in self._choices(request, start, 0):
            if self.cache.admit(request, device_hit, boundary, chunk):
                break
        else:
            self.counts["admissions without room"] += 1
            if external:
                self.counts["promises that found no room"] += 1
            return False
        self.counts["device hit tokens"] += device_hit
        self.log(
            request, "is admitted behind", device_hit, "tokens of the device and", external, "of the host"
        )
        request.num_computed_tokens = device_hit
        self.connector.update_state_after_alloc(request, self.cache.all_tables(request), external)
        self.waiting.remove(request)
        if external:
            self.loading[request.request_id] = request, start
            self.counts["host hits"] += 1
            self.counts["host hit tokens"] += external
            if self.draw.random() < 0.02:
                self.counts["aborted before the load was sent"] += 1
                self._tell_end(request)
                assert request.request_id not in self.dying, "nothing is under way yet"
        else:
            request.num_computed_tokens = start
            self.running.append(request)
            parts.append(self._part(request, chunk))
        return True

    def _check_promise(self, request: MachineRequest, known: int, external: int, is_async: bool) -> None:
        """A promise is never more than can be served, and never less."""
        assert is_async == (external > 0)
        most = self.model.longest_hit(request.contents.ids, known, request.num_tokens - 1)
        assert known + external <= most, (
            f"{request} was promised {external} tokens behind {known}, only {most - known} can be served"
        )
        assert known + external >= most or self._is_gap(known), (
            f"{request} was promised {external} tokens behind {known}, {most - known} can be served"
        )

    def _is_gap(self, known: int) -> bool:
        """Sinks that the device holds are asked of the host where the device hit ends within their chunk."""
        return any(layer.sinks and known % layer.chunk for layer in self.setup.layers)

    # -- the end of a step ------------------------------------------------------------------------------

    def update(self, parts: list[Part], results: KVConnectorOutput) -> None:
        """Take in a step that ran: computed tokens, ended transfers, finished requests."""
        for part in parts:
            request = part.request
            request.generate(max(0, part.kept - request.num_tokens))
            self.cache.register(request, part.start)
            self.cache.register(request, part.kept)
            request.num_computed_tokens = part.kept
        self.connector.update_connector_output(results)
        for request_id in results.failed_recving:
            self._load_failed(request_id)
        for request_id in results.finished_recving - results.failed_recving.keys():
            self._load_landed(request_id)
        for part in parts:
            request = part.request
            if part.kept == request.num_tokens:
                request.generate(1)
                if request.is_complete:
                    self._finish(request)

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
