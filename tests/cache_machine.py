"""The real connector and the real block pools against the reference model: whatever happens, bytes are right.

``Machine`` makes the steps and the events; tests and the fuzzer decide which. All that is random comes from
the ``Random`` it is given, so a seed replays a run.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
from cache_backend import MachineSpec, ShardWorker, WatchedManager
from cache_loop import MachineLoop
from cache_model import CacheModel, Contents
from cache_request import Caches, MachineRequest
from cache_setup import MAX_TOKENS, Setup

from jaxkv.connector import OffloadingConfig, OffloadingConnector
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
        self.model = CacheModel(setup.layers, setup.alignment)
        config = setup.config
        chunk_bytes = [group.page_size_bytes * setup.blocks_per_chunk for group in config.groups]
        self.pool = FakePool(-(-max(chunk_bytes) // 4096) * 4096 * setup.host_chunks)
        real = HostOffloadingManager(self.pool, chunk_bytes)
        self.manager = WatchedManager(real, self.model, draw, counts)
        self.manager.refuse, self.manager.retry = setup.refuse_odds, setup.retry_odds
        self.worker = ShardWorker(self.manager, self._contents_of, setup.blocks_per_chunk, 0)
        options = OffloadingConfig(
            host_bytes=1, blocks_per_chunk=setup.blocks_per_chunk, offload_prompt_only=setup.prompt_only
        )
        self.connector = OffloadingConnector(options, config, spec=MachineSpec(self.manager, self.worker))
        self.caches = Caches(setup.layers, setup.num_blocks, 1, MAX_TOKENS + setup.max_drafts)
        self.connector.register_kv_caches(self.caches.arrays[0])
        self.loop = MachineLoop(setup, self.connector, self.model, draw, counts)
        self.land_odds, self.fail_odds = setup.land_odds, setup.fail_odds
        self._hash_tokens = config.hash_block_size
        self._hash_bytes = draw.choice([16, 16, 32])
        self._texts: list[np.ndarray] = []
        self._idle_steps = self._num_arrived = 0

    def _contents_of(self, request_id: str) -> Contents:
        return self.loop.requests[request_id].contents

    # -- events -----------------------------------------------------------------------------------------

    def arrive(self) -> MachineRequest:
        """A new request, which often begins as an earlier one did, or goes on where one ended."""
        draw = self.draw
        self._num_arrived += 1
        base = draw.choice(self._texts) if self._texts and draw.random() < 0.85 else np.zeros(0, np.int64)
        if draw.random() < 0.6:
            base = base[: draw.randrange(len(base) + 1)]
        num_new = 0 if len(base) > 1 and draw.random() < 0.3 else draw.randrange(1, 40)
        max_prompt = MAX_TOKENS - 1
        prompt = self.model.extend(base[:max_prompt], min(num_new, max_prompt - len(base[:max_prompt])))
        ids = self.model.extend(prompt, min(draw.randrange(1, 24), MAX_TOKENS - len(prompt)))
        request = MachineRequest(
            f"r{self._num_arrived}",
            Contents(self.setup.layers, ids),
            len(prompt),
            self._hash_tokens,
            self._hash_bytes,
        )
        self._texts.append(ids)
        del self._texts[:-12]
        self.loop.add(request)
        return request

    def abort(self) -> None:
        """Abort somebody; one who waits for a load as often as one who does not."""
        loop = self.loop
        loading = [request for request, _ in loop.loading.values()]
        others = [*loop.waiting, *loop.running]
        if loading or others:
            loop.abort(
                self.draw.choice(loading if not others or (loading and self.draw.random() < 0.5) else others)
            )

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
        self.loop.cache.clear_cache()

    def reset_host(self) -> None:
        """Forget all that was offloaded."""
        self.counts["host resets"] += 1
        if self.worker.flights:
            self.counts["host resets with transfers in flight"] += 1
        assert self.connector.reset_cache()

    def land(self, odds: float) -> None:
        """Let each transfer in flight end with these odds, in any order."""
        flights = self.worker.flights
        if not flights:
            return
        job_ids = list(flights) if odds >= 1 else [job for job in flights if self.draw.random() < odds]
        if len(job_ids) > 1 and self.draw.random() < 0.5:
            self.draw.shuffle(job_ids)
        for job_id in job_ids:
            if job_id != next(iter(flights)):
                self.counts["transfers that overtook others"] += 1
            failed = self.draw.random() < self.fail_odds
            self.loop.log("job", job_id, "fails" if failed else "lands")
            flight = self.worker.land(job_id, "told to fail" if failed else None)
            if failed and not flight.is_load:
                self.counts["stores failed"] += 1
            self._idle_steps = 0

    # -- one step ---------------------------------------------------------------------------------------

    def step(self) -> None:
        """One step of the loop, all that is read compared with the model."""
        self.counts["steps"] += 1
        connector, loop, caches = self.connector, self.loop, self.caches
        self.land(self.land_odds)
        parts, output = loop.schedule()
        metadata = connector.build_connector_meta(output)
        arrays = connector.handle_preemptions(caches.arrays[0], metadata)
        connector.bind_connector_metadata(metadata)
        for copy in loop.copies:
            caches.copy(*copy)
        loop.copies.clear()
        connector.start_load_kv(arrays)
        if loop.events is not None:
            self._log_step(parts, metadata)
        self.land(self.land_odds / 2)
        self._forward(parts)
        connector.wait_for_save(arrays)
        results = connector.get_transfer_results(output.finished_req_ids)
        connector.clear_connector_metadata()
        loop.update(parts, results)
        self._check_progress(bool(parts))
        if not self.counts["steps"] % 4:
            self.check()

    def _log_step(self, parts, metadata) -> None:
        self.loop.log(f"-- step {self.counts['steps']}")
        for part in parts:
            tables = [self.loop.cache.row(part.request, group) for group in range(len(self.setup.layers))]
            held = [{i: int(row[i]) for i in np.flatnonzero(row >= 0).tolist()} for row in tables]
            self.loop.log(part.request, f"computes {part.start} to {part.end}, keeps to {part.kept}:", held)
        for name, jobs in (("store", metadata.stores), ("load", metadata.loads)):
            for job in jobs:
                blocks = {part.group: part.block_ids.tolist() for part in job.blocks}
                self.loop.log(f"{name} {job.job_id} of {job.req_id}: {blocks}")

    def _forward(self, parts) -> None:
        for part in parts:
            for group in range(len(self.setup.layers)):
                row = self.loop.cache.row(part.request, group)
                self.caches.check(part, group, row)
                self.caches.write(part, group, row)
            self.counts["tokens computed"] += part.kept - part.start

    def _check_progress(self, progressed: bool) -> None:
        if progressed or self.worker.flights or not self.loop.is_busy:
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
            assert pool._refs == refs, "references are those of the tables"
            assert pool.num_free == refs.count(0)
            for block in loading.get(group, ()):
                assert refs[block] == 1, "a block being loaded into has one owner"
                assert pool._hash_of[block] is None, "a block being loaded into cannot be found"

    def _blocks_being_loaded(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for flight in self.worker.flights.values():
            if flight.is_load:
                for group, block_ids, _ in flight.parts:
                    found.setdefault(group, []).extend(block_ids[block_ids >= 0].tolist())
        return found

    def _check_served(self) -> None:
        """Where nothing was lost, what requests computed can be served up to the last boundary."""
        lost = self.manager.num_evicted + self.manager.num_refused
        setup = self.setup
        if (
            lost
            or not setup.is_calm
            or setup.prompt_only
            or "state" in {layer.kind for layer in setup.layers}
        ):
            return
        for request in self.loop.served:
            computed = request.max_tokens - 1
            served = self.model.longest_hit(request.contents.ids, 0, computed)
            assert served == computed - computed % setup.alignment, (
                f"of {request} {served} tokens were stored"
            )
            self.counts["requests found stored completely"] += 1

    def drain(self, max_steps: int = 3000) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.loop.is_busy and not self.worker.flights:
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
        self.counts["device blocks evicted"] += self.loop.cache.num_evictions
        for reason, count in stats.deferred.items():
            self.counts[f"deferred: {reason.value}"] += count
        for group in stats.groups:
            for reason, count in group.skipped_chunks.items():
                self.counts[f"skipped: {reason.value}"] += count
        self.connector.shutdown()
        assert not self.pool.live
