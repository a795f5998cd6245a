"""Names of cached content: the keys chunks are offloaded under, one by one and as runs.

The hashes inside them are those of ``jaxkv.hash_chain``. Index types live here too, one per index space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import NewType, final, overload

BlockId = NewType("BlockId", int)
"""A block of one group in the device cache."""
GroupId = NewType("GroupId", int)
"""Position of a group in ``KVCacheConfig.groups``."""
JobId = NewType("JobId", int)
"""One transfer, numbered by the connector's scheduler side."""
BlockHash = NewType("BlockHash", bytes)
"""Hash of a whole prefix that ends with a block."""
OffloadKey = NewType("OffloadKey", bytes)
"""A block hash and the group whose chunk it names, as in vLLM's ``OffloadKey``."""

_GROUP_BYTES = 4


def make_offload_key(block_hash: BlockHash, group: GroupId) -> OffloadKey:
    """The key of the chunk of ``group`` that ends where ``block_hash`` ends."""
    return OffloadKey(block_hash + group.to_bytes(_GROUP_BYTES, "big"))


def get_offload_block_hash(key: OffloadKey) -> BlockHash:
    """The block hash inside ``key``."""
    return BlockHash(key[:-_GROUP_BYTES])


def get_offload_group(key: OffloadKey) -> GroupId:
    """The group inside ``key``."""
    return GroupId(int.from_bytes(key[-_GROUP_BYTES:], "big"))


@final
class KeyRun(Sequence[OffloadKey]):
    """Keys of chunks of one group of one request: they end at every ``step``-th hash, from hash ``first`` on.

    A long prompt has thousands of chunks. A run names them without making their keys: whoever wants keys gets
    them one by one, compiled code reads ``block_hashes`` instead. ``block_hashes`` may grow, nothing else.
    """

    __slots__ = ("block_hashes", "group", "hashes")

    def __init__(
        self, block_hashes: Sequence[BlockHash], group: GroupId, first: int, step: int, count: int
    ) -> None:
        self.block_hashes = block_hashes
        self.group = group
        self.hashes = range(first, first + step * count, step)

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, index: int) -> OffloadKey: ...
    @overload
    def __getitem__(self, index: slice) -> KeyRun: ...
    def __getitem__(self, index: int | slice) -> OffloadKey | KeyRun:
        if isinstance(index, slice):
            part = self.hashes[index]
            return KeyRun(self.block_hashes, self.group, part.start, part.step, len(part))
        return make_offload_key(self.block_hashes[self.hashes[index]], self.group)

    def __iter__(self) -> Iterator[OffloadKey]:
        suffix = self.group.to_bytes(_GROUP_BYTES, "big")
        block_hashes = self.block_hashes
        return (OffloadKey(block_hashes[index] + suffix) for index in self.hashes)

    def meets(self, other: KeyRun) -> bool:
        """Whether both runs name a chunk that is the same. Takes constant time for runs of equal ``step``.

        Hashes are chained: where the first link that both name differs, all behind it differ too.
        """
        if self.group != other.group:
            return False
        if self.hashes.step != other.hashes.step and min(len(self), len(other)) > 1:
            return not set(self).isdisjoint(other)
        first = max(self.hashes.start, other.hashes.start)
        both_name_it = first in self.hashes and first in other.hashes
        return both_name_it and self.block_hashes[first] == other.block_hashes[first]


@final
class KeyRuns(Sequence[OffloadKey]):
    """Several runs one after another: the keys of one load or store, group after group."""

    __slots__ = ("runs",)

    def __init__(self, runs: Sequence[KeyRun]) -> None:
        self.runs = tuple(runs)

    def __len__(self) -> int:
        return sum([len(run.hashes) for run in self.runs])

    @overload
    def __getitem__(self, index: int) -> OffloadKey: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[OffloadKey, ...]: ...
    def __getitem__(self, index: int | slice) -> OffloadKey | tuple[OffloadKey, ...]:
        if isinstance(index, slice):
            return tuple(self)[index]
        place = range(len(self))[index]
        for run in self.runs:
            if place < len(run):
                return run[place]
            place -= len(run)
        raise IndexError(index)

    def __iter__(self) -> Iterator[OffloadKey]:
        for run in self.runs:
            yield from run


def count_by_group(keys: Collection[OffloadKey]) -> Iterable[tuple[GroupId, int]]:
    """How many of ``keys`` are of which group; a group may come several times."""
    if isinstance(keys, KeyRun):
        return ((keys.group, len(keys)),)
    if isinstance(keys, KeyRuns):
        return [(run.group, len(run)) for run in keys.runs]
    suffixes = Counter(map(itemgetter(slice(-_GROUP_BYTES, None)), keys))
    return [(GroupId(int.from_bytes(suffix, "big")), count) for suffix, count in suffixes.items()]
