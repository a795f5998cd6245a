"""The groups of a model cut into chunks: token ranges, blocks and keys of each. Pure.

A chunk is named by the hash of the prefix that ends with it. What the drafter of an EAGLE or MTP model caches
for a position depends on the token behind it as well, so chunks of its groups are named by the next link of
the chain: whoever finds one shares that token too, and one whose last position may still be rewritten has no
name yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import assert_never, final

from jaxkv.hits import HitGroup, cut_chunk
from jaxkv.keys import BlockHash, GroupId, KeyRun
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

SurelyThere = Callable[[range, int, int], bool]
"""Whether whole chunks are on the device as their end left them, if the request holds their blocks.

Called with the chunks and the ends (tokens) of the step before last and of the last step.
"""


@final
@dataclass(frozen=True, slots=True)
class ChunkedCaches:
    """How the caches of one model fall into chunks of ``blocks_per_chunk`` blocks.

    ``hit_groups`` are the groups as hit search sees them. Hits end at a multiple of ``alignment_tokens``, a
    chunk boundary of every group, or (``keeps_tails``) at any multiple of ``tokens_per_hash`` where the
    chunks it cuts were stored as they were there. A boundary's chunks have names in all groups once
    ``lookahead_tokens`` behind it are known. ``surely_there`` has a function for each group of which chunks
    need not be looked at one by one.
    """

    config: KVCacheConfig
    blocks_per_chunk: int
    hit_groups: tuple[HitGroup, ...] = field(init=False)
    alignment_tokens: int = field(init=False)
    tokens_per_hash: int = field(init=False)
    lookahead_tokens: int = field(init=False)
    surely_there: tuple[SurelyThere | None, ...] = field(init=False)
    groups: tuple[GroupId, ...] = field(init=False)
    _lookahead: tuple[int, ...] = field(init=False)
    _chunk_tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        groups = tuple(HitGroup(g.spec, g.block_size * self.blocks_per_chunk) for g in self.config.groups)
        object.__setattr__(self, "hit_groups", groups)
        object.__setattr__(self, "groups", tuple(map(GroupId, range(len(groups)))))
        object.__setattr__(self, "_chunk_tokens", tuple(group.tokens_per_chunk for group in groups))
        object.__setattr__(self, "alignment_tokens", math.lcm(*(group.tokens_per_chunk for group in groups)))
        object.__setattr__(self, "tokens_per_hash", self.config.hash_block_size)
        object.__setattr__(self, "_lookahead", tuple(int(g.is_eagle_group) for g in self.config.groups))
        object.__setattr__(self, "lookahead_tokens", max(self._lookahead) * self.tokens_per_hash)
        there = tuple(_surely_there(group, self.blocks_per_chunk) for group in groups)
        object.__setattr__(self, "surely_there", there)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.hit_groups)

    @property
    def keeps_tails(self) -> bool:
        """Whether a prompt can end inside a chunk and still be found to its last link."""
        return self.tokens_per_hash < self.alignment_tokens

    def hashed_tokens(self, block_hashes: Sequence[BlockHash]) -> int:
        """Tokens the hashes cover."""
        return len(block_hashes) * self.tokens_per_hash

    def tokens_per_chunk(self, group: GroupId) -> int:
        """Tokens of one chunk."""
        return self._chunk_tokens[group]

    def named_at_tokens(self, group: GroupId, end_tokens: int) -> int:
        """Tokens that must be computed before a chunk that ends at ``end_tokens`` is final and has a name."""
        return end_tokens + self._lookahead[group] * self.tokens_per_hash

    def groups_cut_at(self, end_tokens: int) -> tuple[GroupId, ...]:
        """Groups that keep a chunk cut short for a tail that ends at ``end_tokens``."""
        return tuple(
            GroupId(index)
            for index, group in enumerate(self.hit_groups)
            if cut_chunk(group, end_tokens) is not None
        )

    def tail_named_at_tokens(self, end_tokens: int) -> int:
        """As ``named_at_tokens`` for all chunks that are cut at ``end_tokens``."""
        groups = self.groups_cut_at(end_tokens)
        return max((self.named_at_tokens(group, end_tokens) for group in groups), default=end_tokens)

    def chunk_named_at_tokens(self, group: GroupId, chunk: int) -> int:
        """As ``named_at_tokens`` for the end of a whole chunk."""
        return (chunk + 1) * self._chunk_tokens[group] + self._lookahead[group] * self.tokens_per_hash

    def num_named_chunks(self, group: GroupId, num_tokens: int) -> int:
        """Whole chunks of ``group`` that have a name once ``num_tokens`` tokens are computed."""
        named = num_tokens - self._lookahead[group] * self.tokens_per_hash
        return named // self._chunk_tokens[group] if named > 0 else 0

    def keys(self, block_hashes: Sequence[BlockHash], group: GroupId, chunks: range) -> KeyRun:
        """Keys of neighbouring whole chunks that have names."""
        step = self._chunk_tokens[group] // self.tokens_per_hash
        first = (chunks.start + 1) * step - 1 + self._lookahead[group]
        return KeyRun(block_hashes, group, first, step, len(chunks))

    def tail_key(self, block_hashes: Sequence[BlockHash], group: GroupId, end_tokens: int) -> KeyRun:
        """The key of the chunk that holds token ``end_tokens - 1``, cut short at ``end_tokens``."""
        return KeyRun(
            block_hashes, group, end_tokens // self.tokens_per_hash - 1 + self._lookahead[group], 1, 1
        )

    def blocks(self, chunks: range) -> range:
        """Positions of the blocks of neighbouring chunks in the group's table."""
        return range(chunks.start * self.blocks_per_chunk, chunks.stop * self.blocks_per_chunk)

    def is_state(self, group: GroupId) -> bool:
        """Whether a chunk keeps one recurrent state, that of its last block, and nothing of the others."""
        return isinstance(self.config.groups[group].spec, MambaSpec)


def _surely_there(group: HitGroup, blocks_per_chunk: int) -> SurelyThere | None:
    if blocks_per_chunk > 1:
        return None
    size = group.tokens_per_chunk
    match group.spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            return lambda *_: True
        case SlidingWindowSpec(sliding_window=window):
            return lambda chunks, previous, _: chunks.start * size > previous - window
        case MambaSpec():
            return lambda chunks, previous, complete: (
                len(chunks) == 1 and previous <= chunks.stop * size == complete
            )
        case ChunkedLocalAttentionSpec():
            return None
        case _:
            assert_never(group.spec)
