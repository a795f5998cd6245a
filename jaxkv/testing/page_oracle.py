"""What a page is, said in NumPy: slices of logical arrays along the block axis. Independent of page plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig
from jaxkv.testing.arrays import random_caches


@final
@dataclass(frozen=True, slots=True)
class PageSlice:
    """Which bytes of a leaf are one page.

    A block is ``entries`` entries of ``block_axis``; of its row-major bytes the page is ``start`` to ``stop``
    (``None``: the end).
    """

    block_axis: int
    entries: int = 1
    start: int = 0
    stop: int | None = None

    def read(self, leaf: npt.NDArray[Any], block: int) -> bytes:
        """The page of ``block``."""
        return leaf[self._index(block)].tobytes()[self.start : self.stop]

    def write(self, leaf: npt.NDArray[Any], block: int, page: bytes) -> None:
        """Put ``page`` back where ``read`` found it."""
        index = self._index(block)
        whole = bytearray(leaf[index].tobytes())
        whole[self.start : self.stop] = page
        leaf[index] = np.frombuffer(bytes(whole), leaf.dtype).reshape(leaf[index].shape)

    def _index(self, block: int) -> tuple[slice, ...]:
        entries = slice(block * self.entries, (block + 1) * self.entries)
        return (*[slice(None)] * self.block_axis, entries)


@final
@dataclass(frozen=True, slots=True)
class LayoutCase:
    """One row of the layout table; ``jaxkv.testing`` says how to use it.

    ``pages[layer]`` has one slice for each leaf of the layer, in pytree order.
    """

    name: str
    config: KVCacheConfig
    shapes: Mapping[str, Any]
    pages: Mapping[str, tuple[PageSlice, ...]]
    hints: Mapping[str, LayoutHint] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int) -> dict[str, Any]:
        """Caches of random bits."""
        caches: dict[str, Any] = random_caches(self.shapes, seed)
        return caches

    def oracle(self, host_caches: Mapping[str, Any], group: int, block: int) -> bytes:
        """The record of one block, without the padding at its end."""
        return b"".join(page.read(leaf, block) for page, leaf in self._pages_of(host_caches, group))

    def poke(self, host_caches: Mapping[str, Any], group: int, block: int, record: bytes) -> None:
        """Write a record of ``oracle`` into ``host_caches``."""
        done = 0
        for page, leaf in self._pages_of(host_caches, group):
            size = len(page.read(leaf, block))
            page.write(leaf, block, record[done : done + size])
            done += size
        if done != len(record):
            raise ValueError(f"the record of group {group} has {done} bytes, got {len(record)}")

    def _pages_of(
        self, host_caches: Mapping[str, Any], group: int
    ) -> list[tuple[PageSlice, npt.NDArray[Any]]]:
        found: list[tuple[PageSlice, npt.NDArray[Any]]] = []
        for name in self.config.groups[group].layer_names:
            leaves = jax.tree_util.tree_leaves(host_caches[name])
            found += zip(self.pages[name], leaves, strict=True)
        return found
