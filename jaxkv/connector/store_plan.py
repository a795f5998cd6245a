"""Which chunks of a request can be stored now, and from which blocks. Pure.

A plan is made in the ``build_connector_meta`` of one step and submitted before anything of that step touches
the caches. It may read every block the request held in the step before: blocks given back since, whoever
owns them now, still hold the request's bytes in the arrays the stores are given. Those given back earlier may
not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never, final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.retention import Boundaries
from jaxkv.connector.spans import (
    BlockIds,
    ChunkSpan,
    block_ids,
    end_tokens_of,
    payload_blocks,
    tail_span,
    unread_at_ends,
    whole_span,
)
from jaxkv.hits import cut_chunk, required_chunks, unread_blocks
from jaxkv.keys import BlockHash, BlockId, GroupId
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


class SkipReason(Enum):
    """Why a complete chunk was not written.

    ``HELD``: the backend has it. ``RELEASED``: the request no longer holds its blocks. ``NO_STATE``: no step
    ended there. ``UNREACHABLE``: no hit that ends at a boundary worth keeping needs it. ``REFUSED``: there
    was no room; it is offered again.
    """

    HELD = "held"
    RELEASED = "released"
    NO_STATE = "no_state"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"


Skipped = Counter[tuple[GroupId, SkipReason]]
"""How many chunks were not written, by group and reason."""


@final
@dataclass(frozen=True, slots=True)
class StoreView:
    """What store planning may know of a request.

    ``complete_tokens`` is the end of the last finished step, ``previous_tokens`` that of the step before;
    ``limit_tokens`` is how far the request wants to be stored (``None``: all). ``first_chunk`` and
    ``next_chunk`` have one entry per group: where storing may begin, and where it goes on. ``tail_tokens`` is
    where a tail is still to be stored. ``handed_states`` are blocks outside the tables that hold the state of
    a group at a boundary. A request that ``has_ended`` makes its own last boundary one that later requests
    can start from.
    """

    tables: Sequence[Sequence[BlockId | None]]
    block_hashes: Sequence[BlockHash]
    first_chunk: Sequence[int]
    next_chunk: Sequence[int]
    previous_tokens: int
    complete_tokens: int
    limit_tokens: int | None
    boundaries: Boundaries
    tail_tokens: int | None = None
    handed_states: Mapping[tuple[GroupId, int], BlockId] = field(default_factory=dict)
    has_ended: bool = False

    def state_stands_at(self, group: GroupId, end_tokens: int) -> bool:
        """Whether the recurrent state at a boundary is on the device: a step, or a load, ended there."""
        ends = (self.previous_tokens, self.complete_tokens)
        return end_tokens in ends or (group, end_tokens) in self.handed_states


@final
@dataclass(frozen=True, slots=True)
class PlannedSpan:
    """Chunks to store and their blocks, ``blocks_per_chunk`` for each; -1 where nothing is kept."""

    span: ChunkSpan
    block_ids: BlockIds


@final
@dataclass(slots=True)
class StorePlan:
    """``spans`` group after group; ``skipped`` chunks will not become storable while the request runs.

    ``next_chunk`` and ``tail_tokens`` are where to go on if all of ``spans`` are taken.
    """

    spans: list[PlannedSpan] = field(default_factory=list)
    skipped: Skipped = field(default_factory=Counter)
    next_chunk: list[int] = field(default_factory=list)
    tail_tokens: int | None = None


def plan_stores(caches: ChunkedCaches, view: StoreView) -> StorePlan:
    """All complete chunks from ``view.next_chunk`` on, and the tail once it is computed."""
    horizon = _horizon(caches, view)
    end_view = _ended(caches, view, horizon) if view.has_ended else view
    plan = StorePlan()
    tail = _plan_tail(caches, view, plan, horizon)
    for index, first in enumerate(view.next_chunk):
        group = GroupId(index)
        end = max(first, caches.num_named_chunks(group, horizon))
        if end_view is not view:
            _plan_passed(caches, view, plan, group, end_view.boundaries)
        _plan_group(caches, end_view, plan, group, range(first, end))
        if group in tail:
            _add(caches, view, plan, tail[group])
        plan.next_chunk.append(end)
    return plan


def _horizon(caches: ChunkedCaches, view: StoreView) -> int:
    known = min(view.complete_tokens, caches.hashed_tokens(view.block_hashes))
    return known if view.limit_tokens is None else min(known, view.limit_tokens)


def _ended(caches: ChunkedCaches, view: StoreView, horizon: int) -> StoreView:
    """The view with the boundary at which the request ended, unless that needs nothing new."""
    last = horizon - horizon % caches.alignment_tokens
    interval, points = view.boundaries.interval_tokens, view.boundaries.points
    if last == 0 or last in points or (interval is not None and last % interval == 0):
        return view
    return replace(view, boundaries=Boundaries(interval, (*points, last)))


def next_due_tokens(caches: ChunkedCaches, view: StoreView) -> int | None:
    """Tokens that must be complete before more of ``view`` can be stored; ``None`` if nothing ever can."""
    ends = [
        caches.named_at_tokens(GroupId(group), (first + 1) * caches.tokens_per_chunk(GroupId(group)))
        for group, first in enumerate(view.next_chunk)
    ]
    if view.tail_tokens is not None:
        ends.append(
            max(caches.named_at_tokens(GroupId(g), view.tail_tokens) for g in range(caches.num_groups))
        )
    limit = view.limit_tokens
    return min((end for end in ends if limit is None or end <= limit), default=None)


def shrinking_prefixes(
    caches: ChunkedCaches, spans: Sequence[PlannedSpan]
) -> Iterator[Sequence[PlannedSpan]]:
    """All spans, then those of ever shorter prefixes, each of about half as many boundaries.

    A pool that has no room for all of a long step may have room for its beginning.
    """
    if not spans:
        return
    yield spans
    ends = sorted({end for planned in spans for end in _chunk_ends(caches, planned.span)})
    while len(ends) > 1:
        ends = ends[: len(ends) // 2]
        yield [part for planned in spans if (part := _up_to(caches, planned, ends[-1])) is not None]


def _chunk_ends(caches: ChunkedCaches, span: ChunkSpan) -> Sequence[int]:
    if span.cut_tokens is not None:
        return (span.cut_tokens,)
    size = caches.tokens_per_chunk(span.group)
    return range((span.chunks.start + 1) * size, span.chunks.stop * size + 1, size)


def _up_to(caches: ChunkedCaches, planned: PlannedSpan, limit_tokens: int) -> PlannedSpan | None:
    span = planned.span
    count = sum(end <= limit_tokens for end in _chunk_ends(caches, span))
    if count in (0, len(span)):
        return planned if count else None
    part = ChunkSpan(span.group, span.chunks[:count], span.keys[:count], span.cut_tokens)
    return PlannedSpan(part, planned.block_ids[: count * caches.blocks_per_chunk])


def _plan_group(
    caches: ChunkedCaches, view: StoreView, plan: StorePlan, group: GroupId, chunks: range
) -> None:
    match caches.config.groups[group].spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            wanted: Sequence[int] = chunks
        case SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            wanted = _not_given_back(caches, view, plan, group, chunks)
        case MambaSpec():
            wanted = _standing_states(caches, view, group, chunks)
            plan.skipped[group, SkipReason.NO_STATE] += len(chunks) - sum(chunk in chunks for chunk in wanted)
        case spec:
            assert_never(spec)
    _plan_chunks(caches, view, plan, group, wanted)


def _standing_states(caches: ChunkedCaches, view: StoreView, group: GroupId, chunks: range) -> Sequence[int]:
    """Those of ``chunks``, and of those handed over, at whose end a recurrent state is on the device."""
    size = caches.tokens_per_chunk(group)
    handed = {end for owner, end in view.handed_states if owner == group}
    ends = [end for end in (view.previous_tokens, view.complete_tokens) if end // size - 1 in chunks]
    return [end // size - 1 for end in sorted({*ends, *handed}) if end and end % size == 0]


def _not_given_back(
    caches: ChunkedCaches, view: StoreView, plan: StorePlan, group: GroupId, chunks: range
) -> Sequence[int]:
    """Chunks less those of which every block went back before the last step."""
    given_back = unread_blocks(caches.config.groups[group].spec, view.previous_tokens)
    size = caches.blocks_per_chunk
    first, end = -(-given_back.start // size), given_back.stop // size
    gone = range(max(first, chunks.start), min(end, chunks.stop))
    if not gone:
        return chunks
    plan.skipped[group, SkipReason.RELEASED] += len(gone)
    return (*range(chunks.start, gone.start), *range(gone.stop, chunks.stop))


def _plan_chunks(
    caches: ChunkedCaches, view: StoreView, plan: StorePlan, group: GroupId, wanted: Sequence[int]
) -> None:
    """Plan those of ``wanted`` (ascending) whose bytes are there; neighbours become one span."""
    if isinstance(wanted, range) and _is_plain(caches, view, group, wanted):
        chosen = [wanted] if wanted else []
    else:
        chosen = []
        for chunk in wanted:
            reason = _why_skipped(caches, view, group, chunk)
            if reason is not None:
                plan.skipped[group, reason] += 1
            elif chosen and chosen[-1].stop == chunk:
                chosen[-1] = range(chosen[-1].start, chunk + 1)
            else:
                chosen.append(range(chunk, chunk + 1))
    for chunks in chosen:
        _add(caches, view, plan, whole_span(caches, view.block_hashes, group, chunks))


def _is_plain(caches: ChunkedCaches, view: StoreView, group: GroupId, chunks: range) -> bool:
    """Whether every layer reads all of these chunks for good and the request holds all their blocks."""
    if not isinstance(caches.config.groups[group].spec, FullAttentionSpec | MLAAttentionSpec):
        return False
    blocks = caches.blocks(chunks)
    held = view.tables[group][blocks.start : blocks.stop]
    return len(held) == len(blocks) and None not in held


def _why_skipped(caches: ChunkedCaches, view: StoreView, group: GroupId, chunk: int) -> SkipReason | None:
    if not view.boundaries.needs(caches.hit_groups[group], chunk):
        return SkipReason.UNREACHABLE
    return _why_unreadable(
        caches, view, whole_span(caches, view.block_hashes, group, range(chunk, chunk + 1))
    )


def _why_unreadable(caches: ChunkedCaches, view: StoreView, span: ChunkSpan) -> SkipReason | None:
    """Whether the bytes of one chunk are on the device, and if not, why."""
    if caches.is_state(span.group):
        end = end_tokens_of(caches, span)
        if (span.group, end) in view.handed_states:
            return None
        if not view.state_stands_at(span.group, end):
            return SkipReason.NO_STATE
    unread = next(unread_at_ends(caches, span), range(0))
    wanted = [position for position in payload_blocks(caches, span) if position not in unread]
    assert wanted, "a boundary that needs the chunk reads some of it"
    spec, table = caches.config.groups[span.group].spec, view.tables[span.group]
    given_back = unread_blocks(spec, view.previous_tokens)
    for position in wanted:
        if position in given_back or position >= len(table) or table[position] is None:
            return SkipReason.RELEASED
    return None


def _plan_tail(
    caches: ChunkedCaches, view: StoreView, plan: StorePlan, horizon: int
) -> Mapping[GroupId, ChunkSpan]:
    """The chunks that the tail cuts, by group: all of them, or none if one cannot be read any more."""
    end = view.tail_tokens
    if end is None:
        return {}
    groups = [GroupId(group) for group in range(caches.num_groups)]
    if any(caches.named_at_tokens(group, end) > horizon for group in groups):
        plan.tail_tokens = end
        return {}
    cut = [group for group in groups if cut_chunk(caches.hit_groups[group], end) is not None]
    spans = {group: tail_span(caches, view.block_hashes, group, end) for group in cut}
    reasons = {group: _why_unreadable(caches, view, span) for group, span in spans.items()}
    lost = [(group, reason) for group, reason in reasons.items() if reason is not None]
    plan.skipped.update(lost)
    return {} if lost else spans


def _plan_passed(
    caches: ChunkedCaches, view: StoreView, plan: StorePlan, group: GroupId, final: Boundaries
) -> None:
    """What only the boundary at which the request ended needs of chunks that were passed over before."""
    hit_group = caches.hit_groups[group]
    passed = range(view.first_chunk[group], view.next_chunk[group])
    for needed in required_chunks(hit_group, final.points[-1]):
        for chunk in range(max(needed.start, passed.start), min(needed.stop, passed.stop)):
            if not view.boundaries.needs(hit_group, chunk):
                _plan_chunks(caches, replace(view, boundaries=final), plan, group, (chunk,))


def _add(caches: ChunkedCaches, view: StoreView, plan: StorePlan, span: ChunkSpan) -> None:
    ids = block_ids(caches, span, view.tables[span.group])
    first = caches.blocks(span.chunks).start
    for unread in unread_at_ends(caches, span):
        ids[max(0, unread.start - first) : max(0, unread.stop - first)] = -1
    handed = view.handed_states.get((span.group, end_tokens_of(caches, span)))
    if handed is not None:
        ids[payload_blocks(caches, span)[-1] - first] = handed
    plan.spans.append(PlannedSpan(span, ids))
