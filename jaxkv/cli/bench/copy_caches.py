"""The caches that copies are measured on: leaves of a given page size, and their blocks in random order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

SMALLEST_PAGE = 4096
_BLOCK, _HEAD = 16, 32  # Keys and values of one head, float32: the smallest page.
_HEADS_MAJOR = 8  # With twice the head size: 16 runs of 4 KiB, 64 KiB a page.

GROUP = GroupId(0)


@final
@dataclass(frozen=True, slots=True)
class Shape:
    """Leaves of ``page_bytes`` a block. ``run_bytes`` of them stand together: all, or 4 KiB where heads come
    before blocks."""

    page_bytes: int
    run_bytes: int
    num_leaves: int
    num_blocks: int

    @property
    def is_strided(self) -> bool:
        """Whether a page stands in pieces."""
        return self.run_bytes < self.page_bytes

    @property
    def num_bytes(self) -> int:
        """What one transfer of all blocks moves."""
        return self.page_bytes * self.num_leaves * self.num_blocks

    @property
    def block_axis(self) -> int:
        """The axis of a leaf that counts blocks."""
        return 2 if self.is_strided else 0

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """``(blocks, 2, tokens, heads, head size)``, or heads major: ``(2, heads, blocks, tokens, size)``."""
        heads, size = self._heads
        if self.is_strided:
            return (2, heads, self.num_blocks, _BLOCK, size)
        return (self.num_blocks, 2, _BLOCK, heads, size)

    @property
    def _heads(self) -> tuple[int, int]:
        if self.is_strided:
            return _HEADS_MAJOR, 2 * _HEAD
        return self.page_bytes // SMALLEST_PAGE, _HEAD

    def make_canonical(self, caches: dict[str, jax.Array]) -> CanonicalKVCaches:
        """What ``BlockTransfer`` is told of the caches, ``{layer: leaf}``."""
        heads, size = self._heads
        spec = FullAttentionSpec(block_size=_BLOCK, num_kv_heads=heads, head_size=size, dtype="float32")
        config = KVCacheConfig(groups=(KVCacheGroupSpec(tuple(caches), spec, self.num_blocks),))
        hint = LayoutHint(block_axis=self.block_axis)
        return canonicalize(caches, config, dict.fromkeys(caches, hint))

    def index(self, block_ids: Any) -> tuple[Any, ...]:
        """What to index a leaf with to name blocks."""
        return (*(slice(None),) * self.block_axis, block_ids)

    def run_offsets(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Where the runs of these blocks begin in a leaf, block after block."""
        if not self.is_strided:
            return block_ids.astype(np.int64) * self.page_bytes
        runs = np.arange(self.page_bytes // self.run_bytes) * self.num_blocks
        offsets: npt.NDArray[np.int64] = (runs + block_ids[:, None]).reshape(-1).astype(np.int64)
        return offsets * self.run_bytes


def make_shape(page_bytes: int, num_leaves: int, moved_bytes: int, *, strided: bool = False) -> Shape:
    """Leaves of which all blocks together have about ``moved_bytes``."""
    if strided:
        run_bytes, page_bytes = SMALLEST_PAGE, 2 * _HEADS_MAJOR * SMALLEST_PAGE
    else:
        run_bytes = page_bytes
    num_blocks = max(2, moved_bytes // (page_bytes * num_leaves))
    return Shape(page_bytes, run_bytes, num_leaves, num_blocks)


def fill(shape: tuple[int, ...]) -> jax.Array:
    """An array of different numbers, in memory as XLA allocates it."""
    filled: jax.Array = jax.jit(lambda: jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape))()
    return filled
