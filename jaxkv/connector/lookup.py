"""How far the host can continue a request's prefix, and which chunks that takes. Pure; pins nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import final

from jaxkv.connector.chunks import ChunkedCaches, ChunkId
from jaxkv.hits import longest_hit, required_chunks
from jaxkv.keys import BlockHash, GroupId, OffloadKey
from jaxkv.offload.base import LookupResult


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
class Hit:
    """Tokens ``[known_tokens, boundary_tokens)`` come from ``chunks``; no chunks where they are equal."""

    known_tokens: int
    boundary_tokens: int
    chunks: tuple[ChunkId, ...]
    keys: tuple[OffloadKey, ...]


def find_hit(
    caches: ChunkedCaches,
    block_hashes: Sequence[BlockHash],
    known_tokens: int,
    limit_tokens: int,
    lookup: Callable[[OffloadKey], LookupResult],
) -> Hit | Deferral:
    """The longest prefix within ``limit_tokens`` that device (``known_tokens``) and host can serve.

    Chunks still being written count as present, so that a request waits for them instead of computing them
    again; the answer is a ``Deferral`` then.
    """
    answers: dict[tuple[GroupId, int], tuple[OffloadKey, LookupResult]] = {}

    def present(group: GroupId, index: int) -> bool:
        answer = answers.get((group, index))
        if answer is None:
            key = caches.key(block_hashes, ChunkId(group, index))
            answer = answers[group, index] = key, lookup(key)
        return answer[1] is not LookupResult.MISS

    limit = min(limit_tokens, caches.hashed_tokens(block_hashes))
    boundary = longest_hit(caches.hit_groups, known_tokens, limit, caches.alignment_tokens, present)
    chunks = chunks_to_load(caches, known_tokens, boundary)
    found = [answers[chunk.group, chunk.index] for chunk in chunks]
    needed = {answer for _, answer in found}
    if LookupResult.RETRY in needed:
        return Deferral.RETRY
    if LookupResult.HIT_PENDING in needed:
        return Deferral.PENDING
    return Hit(known_tokens, boundary, chunks, tuple(key for key, _ in found))


def chunks_to_load(caches: ChunkedCaches, known_tokens: int, boundary_tokens: int) -> tuple[ChunkId, ...]:
    """Chunks that must be loaded to go from a device hit to a boundary, group after group."""
    if boundary_tokens <= known_tokens:
        return ()
    return tuple(
        ChunkId(GroupId(group), index)
        for group, hit_group in enumerate(caches.hit_groups)
        for index in required_chunks(hit_group, boundary_tokens)
        if (index + 1) * hit_group.tokens_per_chunk > known_tokens
    )
