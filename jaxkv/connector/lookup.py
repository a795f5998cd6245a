"""How far the host can continue a request's prefix, and which chunks that takes. Pins nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.spans import ChunkSpan, tail_span, whole_span
from jaxkv.hits import cut_chunk, longest_hit, longest_tail, missing_chunks, reads_every_token
from jaxkv.keys import BlockHash, GroupId, KeyRun, KeyRuns, OffloadKey
from jaxkv.offload.base import LookupResult, OffloadingManager, PrefixLookup, ReqContext


class Deferral(Enum):
    """Why a request should ask again later.

    ``PENDING``: a chunk it needs is being written. ``LOADING``: one is being loaded for another request, and
    will be found on the device. ``RETRY``: the backend does not know yet. ``IN_FLIGHT``: the request's own
    load is under way.
    """

    PENDING = "pending"
    RETRY = "retry"
    IN_FLIGHT = "in_flight"
    LOADING = "loading"


@final
@dataclass(frozen=True, slots=True)
class Question:
    """How far can a request get that the device holds ``known_tokens`` of, up to ``limit_tokens``?

    ``block_hashes`` cover at least ``limit_tokens``.
    """

    block_hashes: Sequence[BlockHash]
    known_tokens: int
    limit_tokens: int


@final
@dataclass(frozen=True, slots=True)
class Hit:
    """Tokens ``[known_tokens, boundary_tokens)`` come from ``spans``; none where they are equal.

    ``branch_tokens`` is where the request leaves the prefix that others stored, or left on the device, if the
    host may be unable to serve that boundary: worth keeping, for others may leave it there too.
    """

    known_tokens: int
    boundary_tokens: int
    spans: tuple[ChunkSpan, ...] = ()
    branch_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens the host supplies."""
        return self.boundary_tokens - self.known_tokens

    @property
    def keys(self) -> KeyRuns:
        """Keys of all chunks, group after group."""
        return KeyRuns([span.keys for span in self.spans])


@final
class HostPresence:
    """Which chunks of one request's first ``limit_tokens`` tokens the backend holds; a ``TailPresence``.

    Asked in batches. Chunks still being written count as present, so that a request waits for them instead of
    computing them again; so does RETRY, unless ``takes_retry_as_miss``. How far a group reaches from its
    first unknown chunk on is asked once.
    """

    def __init__(
        self,
        caches: ChunkedCaches,
        question: Question,
        manager: OffloadingManager,
        ctx: ReqContext,
        *,
        takes_retry_as_miss: bool,
    ) -> None:
        self._caches = caches
        self._question = question
        self._manager = manager
        self._ctx = ctx
        self._takes_retry_as_miss = takes_retry_as_miss
        self._num_hashed = caches.hashed_tokens(question.block_hashes)
        self._leading: dict[GroupId, range] = {}
        self._all_certain = True

    def count_leading(self, group: GroupId, chunks: range) -> int:
        """See ``Presence``. All calls for a group start with the same chunk."""
        found = self._leading.get(group)
        if found is None:
            end = min(
                self._num_named(group), self._question.limit_tokens // self._caches.tokens_per_chunk(group)
            )
            keys = self._keys(group, range(chunks.start, max(chunks.start, end)))
            found = range(chunks.start, chunks.start + self._prefix(keys).num_found)
            self._leading[group] = found
        assert found.start == chunks.start, "a group is asked from its first unknown chunk on"
        return min(len(found), len(chunks))

    def count_trailing(self, group: GroupId, chunks: range) -> int:
        """See ``Presence``."""
        if group in self._leading:
            return len(chunks) if chunks.stop <= self._leading[group].stop else 0
        if chunks.stop > self._num_named(group):
            return 0
        keys = self._keys(group, chunks)
        if self._takes_retry_as_miss:
            return _count_certain(reversed(keys), self._manager, self._ctx)
        answer = self._manager.lookup_suffix(keys, self._ctx)
        self._note(answer)
        return answer.num_found

    def has_tail(self, group: GroupId, end_tokens: int) -> bool:
        """See ``TailPresence``."""
        if self._caches.named_at_tokens(group, end_tokens) > self._num_hashed:
            return False
        key = self._caches.tail_key(self._question.block_hashes, group, end_tokens)
        return self._prefix(key).num_found == 1

    def leading_tokens(self, groups: Iterable[GroupId]) -> int | None:
        """Tokens up to which all of ``groups`` hold every chunk; ``None`` if one of them was not asked."""
        groups = tuple(groups)
        if not groups or any(group not in self._leading for group in groups):
            return None
        return min(self._leading[group].stop * self._caches.tokens_per_chunk(group) for group in groups)

    def worst_of(self, spans: Iterable[ChunkSpan]) -> LookupResult:
        """The least certain answer among chunks that were found."""
        if self._all_certain:
            return LookupResult.HIT
        answers = [(self._prefix(span.keys), len(span)) for span in spans]
        worst = {answer.worst for answer, _ in answers}
        if LookupResult.RETRY in worst or any(answer.num_found < count for answer, count in answers):
            return LookupResult.RETRY  # or the backend has changed its mind: the next question will tell
        return LookupResult.HIT_PENDING if LookupResult.HIT_PENDING in worst else LookupResult.HIT

    def _keys(self, group: GroupId, chunks: range) -> KeyRun:
        return self._caches.keys(self._question.block_hashes, group, chunks)

    def _num_named(self, group: GroupId) -> int:
        return self._caches.num_named_chunks(group, self._num_hashed)

    def _prefix(self, keys: KeyRun) -> PrefixLookup:
        if self._takes_retry_as_miss:
            keys = keys[: _count_certain(keys, self._manager, self._ctx)]
        answer = self._manager.lookup_prefix(keys, self._ctx)
        self._note(answer)
        return answer

    def _note(self, answer: PrefixLookup) -> None:
        self._all_certain = self._all_certain and answer.worst is LookupResult.HIT


