"""What a layer of each kind stores in its leaves. Knows specs; leaves strides to ``jaxkv.layout``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never, final

import numpy as np

from jaxkv.errors import CacheMismatchError
from jaxkv.layout import BlockView, CacheLeaf, LayoutHint, find_page, shares_whole_bytes, view_blocks
from jaxkv.sharding import LeafShards
from jaxkv.spec import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    page_size_bytes,
)


@final
@dataclass(frozen=True, slots=True)
class LayerPage:
    """The part of each block of one leaf that is a layer's, as a range of the block's row-major bytes.

    ``page`` counts what one device holds. ``shards`` says which device holds which part of the leaf, with
    copies of one head taken for one part. ``why_per_shard`` says why the parts of several devices cannot be
    put together to a page that does not depend on their number; ``None`` where they can.
    """

    view: BlockView
    page: range
    shards: LeafShards
    why_per_shard: str | None

    @property
    def num_bytes(self) -> int:
        """Bytes of the layer's page over all devices that share a block."""
        return len(self.page) * self.view.num_shards


def find_layer_pages(
    spec: LayerSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hints: Sequence[LayoutHint]
) -> list[LayerPage]:
    """What a layer of kind ``spec`` stores in each of its ``leaves``; ``hints`` has one for each leaf.

    Raises ``CacheMismatchError`` unless dtypes fit and the pages hold exactly the bytes of the spec. A
    uint8 leaf may stand for any dtype, and so may any leaf of an attention layer whose ``page_size_bytes`` is
    given; a recurrent state may lie at the start of a row as wide as ``page_size_padded``.
    """
    if isinstance(spec, MambaSpec) and not (len(leaves) == 1 and leaves[0].is_raw):
        return _state_pages(spec, leaves, num_blocks, hints)
    if not isinstance(spec, MambaSpec):
        _require_dtypes(spec, leaves)
    return _row_pages(spec, leaves, num_blocks, hints)


def _require_dtypes(spec: AttentionSpec, leaves: Sequence[CacheLeaf]) -> None:
    expected = np.dtype(spec.dtype)
    other = [leaf for leaf in leaves if leaf.dtype != expected and not leaf.is_raw]
    for leaf in other:
        if spec.page_size_bytes is None or len(other) == len(leaves):
            raise CacheMismatchError(
                f"{leaf} must be {expected.name} as its spec says, or uint8 for raw bytes; make them agree, "
                "or set the spec's page_size_bytes to all a block stores where scales lie beside the values"
            )


def _row_pages(
    spec: LayerSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hints: Sequence[LayoutHint]
) -> list[LayerPage]:
    expected = page_size_bytes(spec)
    padded = spec.page_size_padded if isinstance(spec, MambaSpec) else None
    pages = []
    for given, hint in zip(leaves, hints, strict=True):
        leaf = _merge_head_copies(given, hint)
        view = view_blocks(leaf, num_blocks, hint)
        if hint.cuts_row:
            size = _cut_size(leaf, hint, expected, len(leaves))
        else:
            size = expected if view.block_bytes == padded else view.block_bytes
        page = range(hint.page_offset_bytes, hint.page_offset_bytes + size)
        find_page(leaf, view, page)  # An error names this layer, not another one of the same leaf.
        pages.append(LayerPage(view, page, leaf.shards, _why_per_shard(spec, leaf, view, page, hint)))
    stored = sum(page.num_bytes for page in pages)
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
    spec: MambaSpec, leaves: Sequence[CacheLeaf], num_blocks: int, hints: Sequence[LayoutHint]
) -> list[LayerPage]:
    if len(leaves) != len(spec.shapes):
        raise CacheMismatchError(
            f"{' and '.join(map(str, leaves))} should be the {len(spec.shapes)} states of a MambaSpec; "
            "give one leaf for each state in that order, or one uint8 row for all"
        )
    pages = []
    for given, hint, shape, dtype in zip(leaves, hints, spec.shapes, spec.dtypes, strict=True):
        if hint.cuts_row or hint.kernel_blocks_per_block > 1:
            raise CacheMismatchError(
                f"{given} holds a state of its own shape, which {hint} cannot cut; use a uint8 row for that"
            )
        leaf = _merge_head_copies(given, hint)
        view = view_blocks(leaf, num_blocks, _state_hint(leaf, num_blocks, shape, hint))
        if view.page_shape != shape or leaf.dtype != np.dtype(dtype):
            raise CacheMismatchError(
                f"{leaf} holds states {leaf.dtype.name}{list(view.page_shape)}, but its MambaSpec says "
                f"{np.dtype(dtype).name}{list(shape)}; make them agree, in the order of MambaSpec.shapes"
            )
        page = range(view.block_bytes)
        pages.append(LayerPage(view, page, leaf.shards, _why_per_shard(spec, leaf, view, page, hint)))
    return pages


def _state_hint(leaf: CacheLeaf, num_blocks: int, shape: tuple[int, ...], hint: LayoutHint) -> LayoutHint:
    """``hint``, with the block axis named where only one leaves the shape of a state."""
    if hint.block_axis != "auto":
        return hint
    fitting = [
        axis
        for axis, size in enumerate(leaf.local_shape)
        if size == num_blocks and leaf.shape[:axis] + leaf.shape[axis + 1 :] == shape
    ]
    return replace(hint, block_axis=fitting[0]) if len(fitting) == 1 else hint


def _merge_head_copies(leaf: CacheLeaf, hint: LayoutHint) -> CacheLeaf:
    """``leaf`` with its copies of one head taken for one: fewer heads, and devices that hold the same."""
    axis, copies = hint.head_axis, hint.head_copies
    if axis is not None and axis >= len(leaf.shape):
        raise CacheMismatchError(
            f"{leaf} has rank {len(leaf.shape)}, but its LayoutHint names head axis {axis}"
        )
    if axis is None or copies == 1:
        return leaf
    if leaf.local_shape[axis] != 1 or leaf.shape[axis] % copies:
        raise CacheMismatchError(
            f"{leaf}: each device holds {leaf.local_shape[axis]} of the {leaf.shape[axis]} heads on axis "
            f"{axis}, so head_copies={copies} are not one to a device; give each head a device of its own"
        )
    shape = (*leaf.shape[:axis], leaf.shape[axis] // copies, *leaf.shape[axis + 1 :])
    return replace(leaf, shape=shape, shards=leaf.shards.merge_copies(axis, copies))


def _why_per_shard(
    spec: LayerSpec, leaf: CacheLeaf, view: BlockView, page: range, hint: LayoutHint
) -> str | None:
    """Why the page of ``leaf`` depends on how many devices share it, or ``None`` where it does not."""
    split = [axis for axis, parts in enumerate(leaf.shards.grid) if parts > 1 and axis not in view.block_axes]
    if not split:
        return None
    if page != range(view.block_bytes):
        return f"{leaf}: each device cuts its page out of its own part of a wider row"
    heads = [hint.head_axis]
    if hint.head_axis is None:
        heads = [axis for axis in split if leaf.shape[axis] == _num_kv_heads(spec)]
    if split != heads:
        return (
            f"{leaf}: axis {', '.join(map(str, split))} is split over devices and not known to list heads in "
            "order; if a slice of it means the same for any number of devices, say LayoutHint(head_axis=...)"
        )
    if not shares_whole_bytes(view):
        return f"{leaf}: the parts of two devices share a byte"
    return None


def _num_kv_heads(spec: LayerSpec) -> int | None:
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            return spec.num_kv_heads
        case MLAAttentionSpec() | MambaSpec():
            return None
        case _:
            assert_never(spec)
