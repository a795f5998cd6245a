"""Neighbouring chunks of one request: which blocks they are, and which of those carry bytes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.hits import reads_every_token, unread_blocks
from jaxkv.keys import BlockHash, BlockId, GroupId, KeyRun

BlockIds = npt.NDArray[np.int32]
"""Blocks of chunks in table order, int32; -1 where no bytes are moved."""


@final
@dataclass(slots=True, eq=False)
class ChunkSpan:
    """Chunks ``chunks`` of a group, and their keys. A tail is one chunk cut short at ``cut_tokens``.

    Not to be changed (it is not frozen because a step makes many).
    """

    group: GroupId
    chunks: range
    keys: KeyRun
    cut_tokens: int | None = None

    def __len__(self) -> int:
        return len(self.chunks)


@final
@dataclass(slots=True, eq=False)
class PlannedSpan:
    """Chunks to store and their blocks, ``blocks_per_chunk`` for each; -1 where nothing is kept.

    Not to be changed.
    """

    span: ChunkSpan
    block_ids: Sequence[int]


def whole_span(
    caches: ChunkedCaches, block_hashes: Sequence[BlockHash], group: GroupId, chunks: range
) -> ChunkSpan:
    """Chunks that are not cut."""
    return ChunkSpan(group, chunks, caches.keys(block_hashes, group, chunks))


def tail_span(
    caches: ChunkedCaches, block_hashes: Sequence[BlockHash], group: GroupId, end_tokens: int
) -> ChunkSpan:
    """The chunk that holds token ``end_tokens - 1``, as it is when that is the last one."""
    chunk = (end_tokens - 1) // caches.tokens_per_chunk(group)
    keys = caches.tail_key(block_hashes, group, end_tokens)
    return ChunkSpan(group, range(chunk, chunk + 1), keys, end_tokens)


def end_tokens_of(caches: ChunkedCaches, span: ChunkSpan) -> int:
    """The boundary a span reaches to."""
    if span.cut_tokens is not None:
        return span.cut_tokens
    return span.chunks.stop * caches.tokens_per_chunk(span.group)


def payload_blocks(caches: ChunkedCaches, span: ChunkSpan) -> range:
    """Table positions whose bytes a chunk keeps: all it has, or of recurrent states the last one alone."""
    blocks = caches.blocks(span.chunks)
    block_size = caches.config.groups[span.group].block_size
    end = blocks.stop if span.cut_tokens is None else -(-span.cut_tokens // block_size)
    if caches.is_state(span.group):
        last = end - 1 if span.cut_tokens is not None else blocks.start + caches.blocks_per_chunk - 1
        return range(last, end, caches.blocks_per_chunk)
    return range(blocks.start, end)


def unread_at_ends(caches: ChunkedCaches, span: ChunkSpan) -> Iterator[range]:
    """For each chunk the table positions that not even the boundary it ends at reads, and so no later one."""
    spec = caches.config.groups[span.group].spec
    if reads_every_token(spec):
        return
    if span.cut_tokens is not None:
        yield unread_blocks(spec, span.cut_tokens)
        return
    size = caches.tokens_per_chunk(span.group)
    for chunk in span.chunks:
        unread = unread_blocks(spec, (chunk + 1) * size)
        yield range(max(chunk * caches.blocks_per_chunk, unread.start), unread.stop)


def block_ids(caches: ChunkedCaches, span: ChunkSpan, table: Sequence[BlockId | None]) -> BlockIds:
    """The blocks of a span, ``blocks_per_chunk`` for each chunk; -1 where it has none or no payload."""
    blocks = caches.blocks(span.chunks)
    held = table[blocks.start : blocks.stop]
    keep = payload_blocks(caches, span)
    if keep == blocks and len(held) == len(blocks) and None not in held:
        return np.array(held, np.int32)
    ids = np.full(len(blocks), -1, np.int32)
    ids[: len(held)] = [-1 if block is None else block for block in held]
    if keep != blocks:
        no_payload = np.ones(len(blocks), bool)
        no_payload[keep.start - blocks.start : keep.stop - blocks.start : keep.step] = False
        ids[no_payload] = -1
    return ids


def shrinking_prefixes(
    caches: ChunkedCaches, spans: Sequence[PlannedSpan]
) -> Iterator[Sequence[PlannedSpan]]:
    """All spans, then those of ever shorter prefixes, each of about half as many boundaries.

    A pool that has no room for all of a long step may have room for its beginning.
    """
    if not spans:
        return
    yield spans
    ends = sorted({end for planned in spans for end in chunk_ends(caches, planned.span)})
    while len(ends) > 1:
        ends = ends[: len(ends) // 2]
        yield [part for planned in spans if (part := _up_to(caches, planned, ends[-1])) is not None]


def chunk_ends(caches: ChunkedCaches, span: ChunkSpan) -> Sequence[int]:
    """Where each chunk of a span ends, in tokens."""
    if span.cut_tokens is not None:
        return (span.cut_tokens,)
    size = caches.tokens_per_chunk(span.group)
    return range((span.chunks.start + 1) * size, span.chunks.stop * size + 1, size)


def _up_to(caches: ChunkedCaches, planned: PlannedSpan, limit_tokens: int) -> PlannedSpan | None:
    span = planned.span
    count = sum(end <= limit_tokens for end in chunk_ends(caches, span))
    if count in (0, len(span)):
        return planned if count else None
    part = ChunkSpan(span.group, span.chunks[:count], span.keys[:count])
    return PlannedSpan(part, planned.block_ids[: count * caches.blocks_per_chunk])
