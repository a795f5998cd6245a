"""A serving loop of one page, to drive the connector: real block tables, NumPy pages, no model.

What a token leaves in the caches is a hash of the whole prefix that ends with it. Before it computes a token
the loop checks all that token reads, so a page that was restored wrongly, read too early or overwritten while
somebody needed it fails the test at the token that would have used it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from jaxkv.connector import OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.hits import unread_blocks
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from jaxkv.testing.fake_pool import FakePool
from jaxkv.testing.fake_worker import FakeOffloadingSpec
from jaxkv.testing.leaks import assert_no_leaks

BLOCK, STATE_BLOCK, WINDOW = 4, 8, 10


def hybrid_config(num_blocks: int = 64) -> KVCacheConfig:
    def attention(layers, window=None):
        arguments = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": np.int64}
        page = {"page_size_bytes": BLOCK * 8}
        if window is None:
            return KVCacheGroupSpec(layers, FullAttentionSpec(**arguments, **page), num_blocks)
        spec = SlidingWindowSpec(**arguments, **page, sliding_window=window)
        return KVCacheGroupSpec(layers, spec, num_blocks)

    state = MambaSpec(STATE_BLOCK, shapes=((2,),), dtypes=(np.int64,))
    return KVCacheConfig(
        (
            attention(("full.0", "full.1")),
            attention(("window.0",), WINDOW),
            KVCacheGroupSpec(("state.0",), state, max(2, num_blocks // 4)),
        )
    )


def make_caches(config: KVCacheConfig) -> dict[str, np.ndarray]:
    caches = {}
    for group in config.groups:
        width = 2 if isinstance(group.spec, MambaSpec) else BLOCK
        for layer in group.layer_names:
            caches[layer] = np.full((group.num_blocks, width), -1, np.int64)
    return caches


@cache
def value_of(prefix: tuple[int, ...]) -> int:
    """What the last token of ``prefix`` leaves in every layer."""
    if not prefix:
        return 7
    parent = value_of(prefix[:-1])
    return (parent * 6364136223846793005 + prefix[-1] * 1442695040888963407 + 1) % (2**63)


@dataclass(eq=False)
class LoopRequest:
    request_id: str
    tokens: list[int]
    max_new_tokens: int = 1
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    chain: HashChain = field(default_factory=lambda: HashChain(ChainRoot("loop", BLOCK)))
    host_hits: list[int] = field(default_factory=list)
    tables: list[list[int | None]] = field(default_factory=list)
    kv_transfer_params: dict | None = None

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)
        self.extend_hashes()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def block_hashes(self) -> list:
        return self.chain.block_hashes

    @property
    def done(self) -> bool:
        return self.num_tokens - self.num_prompt_tokens >= self.max_new_tokens

    def extend_hashes(self) -> None:
        self.chain.extend(self.tokens[self.chain.num_tokens :])


class Loop:
    """Blocks freed last are handed out first, so that whatever can be overwritten soon is."""

    def __init__(
        self, *, num_blocks=64, pool_bytes=1 << 20, slab_bytes=None, max_step_tokens=16, pool=None, **options
    ):
        self.config = hybrid_config(num_blocks)
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
        self.num_preemptions = 0

    # -- what tests call ----------------------------------------------------------------------------------

    def add(self, name: str, tokens, max_new_tokens=1, **params) -> LoopRequest:
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
        self.preempted: set[str] = set()
        self.new_blocks: dict[str, list[list[int | None]]] = {}
        scheduled = self.schedule()
        output = SchedulerOutput(scheduled, self.new_blocks, self.finished_ids, self.preempted)
        self.finished_ids = set()
        metadata = self.connector.build_connector_meta(output)
        caches = self.connector.handle_preemptions(self.caches, metadata)
        self.connector.bind_connector_metadata(metadata)
        caches = self.connector.start_load_kv(caches)
        for request in list(self.running):
            if request.request_id in scheduled:
                self.forward(request, scheduled[request.request_id])
        self.caches = self.connector.wait_for_save(caches)
        result = self.connector.get_transfer_results(output.finished_req_ids)
        self.connector.clear_connector_metadata()
        self.connector.update_connector_output(result)
        self.take_results(result)
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
        last_boundary = (request.num_tokens - 1) // STATE_BLOCK * STATE_BLOCK
        end = done + count
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
            wanted.append([position not in unread for position in range(num_tokens // group.block_size)])
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
        for index, group in enumerate(self.config.groups):
            table = request.tables[index]
            self.check_reads(request, group, table, start)
            for layer in group.layer_names:
                if isinstance(group.spec, MambaSpec):
                    state = value_of(tuple(request.tokens[:end]))
                    self.caches[layer][table[(end - 1) // STATE_BLOCK]] = [state, end]
                    continue
                for token in range(start, end):
                    self.caches[layer][table[token // BLOCK], token % BLOCK] = value_of(
                        tuple(request.tokens[: token + 1])
                    )
        request.num_computed_tokens = end
        if end == request.num_tokens:
            request.tokens.append(value_of(tuple(request.tokens)) % 1000)
            request.extend_hashes()

    def check_reads(self, request: LoopRequest, group, table, start: int) -> None:
        """Everything the token at ``start`` reads of what came before it."""
        if start == 0:
            return
        for layer in group.layer_names:
            cache = self.caches[layer]
            if isinstance(group.spec, MambaSpec):
                found = cache[table[(start - 1) // STATE_BLOCK]].tolist()
                assert found == [value_of(tuple(request.tokens[:start])), start], (layer, start)
                continue
            window = group.spec.sliding_window if isinstance(group.spec, SlidingWindowSpec) else start + 1
            for token in range(max(0, start - (window - 1)), start):
                found = cache[table[token // BLOCK], token % BLOCK]
                assert found == value_of(tuple(request.tokens[: token + 1])), (layer, token)


def expected_output(tokens, max_new_tokens: int) -> list[int]:
    """What the model generates, whatever caches do."""
    known = list(tokens)
    for _ in range(max_new_tokens):
        known.append(value_of(tuple(known)) % 1000)
    return known[len(tokens) :]
