"""Block tables of the requests that hold blocks, one per group, over the groups' block pools.

Decides which blocks a step needs, takes them all or none, gives back what no later token reads, and makes
complete, computed blocks findable. Knows no queues and no arrays of the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from typing import assert_never, final

import numpy as np
import numpy.typing as npt

from jaxkv.hits import HitGroup, cut_chunk, longest_hit, required_chunks, unread_blocks
from jaxkv.keys import BlockId, GroupId
from jaxkv.serving.block_pool import BlockPool
from jaxkv.serving.chunking import Chunk
from jaxkv.serving.request import Request
from jaxkv.serving.sizing import ceil_div
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


@final
class BlockTable:
    """The blocks of one request in one group: ``row`` (max_blocks,) int32, -1 where it holds none.

    Entries from ``length`` on were never taken; those that were given back lie below ``given_back_end``.
    """

    __slots__ = ("given_back_end", "length", "row")

    def __init__(self, max_blocks: int) -> None:
        self.row = np.full(max_blocks, -1, np.int32)
        self.given_back_end = 0
        self.length = 0

    def put(self, index: int, block: BlockId) -> None:
        """Hold ``block`` at ``index``; entries skipped over stay holes."""
        assert self.row[index] < 0, f"entry {index} holds block {self.row[index]} already"
        self.row[index] = block
        self.length = max(self.length, index + 1)

    def move_last(self, index: int) -> None:
        """Let the block that is held last stand at ``index``, which holds none."""
        assert self.row[index] < 0, f"entry {index} holds block {self.row[index]} already"
        block = self.row[self.length - 1]
        self.row[self.length - 1] = -1
        self.row[index] = block
        self.length = index + 1

    def block_ids(self, first: int = 0, end: int | None = None) -> list[BlockId | None]:
        """Entries ``[first, end)``, by default all behind ``first``; holes as ``None``."""
        entries = self.row[first : self.length if end is None else end]
        return [BlockId(block) if block >= 0 else None for block in entries.tolist()]


def blocks_of_step(spec: LayerSpec, chunk: Chunk, num_tokens: int) -> tuple[range, ...]:
    """Table entries that must hold blocks while ``chunk`` is computed, ascending.

    Full attention and MLA take the blocks of all known tokens at once, so that an admitted prompt never waits
    for more of them.
    """
    match spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            return (range(ceil_div(max(num_tokens, chunk.end), spec.block_size)),)
        case SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            unread = unread_blocks(spec, chunk.start)
            return range(unread.start), range(unread.stop, ceil_div(chunk.end, spec.block_size))
        case MambaSpec():
            written = (chunk.end - 1) // spec.block_size
            read = (chunk.start - 1) // spec.block_size if chunk.start else written
            return range(read, read + 1), range(max(read + 1, written), written + 1)
        case _:
            assert_never(spec)


@final
@dataclass(slots=True)
class _RequestTables:
    """Tables of one request, how many of its tokens are findable, and what the connector has been told.

    ``step_end`` are the tokens that are computed once the planned step has run.
    """

    tables: tuple[BlockTable, ...]
    registered_tokens: int
    reported: tuple[int, ...]
    step_end: int


@final
class CacheManager:
    """Tables and pools of all groups. ``max_tokens`` is the longest sequence; it fixes the table width."""

    def __init__(self, config: KVCacheConfig, max_tokens: int) -> None:
        self.config = config
        self.specs = tuple(group.spec for group in config.groups)
        self.pools = tuple(BlockPool(group.num_blocks) for group in config.groups)
        self.max_blocks = tuple(ceil_div(max_tokens, spec.block_size) for spec in self.specs)
        self._hit_groups = tuple(HitGroup(spec, spec.block_size) for spec in self.specs)
        self._lookahead = tuple(config.hash_block_size * group.is_eagle_group for group in config.groups)
        self._held: dict[str, _RequestTables] = {}

    @property
    def num_evictions(self) -> int:
        """Cached prefixes' blocks that were taken for new content, over all groups."""
        return sum(pool.num_evictions for pool in self.pools)

    def find_hit(self, request: Request) -> int:
        """Tokens of the longest prefix that every group holds; at least one token is left to compute."""
        if request.skip_reading_prefix_cache:
            return 0
        limit = request.num_tokens - 1
        presence = _DevicePresence(self, request)
        return longest_hit(self._hit_groups, 0, limit, self.config.alignment_tokens, presence)

    def find_block(self, request: Request, group: GroupId, index: int) -> BlockId | None:
        """The cached block that holds what entry ``index`` of the request would, if there is one.

        What a drafter caches for a token depends on the next one too, so its blocks are named one link later.
        """
        link = self._link(group, index)
        return (
            self.pools[group].find(request.block_hashes[link]) if link < len(request.block_hashes) else None
        )

    def admit(self, request: Request, device_hit: int, boundary: int, chunk: Chunk) -> bool:
        """Take blocks for a request that holds none: all of them, or ``False`` and nothing changed.

        Tokens ``[0, device_hit)`` come from cached blocks; new blocks await the load of
        ``[device_hit, boundary)``; more new blocks serve ``chunk``, the first to be computed.
        """
        assert request.request_id not in self._held, f"{request.request_id} holds blocks already"
        plans = [
            self._plan_admission(request, GroupId(group), device_hit, boundary, chunk)
            for group in range(len(self.pools))
        ]
        for pool, (cached, fresh) in zip(self.pools, plans, strict=True):
            if len(fresh) > pool.num_free - sum(pool.is_free(block) for block in cached.values()):
                return False
        tables = tuple(BlockTable(max_blocks) for max_blocks in self.max_blocks)
        # Known to the manager before any block is taken, so that release() finds what an exception left.
        self._held[request.request_id] = _RequestTables(tables, device_hit, (0,) * len(tables), chunk.end)
        for pool, table, (cached, fresh) in zip(self.pools, tables, plans, strict=True):
            for index, block in cached.items():
                pool.acquire(block)
                table.put(index, block)
            for index in fresh:
                table.put(index, pool.allocate())
        return True

    def extend(self, request: Request, chunk: Chunk) -> bool:
        """Take the blocks ``chunk`` needs beyond those held: all of them, or ``False`` with none taken.

        First gives back what neither this nor a later token reads.
        """
        held = self._held[request.request_id]
        tables, held.step_end = held.tables, chunk.end
        self._release_unread(tables, chunk.start)
        self._place_reserved_states(tables, chunk)
        wanted = [
            [
                index
                for entries in blocks_of_step(spec, chunk, request.num_tokens)
                for index in range(max(entries.start, table.length), entries.stop)
            ]
            for spec, table in zip(self.specs, tables, strict=True)
        ]
        if any(len(new) > pool.num_free for new, pool in zip(wanted, self.pools, strict=True)):
            return False
        for pool, table, new in zip(self.pools, tables, wanted, strict=True):
            for index in new:
                table.put(index, pool.allocate())
        return True

    def register(self, request: Request, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens are computed or loaded: make their complete blocks findable.

        A state is cached only here, at the end of a step, and only if that end is a block boundary.
        """
        held = self._held[request.request_id]
        for group, (spec, table) in enumerate(zip(self.specs, held.tables, strict=True)):
            done = self._num_final_blocks(group, num_tokens)
            if isinstance(spec, MambaSpec):
                first = done - 1 if num_tokens % spec.block_size == 0 else done
            else:
                first = self._num_final_blocks(group, held.registered_tokens)
            for index in range(max(first, 0), done):
                # What even a hit that ends with the block does not read would only push out other prefixes.
                is_read = index not in unread_blocks(spec, (index + 1) * spec.block_size)
                if is_read and table.row[index] >= 0:
                    block = BlockId(int(table.row[index]))
                    self.pools[group].register(block, request.block_hashes[self._link(group, index)])
        held.registered_tokens = max(held.registered_tokens, num_tokens)

    def release(self, request: Request) -> None:
        """Give back all blocks of a request, its last ones to be evicted first. Safe if it holds none."""
        held = self._held.pop(request.request_id, None)
        if held is None:
            return
        for pool, table in zip(self.pools, held.tables, strict=True):
            for index in reversed(range(table.length)):
                if table.row[index] >= 0:
                    pool.release(BlockId(int(table.row[index])))

    def holds(self, request: Request) -> bool:
        """Whether the request has tables."""
        return request.request_id in self._held

    def row(self, request: Request, group: int) -> npt.NDArray[np.int32]:
        """The live table row of one group, (max_blocks,) int32; not to be written."""
        return self._held[request.request_id].tables[group].row

    def all_tables(self, request: Request) -> list[list[BlockId | None]]:
        """Complete tables for the connector; from here on only what is new is told. Empty if none held."""
        held = self._held.get(request.request_id)
        if held is None:
            return [[] for _ in self.pools]
        held.reported = tuple(table.length for table in held.tables)
        return [table.block_ids() for table in held.tables]

    def loaded_tables(self, request: Request, num_tokens: int) -> list[list[BlockId | None]]:
        """Tables of the ``num_tokens`` tokens a load brought, for the connector.

        What was taken at admission for the first chunk is told as new when that chunk is scheduled.
        """
        held = self._held[request.request_id]
        held.reported = tuple(ceil_div(num_tokens, spec.block_size) for spec in self.specs)
        return [table.block_ids(0, end) for table, end in zip(held.tables, held.reported, strict=True)]

    def new_tables(self, request: Request) -> list[list[BlockId | None]] | None:
        """Entries appended since the connector was last told, or ``None`` if there are none.

        A state block that is reserved for a later step may still be moved, so it is not told of yet.
        """
        held = self._held[request.request_id]
        ends = tuple(
            max(told, min(table.length, ceil_div(held.step_end, spec.block_size)))
            if isinstance(spec, MambaSpec)
            else table.length
            for spec, table, told in zip(self.specs, held.tables, held.reported, strict=True)
        )
        if ends == held.reported:
            return None
        told = zip(held.tables, held.reported, ends, strict=True)
        new = [table.block_ids(first, end) for table, first, end in told]
        held.reported = ends
        return new

    def clear_cache(self) -> None:
        """Forget every cached prefix; running requests keep their blocks."""
        for pool in self.pools:
            pool.clear_cache()

    def _plan_admission(
        self, request: Request, group: GroupId, device_hit: int, boundary: int, chunk: Chunk
    ) -> tuple[dict[int, BlockId], list[int]]:
        """Entries filled from the prefix cache, and entries that need a new block."""
        spec = self.specs[group]
        needed = list(chain.from_iterable(required_chunks(self._hit_groups[group], boundary)))
        cut = cut_chunk(self._hit_groups[group], boundary)
        if cut is not None:
            needed.append(cut)
        cached = {}
        for index in needed:
            if index < device_hit // spec.block_size:
                block = self.find_block(request, group, index)
                assert block is not None, f"group {group} lost block {index} of a hit of {device_hit} tokens"
                cached[index] = block
        entries = sorted({*needed, *chain.from_iterable(blocks_of_step(spec, chunk, request.num_tokens))})
        return cached, [index for index in entries if index not in cached]

    def _release_unread(self, tables: tuple[BlockTable, ...], num_computed: int) -> None:
        for spec, pool, table in zip(self.specs, self.pools, tables, strict=True):
            unread = unread_blocks(spec, num_computed)
            end = min(unread.stop, table.length)
            for index in range(max(unread.start, table.given_back_end), end):
                if table.row[index] >= 0:
                    pool.release(BlockId(int(table.row[index])))
                    table.row[index] = -1
            table.given_back_end = max(table.given_back_end, end)

    def _place_reserved_states(self, tables: tuple[BlockTable, ...], chunk: Chunk) -> None:
        """Put a state block taken for a chunk of another length, before a load, where ``chunk`` ends."""
        for spec, table in zip(self.specs, tables, strict=True):
            if isinstance(spec, MambaSpec):
                written = (chunk.end - 1) // spec.block_size
                holds_unwritten = (table.length - 1) * spec.block_size >= chunk.start
                if holds_unwritten and table.row[written] < 0:
                    table.move_last(written)

    def _link(self, group: int, index: int) -> int:
        """The link of the request's hash chain that names a block."""
        end_tokens = (index + 1) * self.specs[group].block_size + self._lookahead[group]
        return end_tokens // self.config.hash_block_size - 1

    def _num_final_blocks(self, group: int, num_tokens: int) -> int:
        """Blocks of ``num_tokens`` computed tokens that no later token changes."""
        return max(0, num_tokens - self._lookahead[group]) // self.specs[group].block_size


@final
class _DevicePresence:
    """Which blocks of a request the device cache holds; a ``Presence``."""

    def __init__(self, cache: CacheManager, request: Request) -> None:
        self._cache = cache
        self._request = request

    def count_leading(self, group: GroupId, chunks: range) -> int:
        """See ``Presence``."""
        return sum(1 for _ in takewhile(partial(self._holds, group), chunks))

    def count_trailing(self, group: GroupId, chunks: range) -> int:
        """See ``Presence``."""
        return sum(1 for _ in takewhile(partial(self._holds, group), reversed(chunks)))

    def _holds(self, group: GroupId, index: int) -> bool:
        return self._cache.find_block(self._request, group, index) is not None
