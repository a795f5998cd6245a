"""Where later requests may end their hit, and which chunks that takes. Pure.

Layers that forget (windows, attention chunks, recurrent states) need only the chunks in front of such a
boundary. All others take room from what somebody can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never, final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.errors import ConfigError
from jaxkv.hits import HitGroup, reads_every_token, unread_chunks
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


@final
@dataclass(frozen=True, slots=True)
class Retention:
    """Every multiple of ``interval_tokens`` is worth keeping for (``None``: no such boundary).

    ``keeps_all`` says for each group whether that takes every chunk.
    """

    interval_tokens: int | None
    keeps_all: tuple[bool, ...]

    @classmethod
    def of(cls, caches: ChunkedCaches, retention_interval: int | None) -> Retention:
        """The meaning of ``OffloadingConfig.retention_interval`` for these caches.

        Raises ``ConfigError`` where hits could not end at its multiples.
        """
        interval: int | None = caches.alignment_tokens
        if retention_interval is not None:
            if retention_interval % caches.alignment_tokens:
                raise ConfigError(
                    f"retention_interval is {retention_interval}, but hits of these groups end at multiples "
                    f"of {caches.alignment_tokens} tokens; give a multiple of that, 0, or None"
                )
            interval = retention_interval or None
        return cls(interval, tuple(_keeps_all(group, interval) for group in caches.hit_groups))

    def next_boundary(self, num_tokens: int) -> int | None:
        """The first regular boundary from ``num_tokens`` on."""
        interval = self.interval_tokens
        return None if interval is None else -(-num_tokens // interval) * interval


@final
@dataclass(frozen=True, slots=True)
class Boundaries:
    """Where hits that start with one request's tokens may end: the regular ones, and each of ``points``."""

    retention: Retention
    points: tuple[int, ...] = ()

    def needs(self, group: HitGroup, chunk: int) -> bool:
        """Whether a hit that ends at one of the boundaries reads whole chunk ``chunk`` of ``group``.

        Layers that read every token need all of them. For the others, of the regular boundaries only the
        first behind the chunk can: what it does not read, none does.
        """
        if reads_every_token(group.spec):
            return True
        end = (chunk + 1) * group.tokens_per_chunk
        regular = self.retention.next_boundary(end)
        if regular is not None and chunk not in unread_chunks(group, regular):
            return True
        return any(point >= end and chunk not in unread_chunks(group, point) for point in self.points)


def _keeps_all(group: HitGroup, interval_tokens: int | None) -> bool:
    """Whether the regular boundaries need every chunk of a group."""
    match group.spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            return True
        case SlidingWindowSpec(sliding_window=window):
            # The chunk furthest in front of the boundary behind it must reach into the window.
            return interval_tokens is not None and interval_tokens - group.tokens_per_chunk < window - 1
        case ChunkedLocalAttentionSpec():
            return False
        case MambaSpec():
            return interval_tokens == group.tokens_per_chunk
        case _:
            assert_never(group.spec)


def prompt_boundaries(
    caches: ChunkedCaches, num_prompt_tokens: int, branch_tokens: int | None
) -> tuple[int, ...]:
    """Boundaries of one request that are worth keeping whatever the interval, ascending.

    Where an equal prompt ends its hit: at the last aligned boundary it can start from, and at the last
    link of the hash chain, where tails are kept. And where this request leaves what others share with it.
    """
    last = last_link(caches, num_prompt_tokens)
    points = {last - last % caches.alignment_tokens, last}
    if branch_tokens is not None:
        points.add(branch_tokens)
    return tuple(sorted(point for point in points if point > 0))


def last_link(caches: ChunkedCaches, num_prompt_tokens: int) -> int:
    """Where the last link of the hash chain ends that an equal prompt can start from.

    That prompt computes its last token itself, and finds only chunks that have a name within it.
    """
    step = caches.tokens_per_hash
    hashed = num_prompt_tokens - num_prompt_tokens % step
    last = min(num_prompt_tokens - 1, hashed - caches.lookahead_tokens)
    return last - last % step
