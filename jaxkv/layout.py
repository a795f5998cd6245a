"""Where the bytes of one block lie inside one cache leaf. Knows shapes and strides; copies nothing.

A page is the bytes of one block in one leaf, in row-major order of the leaf with the block axis taken out.
It is read and written as a two-level strided copy: ``outer_count`` times ``inner_count`` runs of
``run_bytes`` each, with strides of their own on the leaf's side and on the page's side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, final

import numpy as np

from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.spec import FullAttentionSpec, LayerSpec, MambaSpec, SlidingWindowSpec, dtype_bits, page_size_bytes


@final
@dataclass(frozen=True, slots=True)
class LayoutHint:
    """What the shape of a layer's leaves cannot say; holds for every leaf of the layer.

    ``block_axis`` is the axis that counts blocks, ``"auto"`` where just one axis has that size.
    ``kernel_blocks_per_block`` consecutive entries of that axis make one block. ``page_offset_bytes`` and
    ``page_size_bytes`` cut the layer's page out of a wider row, counted in the row-major bytes of one block;
    ``None`` stands for what the spec says. Raises ``ConfigError`` on a value that cannot work.
    """

    block_axis: int | Literal["auto"] = "auto"
    kernel_blocks_per_block: int = 1
    page_offset_bytes: int = 0
    page_size_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.block_axis != "auto" and (not isinstance(self.block_axis, int) or self.block_axis < 0):
            raise ConfigError(f"LayoutHint.block_axis must be 'auto' or 0, 1, ..., got {self.block_axis!r}")
        if self.kernel_blocks_per_block < 1:
            raise ConfigError(
                f"LayoutHint.kernel_blocks_per_block must be at least 1, got {self.kernel_blocks_per_block}"
            )
        if self.page_offset_bytes < 0:
            raise ConfigError(
                f"LayoutHint.page_offset_bytes must not be negative, got {self.page_offset_bytes}"
            )
        if self.page_size_bytes is not None and self.page_size_bytes < 1:
            raise ConfigError(f"LayoutHint.page_size_bytes must be at least 1, got {self.page_size_bytes}")

    @property
    def cuts_row(self) -> bool:
        """Whether the layer takes a part of each block's bytes."""
        return self.page_offset_bytes > 0 or self.page_size_bytes is not None


@final
@dataclass(frozen=True, slots=True)
class CacheLeaf:
    """What layout derivation knows of one array: a name for messages, its shape and its dtype."""

    label: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.label} ({self.dtype.name}{list(self.shape)})"

    @property
    def is_raw(self) -> bool:
        """Whether the leaf holds plain bytes, which may stand for any dtype."""
        return self.dtype == np.uint8


@final
@dataclass(frozen=True, slots=True)
class PagePlan:
    """The copy of one page between a leaf and its place in a block record. All fields are bytes or counts.

    Run ``(o, i)`` of block ``b`` starts at leaf byte
    ``leaf_offset + b * block_stride + o * outer_leaf_stride + i * inner_leaf_stride`` and at record byte
    ``record_offset + o * outer_page_stride + i * inner_page_stride``.
    """

    num_blocks: int
    block_stride: int
    run_bytes: int
    leaf_offset: int = 0
    record_offset: int = 0
    outer_count: int = 1
    outer_leaf_stride: int = 0
    outer_page_stride: int = 0
    inner_count: int = 1
    inner_leaf_stride: int = 0
    inner_page_stride: int = 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.outer_count * self.inner_count * self.run_bytes

    def runs(self, block: int) -> Iterator[tuple[int, int]]:
        """Leaf byte and record byte at which each run of ``block`` starts, in page order."""
        start = self.leaf_offset + block * self.block_stride
        for o in range(self.outer_count):
            for i in range(self.inner_count):
                yield (
                    start + o * self.outer_leaf_stride + i * self.inner_leaf_stride,
                    self.record_offset + o * self.outer_page_stride + i * self.inner_page_stride,
                )


