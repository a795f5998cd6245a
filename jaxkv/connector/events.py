"""What became loadable and what was removed, in the serving loop's terms: groups, block hashes, tokens.

For routers that send a request where its prefix is. Events are vLLM's, with its field names; a chunk is what
vLLM's events call a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from jaxkv.connector.chunks import ChunkedCaches
from jaxkv.connector.protocols import Request
from jaxkv.key_parts import CacheKeyParts, ExtraKey
from jaxkv.keys import (
    BlockHash,
    GroupId,
    JobId,
    KeyRuns,
    OffloadKey,
    get_offload_block_hash,
    get_offload_group,
)
from jaxkv.offload.base import OffloadingEvent, OffloadingManager
from jaxkv.spec import SlidingWindowSpec, kind_name


@final
@dataclass(frozen=True, slots=True)
class BlockStored:
    """Chunks of one group became loadable (vLLM: ``BlockStored``).

    Each of ``block_hashes`` names the prefix that ends with a chunk of ``block_size`` tokens.

    Events that describe themselves tell more of chunks that were stored from here: these follow one another,
    ``parent_block_hash`` names the prefix before the first of them (``None`` where that is empty),
    ``token_ids`` are the tokens of all of them, ``extra_keys`` says for each what its hash covers
    beside tokens. Where ``extra_keys`` is empty, the event says no more than its hashes.
    """

    block_hashes: tuple[BlockHash, ...]
    block_size: int
    group_idx: int
    medium: str
    kv_cache_spec_kind: str
    kv_cache_spec_sliding_window: int | None = None
    parent_block_hash: BlockHash | None = None
    token_ids: tuple[int, ...] = ()
    lora_name: str | None = None
    extra_keys: tuple[tuple[ExtraKey, ...], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Chunks of one group are loadable no longer (vLLM: ``BlockRemoved``)."""

    block_hashes: tuple[BlockHash, ...]
    group_idx: int
    medium: str


