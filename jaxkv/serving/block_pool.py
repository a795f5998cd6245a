"""The blocks of one group: who is free, who is shared, and which hold a reusable prefix.

A block whose reference count drops to zero is free. If it holds a cached prefix it stays findable until the
pool needs it for something else; the least recently used one goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import final

from jaxkv.keys import BlockHash, BlockId


@final
class BlockPool:
    """Reference counts and prefix cache of ``num_blocks`` blocks. Every call is O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._refs = [0] * num_blocks
        self._hash_of: list[BlockHash | None] = [None] * num_blocks
        self._block_of: dict[BlockHash, BlockId] = {}
        self._blank = [BlockId(block) for block in reversed(range(num_blocks))]
        self._reusable: OrderedDict[BlockId, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, those that hold an unused prefix included."""
        return len(self._blank) + len(self._reusable)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a findable prefix."""
        return len(self._block_of)

    def find(self, block_hash: BlockHash) -> BlockId | None:
        """The block that holds this prefix's last block, if any does."""
        return self._block_of.get(block_hash)

    def is_free(self, block: BlockId) -> bool:
        """Whether nobody uses the block."""
        return self._refs[block] == 0

    def acquire(self, block: BlockId) -> None:
        """Use a cached block once more. Mutates the pool."""
        assert self._hash_of[block] is not None, f"block {block} holds no cached prefix"
        if self._refs[block] == 0:
            del self._reusable[block]
        self._refs[block] += 1

    def allocate(self) -> BlockId:
        """A block for new content: one that holds nothing, else the least recently used prefix's.

        The caller has checked ``num_free``.
        """
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            self._forget(block)
            self.num_evictions += 1
        assert self._refs[block] == 0, f"block {block} was free and in use"
        self._refs[block] = 1
        return block

    def release(self, block: BlockId) -> None:
        """Give up one use of the block; the last one frees it."""
        assert self._refs[block] > 0, f"block {block} is released more often than used"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._reusable[block] = None

    def register(self, block: BlockId, block_hash: BlockHash) -> None:
        """Make a used block findable. If the prefix is cached already, or the block is, nothing changes."""
        assert self._refs[block] > 0, f"block {block} is free and cannot be cached"
        if self._hash_of[block] is None and block_hash not in self._block_of:
            self._hash_of[block] = block_hash
            self._block_of[block_hash] = block

    def clear_cache(self) -> None:
        """Forget every prefix. Blocks in use stay in use; this is not counted as eviction."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._blank.extend(reversed(self._reusable))
        self._reusable.clear()

    def _forget(self, block: BlockId) -> None:
        block_hash = self._hash_of[block]
        assert block_hash is not None
        del self._block_of[block_hash]
        self._hash_of[block] = None
