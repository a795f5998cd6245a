"""A full pool and many running requests with long contexts: what it takes to measure one more step.

There is no model, no memory and no serving loop. Whoever measures decides which requests advance by how many
tokens; here is what a loop would keep for them (tokens, hashes, block tables), and only the calls into the
connector's scheduler side are timed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import final

from jaxkv.connector import KVConnectorOutput, OffloadingConfig, OffloadingConnector, SchedulerOutput
from jaxkv.connector.metadata import OffloadingConnectorMetadata
from jaxkv.keys import BlockHash, BlockId, GroupId, KeyRun
from jaxkv.offload.base import OffloadingManager, ReqContext
from jaxkv.offload.options import BackendOptions
from jaxkv.replay.backend import InstantSpec
from jaxkv.replay.trace import Segment, chain_hashes
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec, SlidingWindowSpec

BLOCK = 16
WINDOW = 1024
_ROOT = BlockHash(b"jaxkv.replay.crowd")
_HELD_BLOCKS = (None, WINDOW // BLOCK, 1)
"""Last blocks a request holds in each group; ``None``: all."""
_CONTEXT_SHARE = 0.8
"""Part of a pool that contexts take; the rest is older and is evicted while steps are measured."""

Tables = list[list[BlockId | None]]


def crowd_config() -> KVCacheConfig:
    """Full attention, a window of 1,024, a recurrent state; blocks of 16 tokens: 128, 256 and 256 KiB."""
    full = FullAttentionSpec(BLOCK, 8, 64, "bfloat16")
    sliding = SlidingWindowSpec(BLOCK, 8, 64, "bfloat16", sliding_window=WINDOW)
    state = MambaSpec(BLOCK, shapes=((64, 1024),), dtypes=("float32",))
    layers = (
        (tuple(f"full.{i}" for i in range(4)), full),
        (tuple(f"sliding.{i}" for i in range(8)), sliding),
        (("state",), state),
    )
    return KVCacheConfig(tuple(KVCacheGroupSpec(names, spec, num_blocks=1 << 24) for names, spec in layers))


@final
class FullPool:
    """A connector whose pool is full: the chunks of ``contexts``, and older ones that nobody asks for.

    Every chunk of every group is there. Each context is ``context_tokens`` long.
    """

    def __init__(self, num_chunks: int, context_tokens: int) -> None:
        self.config = crowd_config()
        per_group = num_chunks // len(self.config.groups)
        host_bytes = per_group * sum(group.page_size_bytes for group in self.config.groups)
        spec = InstantSpec(BackendOptions(self.config, host_bytes))
        self.manager: OffloadingManager = spec.get_manager()
        self.connector = OffloadingConnector(
            OffloadingConfig(host_bytes, offload_prompt_only=False), self.config, spec=spec
        )
        self.connector.register_kv_caches({})
        self._streams = count()
        context_blocks = context_tokens // BLOCK
        num_contexts = max(1, int(_CONTEXT_SHARE * per_group) // context_blocks)
        self._fill(self.new_hashes(per_group - num_contexts * context_blocks))
        self.contexts = [self.new_hashes(context_blocks) for _ in range(num_contexts)]
        for hashes in self.contexts:
            self._fill(hashes)

    def new_hashes(self, number: int) -> list[BlockHash]:
        """Hashes that no other prefix has."""
        return chain_hashes([Segment(next(self._streams), number * BLOCK)], BLOCK, _ROOT) if number else []

    def keys(self, hashes: list[BlockHash], group: int = 0) -> KeyRun:
        """The keys of all chunks of ``hashes`` in one group."""
        return KeyRun(hashes, GroupId(group), 0, 1, len(hashes))

    def _fill(self, hashes: list[BlockHash]) -> None:
        ctx = ReqContext(f"fill.{next(self._streams)}")
        self.manager.on_new_request(ctx)
        for group in range(len(self.config.groups)):
            keys = self.keys(hashes, group)
            output = self.manager.prepare_store(keys, ctx)
            assert output is not None, f"the pool has no room for {len(keys)} chunks of group {group}"
            self.manager.complete_store(output.keys_to_store, ctx)
        self.manager.on_request_finished(ctx)


@final
@dataclass(slots=True, eq=False)
class CrowdRequest:
    """What the connector looks at in a request, and the blocks it was told of."""

    request_id: str
    num_prompt_tokens: int
    num_tokens: int
    block_hashes: list[BlockHash]
    num_computed_tokens: int = 0
    num_blocks: int = 0


@final
@dataclass(frozen=True, slots=True)
class AdmissionTimes:
    """Seconds of the scheduler side for one request whose whole prefix comes from the host.

    ``load_step_s`` is the step that loads, ``first_steps_s`` the two in which its first token is computed and
    what it holds is offered to the host, ``end_s`` its end and the step after it: whole steps, with all that
    they cost without this request.
    """

    lookup_s: float
    allocation_s: float
    load_step_s: float
    first_steps_s: float
    end_s: float


@final
@dataclass(slots=True)
class Crowd:
    """Requests that run on the contexts of a pool."""

    pool: FullPool
    running: list[CrowdRequest] = field(default_factory=list)
    _ids: count[int] = field(default_factory=count)
    _blocks: count[int] = field(default_factory=count)

    def enter(self, num_requests: int, context_tokens: int) -> None:
        """Admit requests whose contexts the device holds, with a few tokens more of their own.

        Afterwards a sixteenth of them finishes a block in each step of one token.
        """
        for index in range(num_requests):
            request = self._new_request(index, context_tokens, 1 + index % BLOCK)
            self.pool.connector.on_new_request(request)
            self.pool.connector.get_num_new_matched_tokens(request, context_tokens)
            self._allocate(request, context_tokens)
            self.running.append(request)
        self.step({request: request.num_tokens - request.num_computed_tokens for request in self.running})
        self.settle()

    def leave(self) -> None:
        """End all requests."""
        for request in self.running:
            self.pool.connector.request_finished_all_groups(request, [])
        self.step({}, finished=self.running)
        self.running = []
        self.settle()

    def settle(self) -> None:
        """Empty steps until nothing is left to be done."""
        self.step({})
        while self.pool.connector.has_pending_push_work():
            self.step({})

    def decode(self) -> float:
        """Every request computes one token; seconds of the scheduler side."""
        return self.step(dict.fromkeys(self.running, 1))

    def align(self, offset: int) -> None:
        """Let every request compute up to ``offset`` tokens behind a block boundary, and settle."""
        ahead = {one: (offset - one.num_computed_tokens - 1) % BLOCK + 1 for one in self.running}
        self.step(ahead)
        self.settle()

    def spread(self) -> None:
        """Let a sixteenth of the requests stand at each offset, and settle."""
        self.step(
            {one: (index - one.num_computed_tokens - 1) % BLOCK + 1 for index, one in enumerate(self.running)}
        )
        self.settle()

    def step(self, tokens: Mapping[CrowdRequest, int], finished: Iterable[CrowdRequest] = ()) -> float:
        """One step in which requests compute so many tokens; seconds of ``build_connector_meta`` and
        ``update_connector_output``, with every transfer ended in between."""
        output = SchedulerOutput(
            {request.request_id: number for request, number in tokens.items()},
            self._new_blocks(tokens),
            finished_req_ids={request.request_id for request in finished},
        )
        connector = self.pool.connector
        start = perf_counter()
        metadata = connector.build_connector_meta(output)
        elapsed = perf_counter() - start
        results = self._transfer(metadata)
        for request, number in tokens.items():
            request.num_computed_tokens += number
        start = perf_counter()
        connector.update_connector_output(results)
        elapsed += perf_counter() - start
        for request in tokens:
            self._generate(request)
        return elapsed

    def admit_from_host(self, context: int, context_tokens: int) -> AdmissionTimes:
        """One more request comes, loads all of a context, computes a token and leaves."""
        connector = self.pool.connector
        request = self._new_request(context, context_tokens, 1)
        start = perf_counter()
        connector.on_new_request(request)
        found, _ = connector.get_num_new_matched_tokens(request, 0)
        lookup_s = perf_counter() - start
        assert found == context_tokens, f"{found} of {context_tokens} tokens are on the host"
        allocation_s = self._allocate(request, context_tokens, found)
        load_step_s = self.step({})
        request.num_computed_tokens = found
        allocation_s += self._allocate(request, context_tokens)
        first_steps_s = self.step({request: 1}) + self.step({})
        start = perf_counter()
        connector.request_finished_all_groups(request, [])
        end_s = perf_counter() - start + self.step({}, finished=[request])
        self.settle()
        return AdmissionTimes(lookup_s, allocation_s, load_step_s, first_steps_s, end_s)

    def admit_on_device(self, context: int, context_tokens: int) -> float:
        """One more request comes that finds all of a context on the device, computes a token and leaves.

        Seconds up to the step that offers what it found to the host, two whole steps included.
        """
        connector = self.pool.connector
        request = self._new_request(context, context_tokens, 1)
        start = perf_counter()
        connector.on_new_request(request)
        connector.get_num_new_matched_tokens(request, context_tokens)
        elapsed = perf_counter() - start + self._allocate(request, context_tokens)
        elapsed += self.step({request: 1}) + self.step({})
        connector.request_finished_all_groups(request, [])
        self.step({}, finished=[request])
        self.settle()
        return elapsed

    def _new_request(self, context: int, context_tokens: int, own_tokens: int) -> CrowdRequest:
        hashes = self.pool.contexts[context % len(self.pool.contexts)][: context_tokens // BLOCK]
        num_tokens = context_tokens + own_tokens
        request = CrowdRequest(f"r{next(self._ids)}", num_tokens, num_tokens, list(hashes))
        request.block_hashes.extend(self.pool.new_hashes(num_tokens // BLOCK - len(hashes)))
        return request

    def _allocate(self, request: CrowdRequest, num_tokens: int, num_external: int = 0) -> float:
        """Blocks of ``num_tokens`` tokens; a window or a state only where the next token reads it."""
        tables: Tables = []
        request.num_blocks = num_tokens // BLOCK
        for held in _HELD_BLOCKS:
            num_held = request.num_blocks if held is None else min(held, request.num_blocks)
            blocks = [BlockId(next(self._blocks) % (1 << 24)) for _ in range(num_held)]
            tables.append([*([None] * (request.num_blocks - num_held)), *blocks])
        if not num_external:
            request.num_computed_tokens = num_tokens
        start = perf_counter()
        self.pool.connector.update_state_after_alloc(request, tables, num_external)
        return perf_counter() - start

    def _new_blocks(self, tokens: Mapping[CrowdRequest, int]) -> dict[str, Tables]:
        new: dict[str, Tables] = {}
        for request, number in tokens.items():
            needed = -(-(request.num_computed_tokens + number) // BLOCK) - request.num_blocks
            if needed > 0:
                request.num_blocks += needed
                new[request.request_id] = [
                    [BlockId(next(self._blocks) % (1 << 24)) for _ in range(needed)] for _ in _HELD_BLOCKS
                ]
        return new

    def _generate(self, request: CrowdRequest) -> None:
        """A token comes out behind the last known one, and sometimes completes a block's hash."""
        request.num_tokens = max(request.num_tokens, request.num_computed_tokens + 1)
        lacking = request.num_tokens // BLOCK - len(request.block_hashes)
        if lacking > 0:
            request.block_hashes.extend(self.pool.new_hashes(lacking))

    def _transfer(self, metadata: OffloadingConnectorMetadata) -> KVConnectorOutput:
        connector = self.pool.connector
        connector.handle_preemptions({}, metadata)
        connector.bind_connector_metadata(metadata)
        connector.start_load_kv({})
        results = connector.get_transfer_results(frozenset())
        connector.clear_connector_metadata()
        return results
