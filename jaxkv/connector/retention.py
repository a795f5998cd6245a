"""Where later requests may end their hit, and which chunks that takes. Pure.

Layers that forget (windows, attention chunks, recurrent states) need only the chunks in front of such a
boundary. All others take room from what somebody can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.errors import ConfigError
from jaxkv.hits import HitGroup, unread_chunks
from jaxkv.spec import FullAttentionSpec, MLAAttentionSpec


@final
@dataclass(frozen=True, slots=True)
class Boundaries:
    """Every multiple of ``interval_tokens`` (``None``: no such) and each of ``points``."""

    interval_tokens: int | None
    points: tuple[int, ...] = ()

    def needs(self, group: HitGroup, chunk: int) -> bool:
        """Whether a hit that ends at one of the boundaries reads whole chunk ``chunk`` of ``group``.

        Layers that read every token need all of them. For the others, of the regular boundaries only the
        first behind the chunk can: what it does not read, none does.
        """
        if isinstance(group.spec, FullAttentionSpec | MLAAttentionSpec):
            return True
        end = (chunk + 1) * group.tokens_per_chunk
        near = (
            () if self.interval_tokens is None else (-(-end // self.interval_tokens) * self.interval_tokens,)
        )
        return any(
            point >= end and chunk not in unread_chunks(group, point) for point in (*near, *self.points)
        )


def interval_tokens(caches: ChunkedCaches, retention_interval: int | None) -> int | None:
    """Distance of the regular boundaries; ``retention_interval`` as in ``OffloadingConfig``.

    Raises ``ConfigError`` where hits could not end at its multiples.
    """
    if retention_interval is None:
        return caches.alignment_tokens
    if retention_interval % caches.alignment_tokens:
        raise ConfigError(
            f"retention_interval is {retention_interval}, but hits of these groups end at multiples of "
            f"{caches.alignment_tokens} tokens; give a multiple of that, 0, or None"
        )
    return retention_interval or None


def prompt_boundaries(
    caches: ChunkedCaches, num_prompt_tokens: int, branch_tokens: int | None
) -> tuple[int, ...]:
    """Boundaries of one request that are worth keeping whatever the interval, ascending.

    Where an equal prompt ends its hit: at the last aligned boundary before its last token, and at the last
    link of the hash chain, where tails are kept. And where this request leaves what others share with it.
    """
    last = num_prompt_tokens - 1
    points = {last - last % caches.alignment_tokens, last - last % caches.tokens_per_hash}
    if branch_tokens is not None:
        points.add(branch_tokens)
    return tuple(sorted(point for point in points if point > 0))
