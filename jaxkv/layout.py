"""Where the bytes of one block lie inside one cache leaf. Knows shapes and strides; copies nothing.

A page is the bytes of one block in one leaf, in row-major order of the leaf with the block axis taken out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

import jax
import numpy as np

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.page_plan import Loop, PagePlan, cut_loops, merge_loops, plan_loops
from jaxkv.sharding import Cell, LeafShards, whole_leaf
from jaxkv.spec import dtype_bits


def _is_number(value: object, least: int) -> bool:
    return isinstance(value, int | np.integer) and bool(value >= least)


@final
@dataclass(frozen=True, slots=True)
class LayoutHint:
    """What the shape of a leaf cannot say.

    ``block_axis`` is the axis that counts blocks, ``"auto"`` where just one axis has that size; a pair
    ``(row_axis, axis)`` where blocks stand in rows, as in a cache ``[B, L, H, D]`` of whole requests: then
    block ``b`` is entry ``b % n`` of row ``b // n`` with ``n`` blocks to a row.
    ``kernel_blocks_per_block`` consecutive entries of (the last) block axis make one block.
    ``page_offset_bytes`` and ``page_size_bytes`` cut the layer's page out of a wider row, counted in the
    row-major bytes of one block; ``None`` stands for what the spec says.

    ``head_axis`` is an axis that lists kv heads in order, or anything else of which a slice means the same
    however many devices share the axis. ``head_copies`` neighbours of it are copies of one head, where there
    are more devices than heads. Raises ``ConfigError`` on a value that cannot work.
    """

    block_axis: int | tuple[int, int] | Literal["auto"] = "auto"
    kernel_blocks_per_block: int = 1
    page_offset_bytes: int = 0
    page_size_bytes: int | None = None
    head_axis: int | None = None
    head_copies: int = 1

    def __post_init__(self) -> None:
        axes = () if self.block_axis == "auto" else self.block_axes
        if self.block_axis != "auto" and (
            not all(_is_number(axis, 0) for axis in axes) or not 1 <= len(set(axes)) == len(axes) <= 2
        ):
            raise ConfigError(
                f"LayoutHint.block_axis must be 'auto', 0, 1, ... or two of these, got {self.block_axis!r}"
            )
        smallest = {"kernel_blocks_per_block": 1, "page_offset_bytes": 0, "head_copies": 1}
        smallest_if_given = {"page_size_bytes": 1, "head_axis": 0}
        for name, least in (smallest | smallest_if_given).items():
            value = getattr(self, name)
            if not _is_number(value, least) and not (value is None and name in smallest_if_given):
                raise ConfigError(f"LayoutHint.{name} must be an integer of at least {least}, got {value!r}")
        if self.head_axis is not None and self.head_axis in axes:
            raise ConfigError(f"LayoutHint.head_axis {self.head_axis} is a block axis already")
        if self.head_copies > 1 and self.head_axis is None:
            raise ConfigError("LayoutHint.head_copies needs head_axis: the axis on which the copies stand")

    @property
    def block_axes(self) -> tuple[int, ...]:
        """``block_axis`` as a tuple. Only where it is not ``"auto"``."""
        assert self.block_axis != "auto"
        return self.block_axis if isinstance(self.block_axis, tuple) else (self.block_axis,)

    @property
    def cuts_row(self) -> bool:
        """Whether the layer takes a part of each block's bytes."""
        return self.page_offset_bytes > 0 or self.page_size_bytes is not None


