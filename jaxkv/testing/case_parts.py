"""What the rows of the layout table are made of: sizes, leaves and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import jax
from jax.typing import DTypeLike

from jaxkv.layout import LayoutHint
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, LayerSpec, dtype_bits
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

Tree = Any
"""A pytree of ``CaseLeaf``."""


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that cases share; ``tokens`` and ``heads`` are those of a block and of the whole model.

    Odd and all different by default, so that no axis passes for another and few runs are aligned.
    """

    num_blocks: int = 11
    tokens: int = 4
    heads: int = 3
    head_size: int = 5


@final
@dataclass(frozen=True, slots=True)
class CaseLeaf:
    """One array of a case, and what one layer takes of each block of it."""

    struct: jax.ShapeDtypeStruct
    page: PageSlice
    hint: LayoutHint | None


@final
@dataclass(frozen=True, slots=True)
class CaseGroup:
    """A group of a case: ``layers`` maps each layer's name to its tree of leaves."""

    spec: LayerSpec
    num_blocks: int
    layers: Mapping[str, Tree]


def leaf(
    shape: tuple[int, ...], dtype: DTypeLike, page: PageSlice | None = None, hint: LayoutHint | None = None
) -> CaseLeaf:
    """A new array. By default axis 0 counts its blocks, and all of each block is the layer's."""
    struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor
    return CaseLeaf(struct(shape, dtype), page or PageSlice(0), hint)


def split_leaf(
    shape: tuple[int, ...], dtype: DTypeLike, block_axis: int, split_axis: int, *, says_heads: bool = False
) -> CaseLeaf:
    """A new array with blocks along one axis and heads, split over devices, along another.

    ``says_heads`` names that axis in a hint: where it has another size than the spec's ``num_kv_heads``.
    """
    hint = LayoutHint(block_axis, head_axis=split_axis) if says_heads else None
    return leaf(shape, dtype, PageSlice(block_axis, split_axis=split_axis), hint)


def own_leaves(tree: Tree, *layers: str) -> dict[str, Tree]:
    """Each of ``layers`` with arrays of its own like those of ``tree``."""

    def copy(made: CaseLeaf) -> CaseLeaf:
        return leaf(made.struct.shape, made.struct.dtype, made.page, made.hint)

    return {layer: jax.tree_util.tree_map(copy, tree, is_leaf=_is_leaf) for layer in layers}


def stored_bytes(tree: Tree, num_blocks: int) -> int:
    """Bytes of one block of a layer that has all of its leaves to itself."""
    bits: list[int] = [math.prod(made.struct.shape) * dtype_bits(made.struct.dtype) for made in _leaves(tree)]
    return sum(bits) // 8 // num_blocks


def make_case(name: str, *groups: CaseGroup) -> LayoutCase:
    """The case of these groups."""
    trees = {layer: tree for group in groups for layer, tree in group.layers.items()}
    leaves = {layer: _leaves(tree) for layer, tree in trees.items()}
    return LayoutCase(
        name=name,
        config=KVCacheConfig(
            tuple(KVCacheGroupSpec(tuple(group.layers), group.spec, group.num_blocks) for group in groups)
        ),
        shapes={
            layer: jax.tree_util.tree_map(lambda made: made.struct, tree, is_leaf=_is_leaf)
            for layer, tree in trees.items()
        },
        pages={layer: tuple(made.page for made in found) for layer, found in leaves.items()},
        hints={layer: _hints(found) for layer, found in leaves.items() if any(made.hint for made in found)},
    )


def _hints(leaves: list[CaseLeaf]) -> LayoutHint | list[LayoutHint]:
    hints = [made.hint or LayoutHint() for made in leaves]
    return hints[0] if len(set(hints)) == 1 else hints


def _leaves(tree: Tree) -> list[CaseLeaf]:
    return jax.tree_util.tree_leaves(tree, is_leaf=_is_leaf)


def _is_leaf(node: Any) -> bool:
    return isinstance(node, CaseLeaf)
