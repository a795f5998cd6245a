"""What became loadable and what was removed, in the serving loop's terms: groups and block hashes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.keys import BlockHash, GroupId, get_offload_block_hash, get_offload_group
from jaxkv.offload.base import OffloadingEvent


@final
@dataclass(frozen=True, slots=True)
class KVCacheEvent:
    """Chunks of one group were stored or removed (vLLM: ``BlockStored``, ``BlockRemoved``).

    Each of ``block_hashes`` stands for the prefix that ends with a chunk of ``tokens_per_chunk`` tokens.
    """

    group: GroupId
    tokens_per_chunk: int
    block_hashes: tuple[BlockHash, ...]
    medium: str
    removed: bool


def describe_events(caches: ChunkedCaches, events: Iterable[OffloadingEvent]) -> Iterator[KVCacheEvent]:
    """One event per group for every event of the backend, in order."""
    for event in events:
        by_group: dict[GroupId, list[BlockHash]] = {}
        for key in event.keys:
            by_group.setdefault(get_offload_group(key), []).append(get_offload_block_hash(key))
        for group, hashes in by_group.items():
            tokens = caches.tokens_per_chunk(group)
            yield KVCacheEvent(group, tokens, tuple(hashes), event.medium, event.removed)