@final
@dataclass(frozen=True, slots=True)
class CacheLeaf:
    """What layout derivation knows of one array: a name for messages, its shape, dtype and place.

    ``sharding`` is ``None`` for a leaf that lies whole on one device.
    """

    label: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    shards: LeafShards
    sharding: jax.sharding.Sharding | None = field(default=None)

    def __str__(self) -> str:
        return f"{self.label} ({self.dtype.name}{list(self.shape)})"

    @property
    def is_raw(self) -> bool:
        """Whether the leaf holds plain bytes, which may stand for any dtype."""
        return self.dtype == np.uint8

    @property
    def element_bits(self) -> int:
        """What one element takes in memory."""
        return dtype_bits(self.dtype)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what one device holds."""
        return self.shards.local_shape(self.shape)


def whole_cache_leaf(label: str, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> CacheLeaf:
    """A leaf that lies whole on one device."""
    return CacheLeaf(label, shape, dtype, whole_leaf(len(shape)))


@final
@dataclass(frozen=True, slots=True)
class PageAxis:
    """One axis of a page: how many entries a device holds, their distance there, over how many parts."""

    leaf_axis: int
    count: int
    stride_bits: int
    parts: int = 1


@final
@dataclass(frozen=True, slots=True)
class BlockView:
    """What one device holds of a leaf, seen as ``num_blocks`` blocks: where they start and what they hold.

    Two layers with equal views of one leaf overlap exactly where their byte ranges of the block do.
    """

    num_blocks: int
    num_rows: int
    row_stride: int
    block_stride: int
    block_axes: tuple[int, ...]
    axes: tuple[PageAxis, ...]
    element_bits: int

    @property
    def page_shape(self) -> tuple[int, ...]:
        """The shape of one block, over all devices that share it."""
        return tuple(axis.count * axis.parts for axis in self.axes)

    @property
    def num_shards(self) -> int:
        """Parts of one block that devices share out."""
        return math.prod(axis.parts for axis in self.axes)

    @property
    def block_bytes(self) -> int:
        """Bytes one device holds of a block, those of other layers and padding included."""
        return math.prod(axis.count for axis in self.axes) * self.element_bits // 8

    def shard_of(self, cell: Cell) -> int:
        """The number, row-major, of the part of a block that lies at ``cell`` of the leaf."""
        shard = 0
        for axis in self.axes:
            shard = shard * axis.parts + (cell[axis.leaf_axis] if axis.parts > 1 else 0)
        return shard

    def data_shard_of(self, cell: Cell) -> int:
        """Which of the id spaces along the block axis ``cell`` of the leaf belongs to."""
        return cell[self.block_axes[0]]

    def loops(self, counts: tuple[int, ...]) -> list[Loop]:
        """The page's axes as loops, in bits, in a record that has ``counts`` entries along each."""
        strides = [self.element_bits * math.prod(counts[axis + 1 :]) for axis in range(len(counts))]
        return [
            Loop(axis.count, axis.stride_bits, stride)
            for axis, stride in zip(self.axes, strides, strict=True)
        ]


