"""A serving loop of one page, to drive the connector: real block tables, NumPy pages, no model.

What a token leaves in the caches is a hash of the whole prefix that ends with it. Before it computes a token
the loop checks all that token reads, so a page that was restored wrongly, read too early or overwritten while
somebody needed it fails the test at the token that would have used it.
"""

from __future__ import annotations

from loop_model import (
    BLOCK,
    STATE_BLOCK,
    WINDOW,
    LoopRequest,
    expected_output,
    hybrid_config,
    make_caches,
    read_places,
    value_of,
)

from jaxkv.connector import OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.hits import unread_blocks
from jaxkv.spec import MambaSpec
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec
from jaxkv.testing.leaks import assert_no_leaks

__all__ = [
    "BLOCK",
    "STATE_BLOCK",
    "WINDOW",
    "Loop",
    "LoopRequest",
    "expected_output",
    "hybrid_config",
    "make_caches",
    "value_of",
]


class Loop:
    """Blocks freed last are handed out first, so that whatever can be overwritten soon is."""

    def __init__(
        self,
        *,
        config=None,
        num_blocks=64,
        pool_bytes=1 << 20,
        slab_bytes=None,
        max_step_tokens=16,
        pool=None,
        **options,
    ):
        self.config = config or hybrid_config(num_blocks)
        self.pool = pool or FakePool(pool_bytes, slab_bytes)
        self.spec = FakeOffloadingSpec(
            self.config, self.pool, blocks_per_chunk=options.get("blocks_per_chunk", 1)
        )
        self.worker = self.spec.worker
        self.connector = OffloadingConnector(
            OffloadingConfig(host_bytes=1, **options), self.config, spec=self.spec
        )
        self.caches = make_caches(self.config)
        self.connector.register_kv_caches(self.caches)
        self.free = [list(range(group.num_blocks)) for group in self.config.groups]
        self.max_step_tokens = max_step_tokens
        self.waiting: list[LoopRequest] = []
        self.loading: dict[str, LoopRequest] = {}
        self.loaded: set[str] = set()
        self.running: list[LoopRequest] = []
        self.aborted_loading: dict[str, LoopRequest] = {}
        self.finished_ids: set[str] = set()
        self.failures: dict[str, object] = {}
        self.outputs: dict[str, list[int]] = {}
        self.preempted: set[str] = set()
        self.new_blocks: dict[str, list[list[int | None]]] = {}
        self.handed: dict[str, list[tuple[int, int, int]]] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.num_preemptions = 0
        # What a loop may do one way or the other.
        self.cuts_at_boundaries = False
        self.finishes_first = False

    # -- what tests call ----------------------------------------------------------------------------------

    def add(self, name: str, tokens, max_new_tokens=1, **params) -> LoopRequest:
        params.setdefault("chain", HashChain(ChainRoot("loop", self.config.hash_block_size)))
        request = LoopRequest(name, list(tokens), max_new_tokens, **params)
        self.connector.on_new_request(request)
        self.waiting.append(request)
        return request

    def serve(self, name: str, tokens, max_new_tokens=1, **params) -> LoopRequest:
        request = self.add(name, tokens, max_new_tokens, **params)
        self.run()
        return request

    def run(self, max_steps=1000) -> None:
        """Steps until nothing is left to do, the connector's own work included."""
        for _ in range(max_steps):
            if not self.busy:
                return
            self.step()
        raise AssertionError("the loop does not come to rest")

    @property
    def busy(self) -> bool:
        return bool(
            self.waiting
            or self.loading
            or self.running
            or self.aborted_loading
            or self.connector.has_pending_push_work()
        )

    def abort(self, request: LoopRequest) -> None:
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        self.finished_ids.add(request.request_id)
        keep, _ = self.connector.request_finished_all_groups(request, request.tables)
        self.loading.pop(request.request_id, None)
        if keep:
            self.aborted_loading[request.request_id] = request
        else:
            self.release(request)

    def preempt(self, request: LoopRequest) -> None:
        self.num_preemptions += 1
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self.loaded.discard(request.request_id)
        self.preempted.add(request.request_id)
        self.release(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def close(self) -> None:
        assert_no_leaks(self.connector)
        num_chunks = self.connector.get_stats().backend.num_chunks
        assert len(self.pool.live) == num_chunks
        for group, free in zip(self.config.groups, self.free, strict=True):
            assert sorted(free) == list(range(group.num_blocks)), "the loop itself lost blocks"
        self.connector.shutdown()
        assert not self.pool.live

    # -- one step -----------------------------------------------------------------------------------------

    def step(self) -> None:
        self.preempted, self.new_blocks = set(), {}
        scheduled = self.schedule()
        output = SchedulerOutput(scheduled, self.new_blocks, self.finished_ids, self.preempted, self.handed)
        self.finished_ids, self.handed = set(), {}
        metadata = self.connector.build_connector_meta(output)
        result = self.work(metadata, output)
        if self.finishes_first:
            self.finish_done()
        self.connector.update_connector_output(result)
        self.take_results(result)
        self.finish_done()

    def work(self, metadata, output):
        """The worker's part of a step."""
        caches = self.connector.handle_preemptions(self.caches, metadata)
        self.connector.bind_connector_metadata(metadata)
        self.copy_blocks()
        caches = self.connector.start_load_kv(caches)
        self.compute(output)
        self.caches = self.connector.wait_for_save(caches)
        result = self.connector.get_transfer_results(output.finished_req_ids)
        self.connector.clear_connector_metadata()
        return result

    def compute(self, output) -> None:
        for request in list(self.running):
            if request.request_id in output.num_scheduled_tokens:
                self.forward(request, output.num_scheduled_tokens[request.request_id])

    def copy_blocks(self) -> None:
        for group, source, target in self.copies:
            for layer in self.config.groups[group].layer_names:
                self.caches[layer][target] = self.caches[layer][source]
        self.copies = []

    def finish_done(self) -> None:
        for request in [request for request in self.running if request.done]:
            self.running.remove(request)
            self.outputs[request.request_id] = request.tokens[request.num_prompt_tokens :]
            self.finished_ids.add(request.request_id)
            assert self.connector.request_finished_all_groups(request, request.tables) == (False, None)
            self.release(request)

    def take_results(self, result) -> None:
        assert result.failed_recving.keys() <= result.finished_recving
        for req_id in result.finished_recving:
            if req_id in self.aborted_loading:
                self.release(self.aborted_loading.pop(req_id))
                continue
            request = self.loading.pop(req_id)
            if req_id in result.failed_recving:
                self.failures[req_id] = result.failed_recving[req_id]
                self.release(request)
                request.num_computed_tokens = 0
            else:
                self.loaded.add(req_id)
            self.waiting.insert(0, request)

    def schedule(self) -> dict[str, int]:
        scheduled: dict[str, int] = {}
        for request in list(self.running):
            if request in self.running:
                self.skip_window(request)
                count = self.next_tokens(request)
                while not self.allocate(request, request.num_computed_tokens + count):
                    landed = [other for other in self.waiting if other.request_id in self.loaded]
                    self.preempt(landed[-1] if landed else self.running[-1])
                    if request not in self.running:
                        break
                else:
                    scheduled[request.request_id] = count
        for victim in self.preempted:
            scheduled.pop(victim, None)
            self.new_blocks.pop(victim, None)
        if not self.preempted:
            for request in list(self.waiting):
                self.admit(request, scheduled)
        return scheduled

    def admit(self, request: LoopRequest, scheduled: dict[str, int]) -> None:
        if request.request_id in self.loaded:
            self.loaded.remove(request.request_id)
            external = 0
        else:
            found, is_async = self.connector.get_num_new_matched_tokens(request, 0)
            if found is None:
                return
            assert is_async == (found > 0)
            external = found
            request.tables = [[] for _ in self.config.groups]
            request.num_computed_tokens = external
        if external:
            allocated = self.allocate_hit(request, external)
        else:
            count = self.next_tokens(request)
            allocated = self.allocate(request, request.num_computed_tokens + count)
        if not allocated:
            if not any(request.tables):
                request.num_computed_tokens = 0
            else:
                self.loaded.add(request.request_id)
            return
        self.new_blocks.pop(request.request_id, None)
        self.connector.update_state_after_alloc(request, request.tables, external)
        self.waiting.remove(request)
        if external:
            request.host_hits.append(external)
            self.loading[request.request_id] = request
        else:
            self.running.append(request)
            scheduled[request.request_id] = count

    def next_tokens(self, request: LoopRequest) -> int:
        """Tokens of the next step: prefill is cut where states are kept."""
        done = request.num_computed_tokens
        count = min(self.max_step_tokens, request.num_tokens - done)
        end = done + count
        if self.cuts_at_boundaries:
            stops = self.connector.get_snapshot_boundaries(request)
            return min((stop for stop in stops if done < stop < end), default=end) - done
        last_boundary = (request.num_tokens - 1) // STATE_BLOCK * STATE_BLOCK
        if done < last_boundary:
            end = min(end, last_boundary)
            end -= end % STATE_BLOCK
        return max(end, done + 1) - done

    # -- blocks -------------------------------------------------------------------------------------------

    def allocate(self, request: LoopRequest, num_tokens: int) -> bool:
        """Blocks for all tokens up to ``num_tokens``; a state block only where the step ends."""
        wanted: list[list[bool]] = []
        for group, table in zip(self.config.groups, request.tables, strict=True):
            end = -(-num_tokens // group.block_size)
            positions = range(len(table), end)
            is_state = isinstance(group.spec, MambaSpec)
            wanted.append([not is_state or position == end - 1 for position in positions])
        if any(sum(real) > len(free) for real, free in zip(wanted, self.free, strict=True)):
            return False
        new = self.new_blocks.setdefault(request.request_id, [[] for _ in self.config.groups])
        for index, flags in enumerate(wanted):
            blocks = [self.free[index].pop() if real else None for real in flags]
            request.tables[index].extend(blocks)
            new[index].extend(blocks)
        return True

    def allocate_hit(self, request: LoopRequest, num_tokens: int) -> bool:
        """Blocks for a hit, and those the next step needs, so that a waiting load cannot deadlock."""
        wanted: list[list[bool]] = []
        for group in self.config.groups:
            unread = unread_blocks(group.spec, num_tokens)
            wanted.append([position not in unread for position in range(-(-num_tokens // group.block_size))])
        if any(sum(real) > len(free) for real, free in zip(wanted, self.free, strict=True)):
            return False
        for index, flags in enumerate(wanted):
            request.tables[index] = [self.free[index].pop() if real else None for real in flags]
        return True

    def skip_window(self, request: LoopRequest) -> None:
        for index, (group, table) in enumerate(zip(self.config.groups, request.tables, strict=True)):
            for position in unread_blocks(group.spec, request.num_computed_tokens):
                if position < len(table) and table[position] is not None:
                    self.free[index].append(table[position])
                    table[position] = None

    def release(self, request: LoopRequest) -> None:
        for free, table in zip(self.free, request.tables, strict=False):
            free.extend(block for block in table if block is not None)
        request.tables = []

    # -- the model ----------------------------------------------------------------------------------------

    def forward(self, request: LoopRequest, count: int) -> None:
        start, end = request.num_computed_tokens, request.num_computed_tokens + count
        self.compute_tokens(request, start, end)
        request.num_computed_tokens = end
        if end == request.num_tokens:
            self.sample(request)

    def compute_tokens(self, request: LoopRequest, start: int, end: int) -> None:
        for index, group in enumerate(self.config.groups):
            self.check_reads(request, group, request.tables[index], start)
            self.write(request, group, request.tables[index], range(start, end))

    def sample(self, request: LoopRequest) -> None:
        request.tokens.append(value_of(tuple(request.tokens)) % 1000)
        request.extend_hashes()

    def write(self, request: LoopRequest, group, table, places: range) -> None:
        """Leave what the tokens at ``places`` leave."""
        size = group.block_size
        for layer in group.layer_names:
            if isinstance(group.spec, MambaSpec):
                state = self.content(request, group, places.stop - 1)
                self.caches[layer][table[(places.stop - 1) // size]] = [state, places.stop]
                continue
            for place in places:
                self.caches[layer][table[place // size], place % size] = self.content(request, group, place)

    def content(self, request: LoopRequest, group, place: int) -> int:
        """What a token leaves; for a drafter it depends on the next one as well."""
        return value_of(tuple(request.tokens[: place + 1 + group.is_eagle_group]))

    def check_reads(self, request: LoopRequest, group, table, start: int) -> None:
        """Everything the token at ``start`` reads of what came before it."""
        if start == 0:
            return
        size = group.block_size
        for layer in group.layer_names:
            cache = self.caches[layer]
            if isinstance(group.spec, MambaSpec):
                found = cache[table[(start - 1) // size]].tolist()
                assert found == [self.content(request, group, start - 1), start], (layer, start)
                continue
            for place in read_places(group.spec, start):
                found = cache[table[place // size], place % size]
                assert found == self.content(request, group, place), (layer, place)
