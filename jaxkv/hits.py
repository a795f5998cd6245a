"""Which chunks make a prefix reusable, and the longest prefix every group can serve.

Pure: the device prefix cache of a serving loop and the connector's host lookup ask the same question of
different stores, so both ask it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, assert_never, final

from jaxkv.keys import GroupId
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


class Presence(Protocol):
    """Which chunks of one request a store can read. Chunks are counted from the start of the request."""

    def count_leading(self, group: GroupId, chunks: range) -> int:
        """How many of ``chunks``, from the first on, are there before the first that is not."""

    def count_trailing(self, group: GroupId, chunks: range) -> int:
        """How many of ``chunks``, from the last one back, are there before the first that is not."""


class TailPresence(Presence, Protocol):
    """A store that also keeps last chunks of a prompt cut short where it ends."""

    def has_tail(self, group: GroupId, end_tokens: int) -> bool:
        """Whether the chunk that holds token ``end_tokens - 1`` is there as it was at ``end_tokens``."""


@final
@dataclass(frozen=True, slots=True)
class HitGroup:
    """What hit search needs to know of one group."""

    spec: LayerSpec
    tokens_per_chunk: int


def reads_every_token(spec: LayerSpec) -> bool:
    """Whether the next token reads every token before it, however many there are."""
    return isinstance(spec, FullAttentionSpec | MLAAttentionSpec)


def required_chunks(group: HitGroup, boundary_tokens: int) -> tuple[range, range]:
    """Whole chunks that stand for tokens ``[0, boundary_tokens)`` when the next token is computed.

    The first range holds attention sinks, the second what lies behind the unread tokens. Where
    ``boundary_tokens`` is no multiple of the group's chunk, ``cut_chunk`` is needed as well.
    """
    unread = unread_chunks(group, boundary_tokens)
    return range(unread.start), range(unread.stop, boundary_tokens // group.tokens_per_chunk)


def missing_chunks(group: HitGroup, boundary_tokens: int, known_tokens: int) -> tuple[range, range]:
    """Those of ``required_chunks`` of which ``known_tokens`` do not cover all that is read."""
    sinks, behind = required_chunks(group, boundary_tokens)
    first_unknown = known_tokens // group.tokens_per_chunk
    unread = _unread_tokens(group.spec, boundary_tokens)
    if known_tokens < unread.start:
        first_behind = max(first_unknown, behind.start)
        sinks = range(first_unknown, max(first_unknown, sinks.stop))
    else:
        # A chunk of which only sinks are read, and unread tokens lie behind them, is known well enough.
        first_behind = max(first_unknown, behind.start, unread.stop // group.tokens_per_chunk)
        sinks = range(0)
    return sinks, range(first_behind, max(first_behind, behind.stop))


def cut_chunk(group: HitGroup, boundary_tokens: int) -> int | None:
    """The chunk that a boundary cuts, if the next token reads any of the part before it."""
    start = boundary_tokens - boundary_tokens % group.tokens_per_chunk
    unread = _unread_tokens(group.spec, boundary_tokens)
    is_read = start < boundary_tokens and not (unread.start <= start and boundary_tokens <= unread.stop)
    return boundary_tokens // group.tokens_per_chunk if is_read else None


def unread_blocks(spec: LayerSpec, num_computed_tokens: int) -> range:
    """Blocks of a request that no token behind its ``num_computed_tokens`` reads: they may be given back.

    The request must still hold those before them (attention sinks) and all those behind.
    """
    return _whole_units(_unread_tokens(spec, num_computed_tokens), spec.block_size)


def unread_chunks(group: HitGroup, boundary_tokens: int) -> range:
    """Chunks of which no token behind the boundary reads anything."""
    return _whole_units(_unread_tokens(group.spec, boundary_tokens), group.tokens_per_chunk)


def _unread_tokens(spec: LayerSpec, num_computed_tokens: int) -> range:
    """Computed tokens whose cache no later token reads; what is unread once stays so.

    Full attention and MLA read every token; a window of W its sinks and the W - 1 tokens before the next one;
    chunked local the tokens since the last multiple of its attention chunk, none at the multiple itself.
    A recurrent layer reads the state at the boundary alone, which lies in the last token's block.
    """
    match spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            return range(0)
        case SlidingWindowSpec(sliding_window=window, sink_len=sinks):
            return range(sinks, max(sinks, num_computed_tokens - (window - 1)))
        case ChunkedLocalAttentionSpec(attention_chunk_size=size):
            return range(num_computed_tokens - num_computed_tokens % size)
        case MambaSpec():
            return range(max(0, num_computed_tokens - 1))
        case _:
            assert_never(spec)


def _whole_units(tokens: range, unit_tokens: int) -> range:
    """The units of ``unit_tokens`` tokens that lie in ``tokens`` completely; ``range(0)`` for none."""
    first, end = -(-tokens.start // unit_tokens), tokens.stop // unit_tokens
    return range(first, end) if first < end else range(0)


def longest_hit(
    groups: Sequence[HitGroup],
    known_tokens: int,
    limit_tokens: int,
    alignment_tokens: int,
    presence: Presence,
) -> int:
    """The largest aligned boundary in ``[known_tokens, limit_tokens]`` that every group can serve.

    ``known_tokens`` are held already by every group (0, or the device hit when the host is searched), so only
    chunks behind them are asked for. Answers ``known_tokens`` where nothing more can be served. Each group
    lowers the candidate to the largest boundary it can serve, round and round, until none objects (vLLM's
    fixed point). No boundary that all can serve is skipped, though a group may serve one and not a lower one.
    Groups that read every token are asked first: what they lack, no boundary behind it can do without.
    """
    boundary = limit_tokens - limit_tokens % alignment_tokens
    order = sorted(enumerate(groups), key=lambda numbered: not reads_every_token(numbered[1].spec))
    settled = 0
    while boundary > known_tokens and settled < len(groups):
        for index, group in order:
            served = _largest_served(
                group, GroupId(index), known_tokens, boundary, alignment_tokens, presence
            )
            settled = settled + 1 if served == boundary else 1
            boundary = served
            if boundary <= known_tokens or settled >= len(groups):
                break
    return max(boundary, known_tokens)


def longest_tail(
    groups: Sequence[HitGroup],
    known_tokens: int,
    boundaries: range,
    presence: TailPresence,
) -> int | None:
    """The largest of ``boundaries`` (ascending) that every group can serve, with chunks cut short there."""
    for boundary in reversed(boundaries):
        if all(
            _serves_tail(group, GroupId(index), known_tokens, boundary, presence)
            for index, group in enumerate(groups)
        ):
            return boundary
    return None


def _serves_tail(
    group: HitGroup, group_id: GroupId, known: int, boundary: int, presence: TailPresence
) -> bool:
    if _last_missing(group, group_id, known, boundary, presence) is not None:
        return False
    return cut_chunk(group, boundary) is None or presence.has_tail(group_id, boundary)


def _largest_served(
    group: HitGroup, group_id: GroupId, known: int, boundary: int, alignment: int, presence: Presence
) -> int:
    """The largest aligned boundary in ``[known, boundary]`` that this group alone can serve."""
    match group.spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            asked = range(known // group.tokens_per_chunk, boundary // group.tokens_per_chunk)
            served = (asked.start + presence.count_leading(group_id, asked)) * group.tokens_per_chunk
            return max(known, served - served % alignment)
        case SlidingWindowSpec() | ChunkedLocalAttentionSpec() | MambaSpec():
            while boundary > known:
                missing = _last_missing(group, group_id, known, boundary, presence)
                if missing is None:
                    return boundary
                # All boundaries between the missing chunk and this one need that chunk too.
                below = missing * group.tokens_per_chunk
                boundary = below - below % alignment
            return known
        case _:
            assert_never(group.spec)


def _last_missing(
    group: HitGroup, group_id: GroupId, known: int, boundary: int, presence: Presence
) -> int | None:
    """The last whole chunk that ``boundary`` needs, ``known`` tokens do not cover and is not there."""
    for asked in reversed(missing_chunks(group, boundary, known)):
        found = presence.count_trailing(group_id, asked) if asked else 0
        if found < len(asked):
            return asked[-1 - found]
    return None
