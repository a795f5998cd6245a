"""Which chunks of a request can be stored now, and from which blocks. Pure.

A plan is made in the ``build_connector_meta`` of one step and submitted before anything of that step touches
the caches. It may read every block the request held in the step before: blocks given back since, whoever
owns them now, still hold the request's bytes in the arrays the stores are given. Those given back earlier may
not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import final

from jaxkv.connector.chunks import ChunkedCaches, ChunkId
from jaxkv.hits import unread_blocks
from jaxkv.keys import BlockHash, BlockId, GroupId, OffloadKey
from jaxkv.spec import MambaSpec


class SkipReason(Enum):
    """Why a complete chunk was not written."""

    HELD = "held"
    RELEASED = "released"
    NO_STATE = "no_state"
    UNREAD = "unread"
    REFUSED = "refused"


@final
@dataclass(frozen=True, slots=True)
class StoreView:
    """What store planning may know of a request.

    ``complete_tokens`` is the end of the last finished step, ``previous_tokens`` that of the step before;
    ``limit_tokens`` is how far the request wants to be stored. ``next_chunk`` has one entry per group.
    """

    tables: Sequence[Sequence[BlockId | None]]
    block_hashes: Sequence[BlockHash]
    next_chunk: Sequence[int]
    previous_tokens: int
    complete_tokens: int
    limit_tokens: int


@final
@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """One chunk to store. ``block_ids`` has -1 for blocks whose content is not kept."""

    chunk: ChunkId
    end_tokens: int
    key: OffloadKey
    block_ids: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class StorePlan:
    """``chunks`` group after group; ``skipped`` chunks will not become storable later."""

    chunks: tuple[PlannedChunk, ...]
    skipped: Mapping[ChunkId, SkipReason]
    next_chunk: tuple[int, ...]


def plan_stores(caches: ChunkedCaches, view: StoreView) -> StorePlan:
    """All complete chunks from ``view.next_chunk`` on, and where to go on if all of them are taken."""
    horizon = min(view.complete_tokens, view.limit_tokens, caches.hashed_tokens(view.block_hashes))
    planned: list[PlannedChunk] = []
    skipped: dict[ChunkId, SkipReason] = {}
    next_chunk: list[int] = []
    for group, first in enumerate(view.next_chunk):
        end = max(first, horizon // caches.tokens_per_chunk(GroupId(group)))
        for index in range(first, end):
            chunk = ChunkId(GroupId(group), index)
            found = _readable_blocks(caches, view, chunk)
            if isinstance(found, SkipReason):
                skipped[chunk] = found
            else:
                key = caches.key(view.block_hashes, chunk)
                planned.append(PlannedChunk(chunk, caches.end_tokens(chunk), key, found))
        next_chunk.append(end)
    return StorePlan(tuple(planned), skipped, tuple(next_chunk))


def shrinking_prefixes(chunks: Sequence[PlannedChunk]) -> Iterator[tuple[PlannedChunk, ...]]:
    """All chunks, then those of ever shorter prefixes, each of about half as many boundaries.

    A pool that has no room for all of a long step may have room for its beginning.
    """
    ends = sorted({chunk.end_tokens for chunk in chunks})
    while ends:
        yield tuple(chunk for chunk in chunks if chunk.end_tokens <= ends[-1])
        ends = ends[: len(ends) // 2]


def _readable_blocks(caches: ChunkedCaches, view: StoreView, chunk: ChunkId) -> tuple[int, ...] | SkipReason:
    """The chunk's block ids, -1 for blocks no later boundary needs."""
    spec = caches.config.groups[chunk.group].spec
    if isinstance(spec, MambaSpec) and not _state_stands_at(view, caches.end_tokens(chunk)):
        return SkipReason.NO_STATE
    # The first boundary that reads the chunk is its own end; what is unread there, no boundary reads.
    never_read = unread_blocks(spec, caches.end_tokens(chunk))
    wanted = [position for position in caches.payload_blocks(chunk) if position not in never_read]
    if not wanted:
        return SkipReason.UNREAD
    table = view.tables[chunk.group]
    given_back = unread_blocks(spec, view.previous_tokens)
    block_ids: list[int] = []
    for position in caches.blocks(chunk):
        block = table[position] if position < len(table) else None
        if position not in wanted:
            block_ids.append(-1)
        elif block is None or position in given_back:
            return SkipReason.RELEASED
        else:
            block_ids.append(block)
    return tuple(block_ids)


def _state_stands_at(view: StoreView, boundary_tokens: int) -> bool:
    """Whether a recurrent state of this boundary is on the device: a step, or a load, ended there."""
    return boundary_tokens in (view.previous_tokens, view.complete_tokens)
