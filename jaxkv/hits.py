"""Which chunks make a prefix reusable, and the longest prefix every group can serve.

Pure: the device prefix cache of a serving loop and the connector's host lookup ask the same question of
different stores, so both ask it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never, final

from jaxkv.keys import GroupId
from jaxkv.spec import FullAttentionSpec, LayerSpec, MambaSpec, SlidingWindowSpec

IsPresent = Callable[[GroupId, int], bool]
"""Whether chunk ``index`` (counted from the start of the request) of a group can be read."""


@final
@dataclass(frozen=True, slots=True)
class HitGroup:
    """What hit search needs to know of one group."""

    spec: LayerSpec
    tokens_per_chunk: int


def required_chunks(group: HitGroup, boundary_tokens: int) -> range:
    """Chunks that stand for tokens ``[0, boundary_tokens)`` when the next token is computed.

    ``boundary_tokens`` is a multiple of the group's chunk. Full attention reads every token; a window of W
    reads the W - 1 tokens before the next one; a recurrent layer reads the state at the boundary alone.
    """
    end = boundary_tokens // group.tokens_per_chunk
    match group.spec:
        case FullAttentionSpec():
            return range(end)
        case SlidingWindowSpec(sliding_window=window):
            first_token = max(0, boundary_tokens - (window - 1))
            return range(min(first_token // group.tokens_per_chunk, end), end)
        case MambaSpec():
            return range(max(0, end - 1), end)
        case _:
            assert_never(group.spec)


def first_needed_block(spec: LayerSpec, num_computed_tokens: int) -> int:
    """Index of the first block a request must still hold after ``num_computed_tokens`` tokens.

    Blocks before it may be given back: no later token of the request reads them.
    """
    match spec:
        case FullAttentionSpec():
            return 0
        case SlidingWindowSpec(sliding_window=window):
            return max(0, num_computed_tokens - (window - 1)) // spec.block_size
        case MambaSpec():
            return max(0, num_computed_tokens - 1) // spec.block_size
        case _:
            assert_never(spec)


def longest_hit(
    groups: Sequence[HitGroup],
    known_tokens: int,
    limit_tokens: int,
    alignment_tokens: int,
    present: IsPresent,
) -> int:
    """The largest boundary in ``[known_tokens, limit_tokens]`` that every group can serve.

    ``known_tokens`` are held already by every group (0, or the device hit when the host is searched), so only
    chunks behind them are asked for. Answers ``known_tokens`` where nothing more can be served. Each group
    lowers the candidate to what it can serve, round and round, until none objects (vLLM's fixed point).
    """
    boundary = limit_tokens - limit_tokens % alignment_tokens
    settled = 0
    while boundary > known_tokens and settled < len(groups):
        for index, group in enumerate(groups):
            served = _largest_served(group, GroupId(index), known_tokens, boundary, alignment_tokens, present)
            settled = settled + 1 if served == boundary else 1
            boundary = served
            if boundary <= known_tokens or settled >= len(groups):
                break
    return max(boundary, known_tokens)


def _largest_served(
    group: HitGroup, group_id: GroupId, known: int, boundary: int, alignment: int, present: IsPresent
) -> int:
    """The largest aligned boundary in ``[known, boundary]`` that this group alone can serve."""
    first_unknown = known // group.tokens_per_chunk
    match group.spec:
        case FullAttentionSpec():
            chunk = first_unknown
            while chunk < boundary // group.tokens_per_chunk and present(group_id, chunk):
                chunk += 1
            served = chunk * group.tokens_per_chunk
            return max(known, served - served % alignment)
        case SlidingWindowSpec() | MambaSpec():
            while boundary > known:
                needed = required_chunks(group, boundary)
                missing = _last_missing(
                    group_id, range(max(needed.start, first_unknown), needed.stop), present
                )
                if missing is None:
                    return boundary
                below = missing * group.tokens_per_chunk
                boundary = below - below % alignment
            return known
        case _:
            assert_never(group.spec)


def _last_missing(group_id: GroupId, chunks: range, present: IsPresent) -> int | None:
    for chunk in reversed(chunks):
        if not present(group_id, chunk):
            return chunk
    return None