def find_hit(caches: ChunkedCaches, question: Question, presence: HostPresence) -> Hit | Deferral:
    """The longest prefix that device and host together can serve."""
    known, limit = question.known_tokens, question.limit_tokens
    groups, alignment = caches.hit_groups, caches.alignment_tokens
    boundary = longest_hit(groups, known, limit, alignment, presence)
    branch = _branch_tokens(caches, known, boundary, presence)
    if caches.keeps_tails:
        boundary = _with_tail(caches, question, presence, boundary)
    spans = spans_to_load(caches, question.block_hashes, known, boundary)
    match presence.worst_of(spans):
        case LookupResult.RETRY:
            return Deferral.RETRY
        case LookupResult.HIT_PENDING:
            return Deferral.PENDING
    return Hit(known, boundary, spans, branch)


def _with_tail(caches: ChunkedCaches, question: Question, presence: HostPresence, boundary: int) -> int:
    """The boundary of the hit together with a tail, if there is one.

    It may lie right behind the aligned hit, or behind all that the layers hold which read every token: others
    may have kept nothing but the tail.
    """
    step, alignment = caches.tokens_per_hash, caches.alignment_tokens
    shared = presence.leading_tokens(_reading_all(caches))
    reached = question.limit_tokens if shared is None else min(shared, question.limit_tokens)
    for behind in dict.fromkeys((reached - reached % alignment, boundary - boundary % alignment)):
        end = min(question.limit_tokens, behind + alignment - 1)
        first = max(behind, boundary - boundary % step) + step
        tails = range(first, end + 1, step)
        tail = longest_tail(caches.hit_groups, question.known_tokens, tails, presence)
        if tail is not None:
            return tail
    return boundary


def spans_to_load(
    caches: ChunkedCaches, block_hashes: Sequence[BlockHash], known_tokens: int, boundary_tokens: int
) -> tuple[ChunkSpan, ...]:
    """What must be loaded to go from a device hit to a boundary, group after group."""
    spans: list[ChunkSpan] = []
    if boundary_tokens <= known_tokens:
        return ()
    for index, hit_group in enumerate(caches.hit_groups):
        group = GroupId(index)
        missing = missing_chunks(hit_group, boundary_tokens, known_tokens)
        spans += [whole_span(caches, block_hashes, group, chunks) for chunks in missing if chunks]
        if cut_chunk(hit_group, boundary_tokens) is not None:
            spans.append(tail_span(caches, block_hashes, group, boundary_tokens))
    return tuple(spans)


def _branch_tokens(
    caches: ChunkedCaches, known_tokens: int, boundary_tokens: int, presence: HostPresence
) -> int | None:
    """The aligned end of what layers that read everything hold on the host, where the others cannot serve it.

    Otherwise that of the device hit, if the host has nothing behind it: only its own hit shows that the host
    can serve a boundary.
    """
    shared = presence.leading_tokens(_reading_all(caches)) or 0
    shared -= shared % caches.alignment_tokens
    if shared > boundary_tokens:
        return shared
    on_device = known_tokens - known_tokens % caches.alignment_tokens
    return on_device if on_device and boundary_tokens == known_tokens else None


def _reading_all(caches: ChunkedCaches) -> list[GroupId]:
    return [GroupId(index) for index, group in enumerate(caches.hit_groups) if reads_every_token(group.spec)]


def _count_certain(keys: Iterable[OffloadKey], manager: OffloadingManager, ctx: ReqContext) -> int:
    """Keys before the first of which the backend does not know that it holds it."""
    count = 0
    for key in keys:
        if manager.lookup(key, ctx) in (LookupResult.MISS, LookupResult.RETRY):
            break
        count += 1
    return count