@final
@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is loadable any more (vLLM: ``AllBlocksCleared``)."""


KVCacheEvent = BlockStored | BlockRemoved | AllBlocksCleared
"""Whatever ``take_events`` gives."""


def event_to_json(event: KVCacheEvent) -> dict[str, Any]:
    """``event`` as what ``json.dumps`` takes: its class under ``"type"``, hashes in hexadecimal."""
    values = {entry.name: getattr(event, entry.name) for entry in fields(event)}
    return {"type": type(event).__name__} | {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


@final
class EventLog:
    """Turns a backend's events into those of the connector; does nothing unless ``enabled``.

    With ``self_describing`` it remembers, for as long as a store is under way and until its events are taken,
    which request it is of; nothing is remembered for each chunk. Tokens are read when events are taken.
    """

    def __init__(self, caches: ChunkedCaches, *, enabled: bool, self_describing: bool = False) -> None:
        self._caches = caches
        self._is_enabled = enabled
        self._describes = enabled and self_describing
        self._taken_early: list[KVCacheEvent] = []
        self._under_way: dict[JobId, list[_Store]] = {}
        self._ended: list[_Store] = []

    def store_started(self, job_id: JobId, request: Request, keys: KeyRuns) -> None:
        """A job will store chunks of ``request``, perhaps of others too: some or all of ``keys``."""
        if self._describes:
            self._under_way.setdefault(job_id, []).append(_Store(request, keys))

    def store_ended(self, job_id: JobId, *, success: bool) -> None:
        """The job is over. To be called for each that was started, before its events are taken."""
        stores = self._under_way.pop(job_id, ())
        if success:
            self._ended += stores

    def reset(self, manager: OffloadingManager) -> None:
        """Reset the cache of ``manager``; of all that this removes one event tells."""
        if not self._is_enabled:
            manager.reset_cache()
            return
        self._taken_early += self._translate(manager.take_events())
        manager.reset_cache()
        tuple(manager.take_events())
        self._taken_early.append(AllBlocksCleared())

    def take(self, manager: OffloadingManager) -> Sequence[KVCacheEvent]:
        """Events since the last call, in order."""
        if not self._is_enabled:
            return ()
        early, self._taken_early = self._taken_early, []
        return (*early, *self._translate(manager.take_events()))

    def _translate(self, events: Iterable[OffloadingEvent]) -> Iterator[KVCacheEvent]:
        ended, self._ended = self._ended, []
        places = {key: place for store in ended for key, place in store.places()}
        for event in events:
            for group, keys in _by_group(event.keys):
                if event.removed:
                    yield BlockRemoved(tuple(map(get_offload_block_hash, keys)), group, event.medium)
                else:
                    yield from self._stored(group, keys, event.medium, places)

    def _stored(
        self, group: GroupId, keys: Sequence[OffloadKey], medium: str, places: dict[OffloadKey, _Place]
    ) -> Iterator[BlockStored]:
        """One event for each stretch of neighbouring chunks of one request, and one for all others."""
        stretch: list[OffloadKey] = []
        for key in keys:
            if stretch and not self._are_neighbours(group, places.get(stretch[-1]), places.get(key)):
                yield self._describe(group, stretch, medium, places)
                stretch = []
            stretch.append(key)
        yield self._describe(group, stretch, medium, places)

    def _are_neighbours(self, group: GroupId, place: _Place | None, following: _Place | None) -> bool:
        if place is None or following is None:
            return place is following
        chunk, next_chunk = self._chunk_tokens(group, place), self._chunk_tokens(group, following)
        is_next = chunk.stop == next_chunk.start and len(chunk) == len(next_chunk)
        return is_next and place.request is following.request

    def _describe(
        self, group: GroupId, keys: Sequence[OffloadKey], medium: str, places: dict[OffloadKey, _Place]
    ) -> BlockStored:
        hashes = tuple(map(get_offload_block_hash, keys))
        spec = self._caches.config.groups[group].spec
        kind, window = kind_name(spec), spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        place = places.get(keys[0])
        if place is None:
            return BlockStored(hashes, self._caches.tokens_per_chunk(group), group, medium, kind, window)
        chunks = [self._chunk_tokens(group, places[key]) for key in keys]
        first, request = chunks[0], place.request
        parts = getattr(request, "key_parts", None) or CacheKeyParts()
        parent = first.start // self._caches.config.hash_block_size - 1
        return BlockStored(
            hashes,
            len(first),
            group,
            medium,
            kind,
            window,
            parent_block_hash=request.block_hashes[parent] if first.start else None,
            token_ids=_token_ids(request, range(first.start, chunks[-1].stop)),
            lora_name=parts.lora_name,
            extra_keys=tuple(parts.extra_keys(tokens) for tokens in chunks),
        )

    def _chunk_tokens(self, group: GroupId, place: _Place) -> range:
        """The tokens of a chunk; fewer than others have where it is the tail of a request."""
        end = (place.hash_index + 1) * self._caches.config.hash_block_size
        tokens_per_chunk = self._caches.tokens_per_chunk(group)
        return range((end - 1) // tokens_per_chunk * tokens_per_chunk, end)


@final
@dataclass(frozen=True, slots=True)
class _Place:
    """Where in which request a chunk ends: at the hash ``hash_index``."""

    request: Request
    hash_index: int


@final
@dataclass(frozen=True, slots=True)
class _Store:
    """The chunks a job may store."""

    request: Request
    keys: KeyRuns

    def places(self) -> Iterator[tuple[OffloadKey, _Place]]:
        """Each key and where it is."""
        for run in self.keys.runs:
            for key, hash_index in zip(run, run.hashes, strict=True):
                yield key, _Place(self.request, hash_index)


def _by_group(keys: Iterable[OffloadKey]) -> Iterable[tuple[GroupId, list[OffloadKey]]]:
    groups: dict[GroupId, list[OffloadKey]] = {}
    for key in keys:
        groups.setdefault(get_offload_group(key), []).append(key)
    return groups.items()


def _token_ids(request: Request, tokens: range) -> tuple[int, ...]:
    known = getattr(request, "all_token_ids", None)
    known = getattr(request, "token_ids", None) if known is None else known
    return () if known is None else tuple(map(int, known[tokens.start : tokens.stop]))
