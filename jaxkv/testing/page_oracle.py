"""What a page is, said in NumPy: slices of logical arrays along the block axis. Independent of page plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig
from jaxkv.testing.arrays import as_bytes, from_bytes, random_caches

Array = npt.NDArray[Any]


@final
@dataclass(frozen=True, slots=True)
class PageSlice:
    """Which bytes of a leaf are one page.

    A block is ``entries`` entries of ``block_axis``; of its row-major bytes the page is ``start`` to ``stop``
    (``None``: the end). With a ``row_axis``, blocks stand in rows: those of the first entry of that axis come
    first.

    Serving stacks split ``split_axis`` over devices; ``None`` where every device holds the whole leaf.
    ``lists_heads`` says whether a slice of that axis means the same for any number of devices.
    """

    block_axis: int
    entries: int = 1
    start: int = 0
    stop: int | None = None
    row_axis: int | None = None
    split_axis: int | None = None
    lists_heads: bool = True

    @property
    def data_axis(self) -> int:
        """The axis along which blocks are spread over data shards."""
        return self.block_axis if self.row_axis is None else self.row_axis

    def num_parts(self, shape: Sequence[int], num_devices: int) -> int:
        """Parts in which ``num_devices`` hold a leaf of ``shape``: as many as devices, or else one."""
        splits = self.split_axis is not None and shape[self.split_axis] % num_devices == 0
        return num_devices if splits else 1

    def parts(self, leaf: Array, num_devices: int) -> list[Array]:
        """Views of ``leaf``: what each of ``num_devices`` holds, or the whole where all hold the same."""
        if self.split_axis is None:
            return [leaf]
        return np.split(leaf, self.num_parts(leaf.shape, num_devices), self.split_axis)

    def read(self, leaf: Array, block: int) -> bytes:
        """The page of ``block``."""
        return as_bytes(leaf[self._index(leaf, block)]).tobytes()[self.start : self.stop]

    def write(self, leaf: Array, block: int, page: bytes) -> None:
        """Put ``page`` back where ``read`` found it."""
        index = self._index(leaf, block)
        whole = bytearray(as_bytes(leaf[index]).tobytes())
        whole[self.start : self.stop] = page
        leaf[index] = from_bytes(bytes(whole), leaf.dtype, leaf[index].shape)

    def _index(self, leaf: Array, block: int) -> tuple[slice, ...]:
        index = [slice(None)] * leaf.ndim
        if self.row_axis is not None:
            row, block = divmod(block, leaf.shape[self.block_axis] // self.entries)
            index[self.row_axis] = slice(row, row + 1)
        index[self.block_axis] = slice(block * self.entries, (block + 1) * self.entries)
        return tuple(index)


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
    hints: Mapping[str, LayoutHint | Sequence[LayoutHint]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int) -> dict[str, Any]:
        """Caches of random bits."""
        caches: dict[str, Any] = random_caches(self.shapes, seed)
        return caches

    def with_data_shards(self, count: int) -> LayoutCase:
        """The case with ``count`` times the blocks in its arrays; its config counts those of one shard."""
        made: dict[int, jax.ShapeDtypeStruct] = {}
        shapes = {
            name: jax.tree_util.tree_unflatten(
                jax.tree_util.tree_structure(tree),
                [
                    made.setdefault(id(leaf), _lengthen(leaf, page.data_axis, count))
                    for page, leaf in zip(self.pages[name], jax.tree_util.tree_leaves(tree), strict=True)
                ],
            )
            for name, tree in self.shapes.items()
        }
        return replace(self, shapes=shapes)

    def data_shard(self, host_caches: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
        """Views of ``host_caches``: the blocks of data shard ``index`` of ``count``. Ids are local to it."""
        shards: dict[str, Any] = {}
        for name, tree in host_caches.items():
            leaves, treedef = jax.tree_util.tree_flatten(tree)
            parts = [
                np.split(leaf, count, page.data_axis)[index]
                for page, leaf in zip(self.pages[name], leaves, strict=True)
            ]
            shards[name] = jax.tree_util.tree_unflatten(treedef, parts)
        return shards

    def oracle(
        self,
        host_caches: Mapping[str, Any],
        group: int,
        block: int,
        num_devices: int = 1,
        *,
        is_portable: bool = False,
    ) -> bytes:
        """The record of one block, without the padding at its end.

        With several devices, pages hold the parts of the devices one after another; with ``is_portable``
        only those whose parts do not mean the same for any number of devices.
        """
        pages = self._pages(host_caches, group, num_devices, is_portable=is_portable)
        return b"".join(page.read(leaf, block) for page, leaf in pages)

    def poke(
        self,
        host_caches: Mapping[str, Any],
        group: int,
        block: int,
        record: bytes,
        num_devices: int = 1,
        *,
        is_portable: bool = False,
    ) -> None:
        """Write a record of ``oracle``, with the same arguments, into ``host_caches``."""
        done = 0
        for page, leaf in self._pages(host_caches, group, num_devices, is_portable=is_portable):
            size = len(page.read(leaf, block))
            page.write(leaf, block, record[done : done + size])
            done += size
        if done != len(record):
            raise ValueError(f"the record of group {group} has {done} bytes, got {len(record)}")

    def _pages(
        self, host_caches: Mapping[str, Any], group: int, num_devices: int, *, is_portable: bool
    ) -> Iterator[tuple[PageSlice, Array]]:
        """The pages of a record in order, each with the leaf, or the part of one, that it is a slice of."""
        for name in self.config.groups[group].layer_names:
            leaves = jax.tree_util.tree_leaves(host_caches[name])
            for page, leaf in zip(self.pages[name], leaves, strict=True):
                is_whole = is_portable and page.lists_heads
                for part in page.parts(leaf, 1 if is_whole else num_devices):
                    yield page, part


def _lengthen(leaf: jax.ShapeDtypeStruct, axis: int, count: int) -> jax.ShapeDtypeStruct:
    struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor
    shape = (*leaf.shape[:axis], count * leaf.shape[axis], *leaf.shape[axis + 1 :])
    made: jax.ShapeDtypeStruct = struct(shape, leaf.dtype)
    return made
