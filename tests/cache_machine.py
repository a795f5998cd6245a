"""The real connector and the real block pools against the reference model: whatever happens, bytes are right.

``Machine`` makes the steps and the events; tests and the fuzzer decide which. All that is random comes from
the ``Random`` it is given, so a seed replays a run.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
from cache_loop import MachineLoop
from cache_manager_watch import WatchedManager
from cache_model import CacheModel, Chunk, Contents, Question
from cache_request import Caches, MachineRequest, Part, Wishes
from cache_setup import MAX_TOKENS, Setup
from cache_worker import MachineSpec, ShardWorker

from jaxkv.connector import KVOutputAggregator, OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.offload.host_manager import HostOffloadingManager
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.leaks import assert_no_leaks

MAX_STEPS_WITHOUT_PROGRESS = 100


class Machine:
    """One connector, its pools and its requests. ``counts`` says what happened."""

    def __init__(self, setup: Setup, draw: Random, counts: Counter[str]) -> None:
        self.setup = setup
        self.draw = draw
        self.counts = counts
        config = setup.config
        self.model = CacheModel(setup.layers, config.hash_block_size)
        chunk_bytes = _chunk_bytes(setup)
        self.pool = FakePool(-(-max(chunk_bytes) // 4096) * 4096 * setup.host_chunks)
        manager = _make_manager(setup, self.pool)
        may_skip = setup.store_threshold > 1
        self.manager = WatchedManager(manager, self.model, draw, counts, may_skip=may_skip)
        self.manager.refuse, self.manager.retry = setup.refuse_odds, setup.retry_odds
        self.caches = Caches(setup.layers, setup.num_blocks, setup.num_workers, MAX_TOKENS + setup.max_drafts)
        self.workers = [
            ShardWorker(self.manager, self._find_request, setup.blocks_per_chunk, shard)
            for shard in range(setup.num_workers)
        ]
        self.connectors = [self._make_connector(shard) for shard in range(setup.num_workers)]
        self.connector = self.connectors[0]
        self.loop = MachineLoop(setup, self.connector, self.model, draw, counts)
        self.land_odds, self.fail_odds = setup.land_odds, setup.fail_odds
        self.unreported_odds = setup.unreported_odds
        self._aggregator = KVOutputAggregator(setup.num_workers)
        self._links = config.hash_block_size, draw.choice([16, 16, 32])
        self._texts: list[np.ndarray] = []
        self._idle_steps = self._num_arrived = 0

    def _make_connector(self, shard: int) -> OffloadingConnector:
        """The connector, or for the other workers one whose scheduler side is not used."""
        setup = self.setup
        options = OffloadingConfig(
            host_bytes=1,
            blocks_per_chunk=setup.blocks_per_chunk,
            offload_prompt_only=setup.prompt_only,
            retention_interval=setup.retention_interval,
            num_workers=setup.num_workers,
        )
        unused = FakePool(-(-max(_chunk_bytes(setup)) // 4096) * 4096)
        manager = self.manager if shard == 0 else _make_manager(setup, unused)
        spec = MachineSpec(manager, self.workers[shard])
        connector = OffloadingConnector(options, setup.config, spec=spec)
        connector.register_kv_caches(self.caches.arrays[shard])
        return connector

    def _find_request(self, request_id: str) -> MachineRequest:
        return self.loop.requests[request_id]

    @property
    def in_flight(self) -> bool:
        """Whether any transfer is under way."""
        return any(worker.flights for worker in self.workers)

    # -- events -----------------------------------------------------------------------------------------

    def arrive(self) -> MachineRequest:
        """A new request, which often begins as an earlier one did, or goes on where one ended."""
        draw = self.draw
        self._num_arrived += 1
        base = draw.choice(self._texts) if self._texts and draw.random() < 0.85 else np.zeros(0, np.int64)
        if draw.random() < 0.6:
            base = base[: draw.randrange(len(base) + 1)]
        num_new = 0 if len(base) > 1 and draw.random() < 0.3 else draw.randrange(1, 40)
        base = base[: MAX_TOKENS - 1]
        prompt = self.model.extend(base, min(num_new, MAX_TOKENS - 1 - len(base)))
        ids = self.model.extend(prompt, min(draw.randrange(1, 24), MAX_TOKENS - len(prompt)))
        contents = Contents(self.setup.layers, ids)
        wishes = self._draw_wishes() if self.setup.wishes else Wishes()
        request = MachineRequest(f"r{self._num_arrived}", contents, len(prompt), self._links, wishes)
        if self.setup.prompt_only:
            request.store_limit = len(prompt)
        if wishes.max_offload_tokens is not None:
            request.store_limit = min(request.store_limit, wishes.max_offload_tokens)
        self._texts.append(ids)
        del self._texts[:-12]
        self.loop.add(request)
        return request

    def _draw_wishes(self) -> Wishes:
        draw = self.draw
        self.counts["requests with wishes"] += 1
        return Wishes(
            max_load_tokens=draw.choice([None, None, draw.randrange(MAX_TOKENS)]),
            max_offload_tokens=draw.choice([None, None, draw.randrange(MAX_TOKENS)]),
            offload_policy=draw.choice(["chunk_level", "request_level"]),
            skip_reading=draw.random() < 0.1,
        )

    def abort(self) -> None:
        """Abort somebody; one who waits for a load as often as one who does not."""
        loop = self.loop
        loading = [request for request, _ in loop.loading.values()]
        others = [*loop.waiting, *loop.running]
        if loading or others:
            likes_loading = not others or (loading and self.draw.random() < 0.5)
            loop.abort(self.draw.choice(loading if likes_loading else others))

    def preempt(self) -> None:
        """Preempt somebody who runs."""
        if self.loop.running:
            self.loop.preempt(self.draw.choice(self.loop.running))

    def copy_block(self) -> None:
        """Let somebody who runs go on in a copy of one of its blocks."""
        if self.loop.running:
            request = self.draw.choice(self.loop.running)
            group = self.draw.randrange(len(self.setup.layers))
            held = np.flatnonzero(self.loop.cache.row(request, group) >= 0)
            if len(held):
                self.loop.copy_block(request, group, int(self.draw.choice(held)))

    def reset_device(self) -> None:
        """Forget the device's prefix cache."""
        self.counts["device resets"] += 1
        self.loop.log("the device is reset")
        self.loop.cache.clear_cache()

    def reset_host(self) -> None:
        """Forget all that was offloaded."""
        self.counts["host resets"] += 1
        self.counts["host resets with transfers in flight"] += self.in_flight
        self.loop.log("the host is reset")
        self.manager.note_reset()
        assert self.connector.reset_cache()

    def land(self, odds: float) -> None:
        """Let each transfer in flight end with these odds, in any order, on each worker by itself."""
        for worker in self.workers:
            if worker.flights:
                self._land_some(worker, odds)

    def _land_some(self, worker: ShardWorker, odds: float) -> None:
        flights = worker.flights
        job_ids = list(flights) if odds >= 1 else [job for job in flights if self.draw.random() < odds]
        if len(job_ids) > 1 and self.draw.random() < 0.5:
            self.draw.shuffle(job_ids)
        for job_id in job_ids:
            self.counts["transfers that overtook others"] += job_id != next(iter(flights))
            failed = self.draw.random() < self.fail_odds
            self.loop.log("job", job_id, "fails" if failed else "lands")
            flight = worker.land(job_id, "told to fail" if failed else None)
            self.counts["stores failed"] += failed and not flight.is_load
            self.counts["loads called off"] += flight.cancelled
            self._idle_steps = 0

    # -- one step ---------------------------------------------------------------------------------------

    def step(self, *, breaks_off: bool = False) -> None:
        """One step of the loop, all that is read compared with the model. It may break off half way."""
        self.counts["steps"] += 1
        self.land(self.land_odds)
        parts, output = self.loop.schedule()
        self.manager.refused.clear()
        metadata = self.connector.build_connector_meta(output)
        self._check_stored()
        if self.loop.events is not None:
            self._log_step(parts, metadata)
        self._start_transfers(metadata)
        self.land(self.land_odds / 2)
        if breaks_off:
            self.loop.break_off(parts)
            return
        self._forward(parts)
        self._save()
        is_reported = self.draw.random() >= self.unreported_odds
        self.counts["steps not reported"] += not is_reported
        self.loop.update(parts, self._take_results(output) if is_reported else None)
        self._check_progress(bool(parts))
        if is_reported:
            self._check_pins()
        if not self.counts["steps"] % 4:
            self.check()

    def _start_transfers(self, metadata) -> None:
        sides = list(zip(self.connectors, self.caches.arrays, strict=True))
        for connector, arrays in sides:
            connector.handle_preemptions(arrays, metadata)
            connector.bind_connector_metadata(metadata)
        for copy in self.loop.copies:
            self.caches.copy(*copy)
        self.loop.copies.clear()
        for connector, arrays in sides:
            connector.start_load_kv(arrays)

    def _forward(self, parts: list[Part]) -> None:
        for part in parts:
            for group in range(len(self.setup.layers)):
                row = self.loop.cache.row(part.request, group)
                self.caches.check(part, group, row)
                self.caches.write(part, group, row)
            self.caches.emit(part)
            self.model.computed(part.request.contents.ids[part.start : part.kept])
            self.counts["tokens computed"] += part.kept - part.start

    def _save(self) -> None:
        if self.draw.random() < self.setup.save_odds:
            for connector, arrays in zip(self.connectors, self.caches.arrays, strict=True):
                connector.wait_for_save(arrays)

    def _take_results(self, output: SchedulerOutput):
        results = []
        for connector in self.connectors:
            results.append(connector.get_transfer_results(output.finished_req_ids))
            connector.clear_connector_metadata()
        return self._aggregator.aggregate(results) if len(results) > 1 else results[0]

    def _log_step(self, parts: list[Part], metadata) -> None:
        self.loop.log(f"-- step {self.counts['steps']}")
        for part in parts:
            tables = [self.loop.cache.row(part.request, group) for group in range(len(self.setup.layers))]
            held = [{i: int(row[i]) for i in np.flatnonzero(row >= 0).tolist()} for row in tables]
            step = f"computes {part.start} to {part.end}, keeps to {part.kept}, emits {part.emitted}:"
            self.loop.log(part.request, step, held)
        for name, jobs in (("store", metadata.stores), ("load", metadata.loads)):
            for job in jobs:
                blocks = {part.group: part.block_ids.tolist() for part in job.blocks}
                self.loop.log(f"{name} {job.job_id} of {job.req_id}: {blocks}")

    def _check_progress(self, progressed: bool) -> None:
        if progressed or self.in_flight or not self.loop.is_busy:
            self._idle_steps = 0
        self._idle_steps += 1
        assert self._idle_steps <= MAX_STEPS_WITHOUT_PROGRESS, "nothing is under way and nobody gets on"

    # -- what must hold ---------------------------------------------------------------------------------

    def check(self) -> None:
        """References are those of the tables; a block being loaded into has one owner and is not findable."""
        cache = self.loop.cache
        loading = self._blocks_being_loaded()
        for group, pool in enumerate(cache.pools):
            rows = [tables.tables[group].row for tables in cache._held.values()]
            blocks = np.concatenate(rows) if rows else np.zeros(0, np.int32)
            refs = np.bincount(blocks[blocks >= 0], minlength=pool.num_blocks).tolist()
            for states in self.loop.handed.values():
                for block in (block for owner, block, _ in states if owner == group):
                    refs[block] += 1
            assert pool._refs == refs, "references are those of the tables"
            assert pool.num_free == refs.count(0)
            for block in loading.get(group, ()):
                assert refs[block] == 1, "a block being loaded into has one owner"
                assert pool._hash_of[block] is None, "a block being loaded into cannot be found"

    def _blocks_being_loaded(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for worker in self.workers:
            for flight in worker.flights.values():
                for group, block_ids, _ in flight.parts if flight.is_load else ():
                    found.setdefault(group, set()).update(block_ids[block_ids >= 0].tolist())
        return found

    def _check_stored(self) -> None:
        """Who gave its blocks back since the last step had in this one its last chance to be stored.

        Layers that forget lose what nobody reads any more when a refused chunk is offered again. Of steps
        that are not reported nothing need be stored.
        """
        ended, self.loop.ended = self.loop.ended, []
        setup = self.setup
        if setup.unreported_odds:
            return
        is_limited = setup.retention_interval is not None or setup.prompt_only or setup.wishes
        all_stored = not is_limited and not self.manager.num_refused
        for request, num_computed in ended:
            limit = min(num_computed, request.store_limit)
            for group, layer in enumerate(self.setup.layers):
                reads_all = layer.kind in ("full", "latent")
                if not reads_all and (not all_stored or layer.draft):
                    continue
                lost = set(self.model.missing(group, request.contents.ids, limit)) - self.manager.refused
                lost -= self._may_be_planned_later(group)
                assert not lost, f"{request} was never stored in group {group}: chunks {sorted(lost)}"
                self.counts["chunks expected to be stored"] += limit // layer.chunk

    def _may_be_planned_later(self, group: int) -> set[Chunk]:
        """What those who run have computed: stores that the step leaves alone are planned while it runs."""
        running = [(request.contents.ids, request.num_computed_tokens) for request in self.loop.running]
        return {chunk for ids, end in running for chunk in self.model.missing(group, ids, end)}

    def _check_pins(self) -> None:
        """What no load reads is not pinned."""
        loads = {
            job_id: len(flight.entries)
            for worker in self.workers
            for job_id, flight in worker.flights.items()
            if flight.is_load
        }
        assert self.manager.num_pins == sum(loads.values()), "chunks are pinned that no load reads"

    def _check_served(self) -> None:
        """Where nothing was lost, what requests computed can be served up to the last boundary."""
        setup = self.setup
        if self.manager.num_lost or not setup.is_calm or setup.prompt_only:
            return
        reads_all = ("full", "latent")
        if setup.retention_interval is not None or any(
            layer.kind == "state" or (layer.draft and layer.kind not in reads_all) for layer in setup.layers
        ):
            return
        for request in self.loop.served:
            computed = request.max_tokens - 1
            if not self.model.was_computed(request.contents.ids[:computed]):
                continue
            hashed = computed - computed % self.model.tokens_per_hash
            ahead = max(map(self.model.lookahead, range(len(setup.layers))))
            question = Question(request.contents.ids, 0, computed - ahead, hashed)
            served = self.model.longest_hit(question)
            most = (computed - ahead) // setup.alignment * setup.alignment
            assert served >= most, f"of {request} {served} tokens were stored, not {most}"
            self.counts["requests found stored completely"] += 1

    def drain(self, max_steps: int = 3000) -> None:
        """Steps, all of them reported, until nothing is left to do."""
        self.unreported_odds = 0.0
        for _ in range(max_steps):
            if not self.loop.is_busy and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"no end after {max_steps} steps")

    def close(self) -> None:
        """Drain, then nothing may be left: no job, pin, slot, busy chunk, block or request state."""
        self.drain()
        self.check()
        assert_no_leaks(self.connector)
        self.manager.check_idle()
        self._check_served()
        stats = self.connector.get_stats()
        assert stats.backend.num_busy == stats.backend.num_quarantined == 0
        assert len(self.pool.live) == stats.backend.num_chunks
        for pool in self.loop.cache.pools:
            assert pool.num_free == pool.num_blocks, "blocks were lost"
        self._count(stats)
        for connector in self.connectors:
            connector.shutdown()
        assert not self.pool.live

    def _count(self, stats) -> None:
        self.counts["device blocks evicted"] += self.loop.cache.num_evictions
        for reason, count in stats.deferred.items():
            self.counts[f"deferred: {reason.value}"] += count
        for group in stats.groups:
            for reason, count in group.skipped_chunks.items():
                self.counts[f"skipped: {reason.value}"] += count
        setup = self.setup
        self.counts[f"runs with {setup.num_workers} workers"] += 1
        self.counts[f"runs with policy {setup.policy}"] += 1
        self.counts[f"runs with {setup.blocks_per_chunk} blocks per chunk"] += 1
        self.counts["chunks offered too seldom"] += stats.backend.num_below_threshold
        self.counts["runs with a retention interval"] += setup.retention_interval is not None
        self.counts["runs with draft layers"] += any(layer.draft for layer in setup.layers)
        for kind in {layer.kind for layer in setup.layers}:
            self.counts[f"runs with {kind} layers"] += 1


def _chunk_bytes(setup: Setup) -> list[int]:
    return [group.page_size_bytes * setup.blocks_per_chunk for group in setup.config.groups]


def _make_manager(setup: Setup, pool: FakePool) -> HostOffloadingManager:
    return HostOffloadingManager(
        pool, _chunk_bytes(setup), setup.policy, store_threshold=setup.store_threshold, max_tracked_keys=200
    )
