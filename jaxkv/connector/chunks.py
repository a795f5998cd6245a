"""The groups of a model cut into chunks: token ranges, blocks and keys of each. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from jaxkv.errors import ConfigError
from jaxkv.hits import HitGroup
from jaxkv.keys import BlockHash, GroupId, OffloadKey, make_offload_key
from jaxkv.spec import KVCacheConfig, MambaSpec


@final
@dataclass(frozen=True, slots=True, order=True)
class ChunkId:
    """Chunk ``index`` of a group, counted from the start of a request."""

    group: GroupId
    index: int


@final
@dataclass(frozen=True, slots=True)
class ChunkedCaches:
    """How the caches of one model fall into chunks of ``blocks_per_chunk`` blocks.

    ``hit_groups`` are the groups as hit search sees them. A host hit ends at a multiple of
    ``alignment_tokens``: a chunk boundary of every group. All sizes are worked out once, for a long request
    asks for them thousands of times.
    """

    config: KVCacheConfig
    blocks_per_chunk: int
    hit_groups: tuple[HitGroup, ...] = field(init=False)
    alignment_tokens: int = field(init=False)
    _tokens_per_hash: int = field(init=False)

    def __post_init__(self) -> None:
        if self.blocks_per_chunk < 1:
            raise ConfigError(f"blocks_per_chunk must be at least 1, got {self.blocks_per_chunk}")
        groups = tuple(HitGroup(g.spec, g.block_size * self.blocks_per_chunk) for g in self.config.groups)
        object.__setattr__(self, "hit_groups", groups)
        object.__setattr__(self, "alignment_tokens", math.lcm(*(group.tokens_per_chunk for group in groups)))
        object.__setattr__(self, "_tokens_per_hash", self.config.hash_block_size)

    def hashed_tokens(self, block_hashes: Sequence[BlockHash]) -> int:
        """Tokens the hashes cover."""
        return len(block_hashes) * self._tokens_per_hash

    def tokens_per_chunk(self, group: GroupId) -> int:
        """Tokens of one chunk."""
        return self.hit_groups[group].tokens_per_chunk

    def end_tokens(self, chunk: ChunkId) -> int:
        """The token boundary at which a chunk ends."""
        return (chunk.index + 1) * self.tokens_per_chunk(chunk.group)

    def key(self, block_hashes: Sequence[BlockHash], chunk: ChunkId) -> OffloadKey:
        """The key of a chunk whose tokens ``block_hashes`` cover: the hash that ends where the chunk ends."""
        last = self.end_tokens(chunk) // self._tokens_per_hash - 1
        return make_offload_key(block_hashes[last], chunk.group)

    def blocks(self, chunk: ChunkId) -> range:
        """Positions of the chunk's blocks in the group's table."""
        first = chunk.index * self.blocks_per_chunk
        return range(first, first + self.blocks_per_chunk)

    def payload_blocks(self, chunk: ChunkId) -> range:
        """Those of ``blocks`` the chunk keeps the content of: the last one alone in a recurrent group."""
        blocks = self.blocks(chunk)
        is_state = isinstance(self.config.groups[chunk.group].spec, MambaSpec)
        return blocks[-1:] if is_state else blocks