def view_blocks(leaf: CacheLeaf, num_blocks: int, hint: LayoutHint) -> BlockView:
    """Find the block axis of ``leaf`` and split what one device holds of it into blocks.

    Raises ``CacheMismatchError`` if no axis, or more than one, can be the block axis, or if a run is
    not a whole number of bytes.
    """
    per_block = hint.kernel_blocks_per_block
    block_axes = _block_axes(leaf, num_blocks * per_block, hint)
    shape, grid = leaf.local_shape, leaf.shards.grid
    stride = [leaf.element_bits * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axes = []
    for axis, size in enumerate(shape):
        if axis not in block_axes:
            axes.append(PageAxis(axis, size, stride[axis], grid[axis]))
        elif axis == block_axes[-1] and per_block > 1:
            axes.append(PageAxis(axis, per_block, stride[axis]))
    if math.prod(shape) == 0:
        raise CacheMismatchError(f"{leaf} holds no bytes; leave layers without a cache out of the config")
    _, run_bits = merge_loops(
        [Loop(axis.count, axis.stride_bits, axis.stride_bits) for axis in axes], leaf.element_bits
    )
    if run_bits % 8:
        raise CacheMismatchError(
            f"{leaf} stores a block in runs of {run_bits} bits, which are not whole bytes; "
            "pad the last axis to an even number of elements or move the block axis to the front"
        )
    in_rows = len(block_axes) > 1
    return BlockView(
        num_blocks=num_blocks,
        num_rows=shape[block_axes[0]] if in_rows else 1,
        row_stride=stride[block_axes[0]] // 8 if in_rows else 0,
        block_stride=per_block * stride[block_axes[-1]] // 8,
        block_axes=block_axes,
        axes=tuple(axes),
        element_bits=leaf.element_bits,
    )


def _block_axes(leaf: CacheLeaf, num_entries: int, hint: LayoutHint) -> tuple[int, ...]:
    if hint.block_axis == "auto":
        candidates = [axis for axis, size in enumerate(leaf.local_shape) if size == num_entries]
        if len(candidates) == 1:
            return (candidates[0],)
        found = f"axes {candidates} all have" if candidates else "no axis has"
        raise CacheMismatchError(
            f"{leaf}: {found} the size {num_entries} of the block axis{_on_each_device(leaf)}; "
            "check num_blocks of the group, or name the axis with LayoutHint(block_axis=...)"
        )
    axes = hint.block_axes
    if max(axes) >= len(leaf.shape):
        raise CacheMismatchError(
            f"{leaf} has rank {len(leaf.shape)}, but its LayoutHint names block axis {max(axes)}"
        )
    sizes = [leaf.local_shape[axis] for axis in axes]
    if math.prod(sizes) != num_entries or sizes[-1] % hint.kernel_blocks_per_block:
        raise CacheMismatchError(
            f"{leaf}: block axis {hint.block_axis} has size {' x '.join(map(str, sizes))}"
            f"{_on_each_device(leaf)}, expected {num_entries} (num_blocks times kernel_blocks_per_block="
            f"{hint.kernel_blocks_per_block}){' in whole blocks to a row' if len(axes) > 1 else ''}; "
            "make the array and the group agree"
        )
    if leaf.shards.grid[axes[-1]] > 1 and len(axes) > 1:
        raise CacheMismatchError(
            f"{leaf}: axis {axes[-1]}, along which the blocks of a row stand, is split over devices; "
            f"split axis {axes[0]} instead"
        )
    return axes


def _on_each_device(leaf: CacheLeaf) -> str:
    if leaf.local_shape == leaf.shape:
        return ""
    return f" in the part {list(leaf.local_shape)} that each device holds (num_blocks counts one such part)"


def plan_page(leaf: CacheLeaf, view: BlockView, page: range, record_offset: int) -> list[PagePlan]:
    """The copies of bytes ``page`` of every block of ``leaf`` to ``record_offset`` in the block record.

    Runs that touch each other become one. Raises as ``find_page`` does.
    """
    leaf_offset, loops, run_bits = find_page(leaf, view, page)
    return _plan(view, loops, run_bits, leaf_offset, 8 * record_offset)


def find_page(leaf: CacheLeaf, view: BlockView, page: range) -> tuple[int, tuple[Loop, ...], int]:
    """Where bytes ``page`` of a block begin in ``leaf``, the loops over them and their runs, all in bits.

    ``page`` is a range of the row-major bytes that one device holds of a block. Raises ``CacheMismatchError``
    unless it lies inside one run or covers whole runs.
    """
    if not page or page.stop > view.block_bytes:
        raise CacheMismatchError(
            f"{leaf}: bytes {page.start} to {page.stop} were asked for, but a block has {view.block_bytes}; "
            "check page_offset_bytes and page_size_bytes of its LayoutHint"
        )
    local = tuple(axis.count for axis in view.axes)
    loops, run_bits = merge_loops(view.loops(local), view.element_bits)
    found = cut_loops(loops, run_bits, range(8 * page.start, 8 * page.stop))
    if found is None:
        raise CacheMismatchError(
            f"{leaf}: bytes {page.start} to {page.stop} of a block cut its runs of {run_bits // 8} bytes, "
            "or an axis outside them; take a part of one run or whole entries of one axis, or put the block "
            "axis first"
        )
    return found


def shares_whole_bytes(view: BlockView) -> bool:
    """Whether the parts of a page that several devices hold interleave byte by byte or coarser."""
    return merge_loops(view.loops(view.page_shape), view.element_bits)[1] % 8 == 0


def plan_shard(view: BlockView, shard: int, record_offset: int) -> list[PagePlan]:
    """The copies of part ``shard`` of every block to its place in the whole page.

    The whole page, of all devices that share a block, begins at ``record_offset``; its parts must interleave
    by whole bytes.
    """
    loops = view.loops(view.page_shape)
    cell = np.unravel_index(shard, [axis.parts for axis in view.axes])
    first = sum(int(at) * loop.count * loop.page_stride for at, loop in zip(cell, loops, strict=True))
    merged, run_bits = merge_loops(loops, view.element_bits)
    return _plan(view, merged, run_bits, 0, 8 * record_offset + first)


def _plan(
    view: BlockView, loops: Sequence[Loop], run_bits: int, leaf_offset_bits: int, record_offset_bits: int
) -> list[PagePlan]:
    start = PagePlan(
        view.num_blocks,
        view.block_stride,
        run_bits // 8,
        leaf_offset=leaf_offset_bits // 8,
        record_offset=record_offset_bits // 8,
        num_rows=view.num_rows,
        row_stride=view.row_stride,
    )
    in_bytes = [Loop(loop.count, loop.leaf_stride // 8, loop.page_stride // 8) for loop in loops]
    return plan_loops(start, in_bytes)