@final
@dataclass(frozen=True, slots=True)
class BlockView:
    """A leaf seen as ``num_blocks`` blocks, each ``num_runs`` runs of ``run_bytes`` contiguous bytes.

    ``page_shape`` is the leaf's shape for one block. Run ``n`` of block ``b`` starts at leaf byte
    ``(n * num_blocks + b) * run_bytes``, so two layers with equal views of one leaf overlap exactly where
    their byte ranges of the block do.
    """

    page_shape: tuple[int, ...]
    num_blocks: int
    num_runs: int
    run_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in this leaf, those of other layers and padding included."""
        return self.num_runs * self.run_bytes


def view_blocks(leaf: CacheLeaf, num_blocks: int, hint: LayoutHint) -> BlockView:
    """Find the block axis of ``leaf`` and split its bytes into blocks.

    Raises ``CacheMismatchError`` if no axis, or more than one, can be the block axis, or if a run is
    not a whole number of bytes.
    """
    per_block = hint.kernel_blocks_per_block
    axis = _block_axis(leaf, num_blocks * per_block, hint)
    run_bits = per_block * math.prod(leaf.shape[axis + 1 :]) * dtype_bits(leaf.dtype)
    if run_bits == 0 or math.prod(leaf.shape[:axis]) == 0:
        raise CacheMismatchError(f"{leaf} holds no bytes; leave layers without a cache out of the config")
    if run_bits % 8:
        raise CacheMismatchError(
            f"{leaf} stores a block in runs of {run_bits} bits, which are not whole bytes; "
            "pad the last axis to an even number of elements or move the block axis to the front"
        )
    kernel_axis = (per_block,) if per_block > 1 else ()
    return BlockView(
        page_shape=leaf.shape[:axis] + kernel_axis + leaf.shape[axis + 1 :],
        num_blocks=num_blocks,
        num_runs=math.prod(leaf.shape[:axis]),
        run_bytes=run_bits // 8,
    )


def _block_axis(leaf: CacheLeaf, axis_size: int, hint: LayoutHint) -> int:
    if hint.block_axis == "auto":
        candidates = [axis for axis, size in enumerate(leaf.shape) if size == axis_size]
        if len(candidates) == 1:
            return candidates[0]
        found = f"axes {candidates} all have" if candidates else "no axis has"
        raise CacheMismatchError(
            f"{leaf}: {found} the size {axis_size} of the block axis; "
            "check num_blocks of the group, or name the axis with LayoutHint(block_axis=...)"
        )
    if hint.block_axis >= len(leaf.shape):
        raise CacheMismatchError(
            f"{leaf} has rank {len(leaf.shape)}, but its LayoutHint names block axis {hint.block_axis}"
        )
    if leaf.shape[hint.block_axis] != axis_size:
        raise CacheMismatchError(
            f"{leaf}: block axis {hint.block_axis} has size {leaf.shape[hint.block_axis]}, expected "
            f"{axis_size} (num_blocks times kernel_blocks_per_block={hint.kernel_blocks_per_block}); "
            "make the array and the group agree"
        )
    return hint.block_axis


def plan_page(leaf: CacheLeaf, view: BlockView, page: range, record_offset: int) -> PagePlan:
    """The copy of bytes ``page`` of every block of ``leaf`` to ``record_offset`` in the block record.

    ``page`` is a range of the block's row-major bytes and must lie inside one run or cover whole runs;
    otherwise raises ``CacheMismatchError``. Runs that touch each other become one.
    """
    if not page or page.stop > view.block_bytes:
        raise CacheMismatchError(
            f"{leaf}: bytes {page.start} to {page.stop} were asked for, but a block has {view.block_bytes}; "
            "check page_offset_bytes and page_size_bytes of its LayoutHint"
        )
    run_stride = view.num_blocks * view.run_bytes
    first_run, offset_in_run = divmod(page.start, view.run_bytes)
    num_runs = len(page) // view.run_bytes
    inside_one_run = offset_in_run + len(page) <= view.run_bytes
    if not inside_one_run and (offset_in_run or len(page) % view.run_bytes) and view.num_blocks > 1:
        raise CacheMismatchError(
            f"{leaf}: bytes {page.start} to {page.stop} of a block cut its runs of {view.run_bytes} bytes; "
            "choose an offset and a size that are multiples of the run, or put the block axis first"
        )
    contiguous = inside_one_run or view.num_blocks == 1
    return PagePlan(
        num_blocks=view.num_blocks,
        block_stride=view.run_bytes,
        run_bytes=len(page) if contiguous else view.run_bytes,
        leaf_offset=first_run * run_stride + offset_in_run,
        record_offset=record_offset,
        inner_count=1 if contiguous else num_runs,
        inner_leaf_stride=0 if contiguous else run_stride,
        inner_page_stride=0 if contiguous else view.run_bytes,
    )


@final
@dataclass(frozen=True, slots=True)
class LayerPage:
    """The part of each block of one leaf that is a layer's, as a range of the block's row-major bytes."""

    view: BlockView
    page: range


def find_layer_pages(
    spec: LayerSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hint: LayoutHint
) -> list[LayerPage]:
    """What a layer of kind ``spec`` stores in each of its ``leaves``.

    Raises ``CacheMismatchError`` unless dtypes fit and the pages hold exactly the bytes of the spec. A
    uint8 leaf may stand for any dtype; a recurrent state may lie at the start of a row as wide as
    ``page_size_padded``.
    """
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec():
            for leaf in leaves:
                _require_dtype(leaf, np.dtype(spec.dtype))
            return _row_pages(spec, leaves, num_blocks, hint)
        case MambaSpec():
            if len(leaves) == 1 and leaves[0].is_raw:
                return _row_pages(spec, leaves, num_blocks, hint)
            return _state_pages(spec, leaves, num_blocks, hint)
        case _:
            assert_never(spec)


def _require_dtype(leaf: CacheLeaf, expected: np.dtype[np.generic]) -> None:
    if leaf.dtype != expected and not leaf.is_raw:
        raise CacheMismatchError(
            f"{leaf} must be {expected.name} as its spec says, or uint8 for raw bytes; make them agree"
        )


def _row_pages(
    spec: LayerSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hint: LayoutHint
) -> list[LayerPage]:
    expected = page_size_bytes(spec)
    padded = spec.page_size_padded if isinstance(spec, MambaSpec) else None
    pages = []
    for leaf in leaves:
        view = view_blocks(leaf, num_blocks, hint)
        if hint.cuts_row:
            size = _cut_size(leaf, hint, expected, len(leaves))
        else:
            size = expected if view.block_bytes == padded else view.block_bytes
        pages.append(LayerPage(view, range(hint.page_offset_bytes, hint.page_offset_bytes + size)))
    stored = sum(len(page.page) for page in pages)
    if stored != expected:
        raise CacheMismatchError(
            f"{' and '.join(map(str, leaves))}: {stored} bytes a block, but {type(spec).__name__} says "
            f"{expected}; correct the shape, set the spec's page_size_bytes (or page_size_padded) if more is "
            "stored, or cut the row with LayoutHint(page_offset_bytes=..., page_size_bytes=...)"
        )
    return pages


def _cut_size(leaf: CacheLeaf, hint: LayoutHint, expected: int, num_leaves: int) -> int:
    if hint.page_size_bytes is not None:
        return hint.page_size_bytes
    if num_leaves > 1:
        raise CacheMismatchError(
            f"{leaf} is one of {num_leaves} leaves of a layer at page_offset_bytes={hint.page_offset_bytes}; "
            "say with LayoutHint(page_size_bytes=...) how much of each block is the layer's"
        )
    return expected


def _state_pages(
    spec: MambaSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hint: LayoutHint
) -> list[LayerPage]:
    if len(leaves) != len(spec.shapes):
        raise CacheMismatchError(
            f"{' and '.join(map(str, leaves))} should be the {len(spec.shapes)} states of a MambaSpec; "
            "give one leaf for each state in that order, or one uint8 row for all"
        )
    if hint.cuts_row or hint.kernel_blocks_per_block > 1:
        raise CacheMismatchError(
            f"{leaves[0]} holds a state of its own shape, which {hint} cannot cut; use a uint8 row for that"
        )
    pages = []
    for leaf, shape, dtype in zip(leaves, spec.shapes, spec.dtypes, strict=True):
        view = view_blocks(leaf, num_blocks, _state_hint(leaf, num_blocks, shape, hint))
        if view.page_shape != shape or leaf.dtype != np.dtype(dtype):
            raise CacheMismatchError(
                f"{leaf} holds states {leaf.dtype.name}{list(view.page_shape)}, but its MambaSpec says "
                f"{np.dtype(dtype).name}{list(shape)}; make them agree, in the order of MambaSpec.shapes"
            )
        pages.append(LayerPage(view, range(view.block_bytes)))
    return pages


def _state_hint(leaf: CacheLeaf, num_blocks: int, shape: tuple[int, ...], hint: LayoutHint) -> LayoutHint:
    """``hint``, with the block axis named where only one leaves the shape of a state."""
    if hint.block_axis != "auto":
        return hint
    fitting = [
        axis
        for axis, size in enumerate(leaf.shape)
        if size == num_blocks and leaf.shape[:axis] + leaf.shape[axis + 1 :] == shape
    ]
    return LayoutHint(block_axis=fitting[0]) if len(fitting) == 1 else hint
