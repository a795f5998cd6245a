"""Which chunks of a request can be stored now, and from which blocks. Pure.

A plan is made in the ``build_connector_meta`` of one step and submitted before anything of that step touches
the caches, or behind the step where it ``stays_whole``. It may read every block the request held in the step
before: blocks given back since, whoever owns them now, still hold the request's bytes in the arrays the
stores are given. Those given back earlier may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never, cast, final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.request_state import Tail, Tenure
from jaxkv.connector.retention import Boundaries
from jaxkv.connector.spans import (
    ChunkSpan,
    PlannedSpan,
    block_ids,
    chunk_ends,
    end_tokens_of,
    payload_blocks,
    tail_span,
    unread_at_ends,
    whole_span,
)
from jaxkv.hits import reads_every_token, required_chunks, unread_blocks
from jaxkv.keys import GroupId
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


class SkipReason(Enum):
    """Why a complete chunk was not written.

    ``HELD``: the backend has it, or does not take it before it was offered more often. ``RELEASED``: the
    request no longer holds its blocks. ``NO_STATE``: no step ended there. ``UNREACHABLE``: no hit that ends
    at a boundary worth keeping needs it. ``REFUSED``: there was no room; it is offered again.
    """

    HELD = "held"
    RELEASED = "released"
    NO_STATE = "no_state"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"


Skipped = dict[tuple[GroupId, SkipReason], int]
"""How many chunks were not written, by group and reason."""


@final
@dataclass(slots=True)
class StorePlan:
    """``spans`` group after group; ``skipped`` chunks will not become storable while the request runs.

    ``next_chunk`` and ``tail`` are where to go on if all of ``spans`` are taken.
    """

    spans: list[PlannedSpan]
    skipped: Skipped
    next_chunk: list[int]
    tail: Tail | None = None


def plan_stores(caches: ChunkedCaches, tenure: Tenure) -> StorePlan:
    """All complete chunks from ``tenure.next_chunk`` on, and the tail once it is computed."""
    return _Planning(caches, tenure).run()


def next_due_tokens(caches: ChunkedCaches, tenure: Tenure) -> int | None:
    """Tokens that must be complete before more can be stored; ``None`` if nothing ever can."""
    limit, tail = tenure.limit_tokens, tenure.tail
    ends = list(map(caches.chunk_named_at_tokens, caches.groups, tenure.next_chunk))
    if tail is not None:
        ends += [caches.named_at_tokens(group, tail.end_tokens) for group in tail.groups]
    return min(ends) if limit is None else min((end for end in ends if end <= limit), default=None)


@final
class _Planning:
    """One plan in the making."""

    __slots__ = ("_boundaries", "_caches", "_horizon", "_plan", "_tenure")

    def __init__(self, caches: ChunkedCaches, tenure: Tenure) -> None:
        self._caches = caches
        self._tenure = tenure
        self._boundaries = tenure.boundaries
        self._plan = StorePlan([], {}, [])
        horizon = min(tenure.complete_tokens, len(tenure.request.block_hashes) * caches.tokens_per_hash)
        self._horizon = horizon if tenure.limit_tokens is None else min(horizon, tenure.limit_tokens)

    def run(self) -> StorePlan:
        caches, tenure, plan = self._caches, self._tenure, self._plan
        horizon = self._horizon
        tail = self._plan_tail(tenure.tail) if tenure.tail is not None else {}
        ends = self._further_boundaries() if tenure.has_ended or tenure.tail is not None else ()
        for group, first in zip(caches.groups, tenure.next_chunk, strict=True):
            if ends:
                self._plan_passed(group, ends)
            end = max(first, caches.num_named_chunks(group, horizon))
            if tenure.handed_states or (end > first and not self._add_at_once(group, range(first, end))):
                self._plan_group(group, range(first, end))
            if group in tail:
                self._add(tail[group])
            plan.next_chunk.append(end)
        return plan

    def _plan_group(self, group: GroupId, chunks: range) -> None:
        match self._caches.config.groups[group].spec:
            case FullAttentionSpec() | MLAAttentionSpec():
                wanted: Sequence[int] = chunks
            case SlidingWindowSpec() | ChunkedLocalAttentionSpec():
                wanted = self._not_given_back(group, chunks)
            case MambaSpec():
                wanted = self._standing_states(group, chunks)
                num_gone = len(chunks) - sum(chunk in chunks for chunk in wanted)
                self._skip(group, SkipReason.NO_STATE, num_gone)
            case spec:
                assert_never(spec)
        self._plan_chunks(group, wanted)

    def _standing_states(self, group: GroupId, chunks: range) -> Sequence[int]:
        """Those of ``chunks``, and of those handed over, at whose end a recurrent state is on the device."""
        tenure, size = self._tenure, self._caches.tokens_per_chunk(group)
        ends = {end for end in (tenure.previous_tokens, tenure.complete_tokens) if end // size - 1 in chunks}
        ends |= {end for owner, end in tenure.handed_states if owner == group and end <= self._horizon}
        return [end // size - 1 for end in sorted(ends) if end and end % size == 0]

    def _not_given_back(self, group: GroupId, chunks: range) -> Sequence[int]:
        """Chunks less those of which every block went back before the last step."""
        spec, size = self._caches.config.groups[group].spec, self._caches.blocks_per_chunk
        given_back = unread_blocks(spec, self._tenure.previous_tokens)
        first, end = -(-given_back.start // size), given_back.stop // size
        gone = range(max(first, chunks.start), min(end, chunks.stop))
        if not gone:
            return chunks
        self._skip(group, SkipReason.RELEASED, len(gone))
        return (*range(chunks.start, gone.start), *range(gone.stop, chunks.stop))

    def _plan_chunks(self, group: GroupId, wanted: Sequence[int]) -> None:
        """Plan those of ``wanted`` (ascending) whose bytes are there; neighbours become one span."""
        chosen: list[range] = []
        for chunk in wanted:
            reason = self._why_skipped(group, chunk)
            if reason is not None:
                self._skip(group, reason, 1)
            elif chosen and chosen[-1].stop == chunk:
                chosen[-1] = range(chosen[-1].start, chunk + 1)
            else:
                chosen.append(range(chunk, chunk + 1))
        for chunks in chosen:
            self._add(self._whole(group, chunks))

    def _add_at_once(self, group: GroupId, chunks: range) -> bool:
        """Plan all of ``chunks`` without a look at each, if every one is kept, whole, held and there.

        What nearly every step of a running request takes: the chunk it has just completed.
        """
        caches, tenure = self._caches, self._tenure
        is_there = caches.surely_there[group]
        if is_there is None or not self._boundaries.retention.keeps_all[group]:
            return False
        if not is_there(chunks, tenure.previous_tokens, tenure.complete_tokens):
            return False
        held = tenure.tables[group][chunks.start : chunks.stop]
        if len(held) < len(chunks) or None in held:
            return False
        keys = caches.keys(tenure.request.block_hashes, group, chunks)
        self._plan.spans.append(PlannedSpan(ChunkSpan(group, chunks, keys), cast("list[int]", held)))
        return True

    def _whole(self, group: GroupId, chunks: range) -> ChunkSpan:
        return whole_span(self._caches, self._tenure.request.block_hashes, group, chunks)

    def _why_skipped(self, group: GroupId, chunk: int) -> SkipReason | None:
        if not self._boundaries.needs(self._caches.hit_groups[group], chunk):
            return SkipReason.UNREACHABLE
        return self._why_unreadable(self._whole(group, range(chunk, chunk + 1)))

    def _why_unreadable(self, span: ChunkSpan) -> SkipReason | None:
        """Whether the bytes of one chunk are on the device, and if not, why."""
        caches, tenure = self._caches, self._tenure
        if caches.is_state(span.group):
            end = end_tokens_of(caches, span)
            if (span.group, end) in tenure.handed_states:
                return None
            # A state inside its block is written over in place, one at the end of a block is not.
            if end % caches.config.groups[span.group].block_size:
                stands = end == tenure.complete_tokens == tenure.begun_tokens
            else:
                stands = end in (tenure.previous_tokens, tenure.complete_tokens)
            if not stands:
                return SkipReason.NO_STATE
        unread = next(unread_at_ends(caches, span), range(0))
        wanted = [position for position in payload_blocks(caches, span) if position not in unread]
        assert wanted, "a boundary that needs the chunk reads some of it"
        table = tenure.tables[span.group]
        given_back = unread_blocks(caches.config.groups[span.group].spec, tenure.previous_tokens)
        for position in wanted:
            if position in given_back or position >= len(table) or table[position] is None:
                return SkipReason.RELEASED
        return None

    def _plan_tail(self, tail: Tail) -> Mapping[GroupId, ChunkSpan]:
        """Those chunks that the tail cuts which have names now, by group; none if one is lost.

        A drafter's is named by the next link, when a state is gone that stood where the tail ends.
        """
        caches, end = self._caches, tail.end_tokens
        named = [group for group in tail.groups if caches.named_at_tokens(group, end) <= self._horizon]
        hashes = self._tenure.request.block_hashes
        spans = {group: tail_span(caches, hashes, group, end) for group in named}
        reasons = {group: self._why_unreadable(span) for group, span in spans.items()}
        lost = [(group, reason) for group, reason in reasons.items() if reason is not None]
        for group, reason in lost:
            self._skip(group, reason, 1)
        if lost:
            return {}
        if len(named) < len(tail.groups):
            self._plan.tail = Tail(end, tuple(group for group in tail.groups if group not in spans))
        return spans

    def _further_boundaries(self) -> Sequence[int]:
        """Where the request ended and where its tail does, if chunks are needed there that none other needs.

        From now on they count as boundaries.
        """
        tenure, retention, points = self._tenure, self._boundaries.retention, self._boundaries.points
        ends = set()
        if tenure.has_ended:
            named = self._horizon - self._caches.lookahead_tokens
            last = named - named % self._caches.alignment_tokens
            if last > 0 and retention.next_boundary(last) != last:
                ends.add(last)
        if tenure.tail is not None and tenure.tail.end_tokens <= self._horizon:
            ends.add(tenure.tail.end_tokens)
        ends.difference_update(points)
        if ends:
            self._boundaries = Boundaries(retention, (*points, *ends))
        return sorted(ends)

    def _plan_passed(self, group: GroupId, boundaries: Sequence[int]) -> None:
        """What only ``boundaries`` need of chunks that were passed over before."""
        tenure, hit_group = self._tenure, self._caches.hit_groups[group]
        if tenure.boundaries.retention.keeps_all[group]:
            return
        passed = range(tenure.first_chunk[group], tenure.next_chunk[group])
        needed = {
            chunk
            for boundary in boundaries
            for chunks in required_chunks(hit_group, boundary)
            for chunk in range(max(chunks.start, passed.start), min(chunks.stop, passed.stop))
        }
        # Chunks of states that were handed over are planned with those of the group.
        size = hit_group.tokens_per_chunk
        needed.difference_update(
            end // size - 1 for owner, end in tenure.handed_states if owner == group and end % size == 0
        )
        passed_over = [chunk for chunk in sorted(needed) if not tenure.boundaries.needs(hit_group, chunk)]
        self._plan_chunks(group, passed_over)

    def _skip(self, group: GroupId, reason: SkipReason, num_chunks: int) -> None:
        if num_chunks:
            skipped = self._plan.skipped
            skipped[group, reason] = skipped.get((group, reason), 0) + num_chunks

    def _add(self, span: ChunkSpan) -> None:
        caches, tenure = self._caches, self._tenure
        ids = block_ids(caches, span, tenure.tables[span.group])
        first = caches.blocks(span.chunks).start
        for unread in unread_at_ends(caches, span):
            ids[max(0, unread.start - first) : max(0, unread.stop - first)] = -1
        if tenure.handed_states and caches.is_state(span.group):
            for position, end in zip(payload_blocks(caches, span), chunk_ends(caches, span), strict=True):
                ids[position - first] = tenure.handed_states.get((span.group, end), ids[position - first])
        self._plan.spans.append(PlannedSpan(span, ids.tolist()))


def stays_whole(caches: ChunkedCaches, tenure: Tenure, spans: Iterable[PlannedSpan]) -> bool:
    """Whether the coming step leaves the blocks of ``spans``, none of a recurrent state, as they are.

    It does if the request keeps all of them: it computes behind them. A state is written on in its block.
    """
    return not tenure.has_ended and all(
        _keeps_from(caches, tenure, planned.span.group, planned.span.chunks.start) for planned in spans
    )


def can_wait(caches: ChunkedCaches, tenure: Tenure) -> bool:
    """Whether a plan made once the coming step was begun finds all that one made before it would.

    For groups that keep no recurrent states. Who has ended, or has a tail to store, may also want chunks
    that were passed over, and those may be gone.
    """
    if tenure.has_ended or tenure.tail is not None:
        return False
    return all(
        _keeps_from(caches, tenure, group, first)
        for group, first in zip(caches.groups, tenure.next_chunk, strict=True)
    )


def _keeps_from(caches: ChunkedCaches, tenure: Tenure, group: GroupId, chunk: int) -> bool:
    """Whether the request gives back none of the blocks of ``chunk`` and those behind it before the step."""
    spec = caches.config.groups[group].spec
    if reads_every_token(spec):
        return True
    # The loop gives back by what it has computed, which is more where it did not report a step.
    computed = max(tenure.complete_tokens, tenure.request.num_computed_tokens)
    return unread_blocks(spec, computed).stop <= chunk * caches.blocks_per_chunk
