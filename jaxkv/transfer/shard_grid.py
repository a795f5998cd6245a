"""How a mesh cuts the leaves of a group, and ids, records and status with them. Decides; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, final

from jax.sharding import NamedSharding, PartitionSpec

from jaxkv.errors import CacheMismatchError
from jaxkv.records import GroupPages

_DATA = "data"
_spec: Any = PartitionSpec  # jax does not annotate its constructor

MeshAxes = tuple[str, ...]
"""Names of mesh axes, outermost first."""


@final
@dataclass(frozen=True, slots=True)
class CutArray:
    """An array by name, its shape and dtype, and the names of the cuts through each axis, outermost first."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    cuts: tuple[tuple[str, ...], ...]

    def spec(self, made_by: Mapping[str, MeshAxes]) -> PartitionSpec:
        """How the array lies on a mesh whose axes ``made_by`` make the cuts."""
        axes_of = [sum((made_by[cut] for cut in cuts), ()) for cuts in self.cuts]
        spec: PartitionSpec = _spec(*(axes or None for axes in axes_of))
        return spec


@final
@dataclass(frozen=True, slots=True)
class ShardGrid:
    """The cuts through the leaves of a group: by name, into how many ``parts`` each; and the leaves.

    At most one cut goes between blocks and makes data shards. The others go through blocks and make tensor
    shards, numbered row-major in the order of the axes they cut. A leaf without these is held whole by every
    tensor shard.
    """

    parts: Mapping[str, int]
    leaves: tuple[CutArray, ...]

    @property
    def num_data_shards(self) -> int:
        """Parts with blocks and ids of their own."""
        return self.parts.get(_DATA, 1)

    @property
    def num_tensor_shards(self) -> int:
        """Parts of each block."""
        return math.prod(self.parts.values()) // self.num_data_shards

    def by_data(self, name: str, shape: tuple[int, ...], dtype: Any) -> CutArray:
        """A vector: entries of one data shard after those of another."""
        return CutArray(name, shape, dtype, (self._data_cuts,))

    def by_shard(self, name: str, shape: tuple[int, ...], dtype: Any) -> CutArray:
        """A matrix: rows of one data shard after those of another, columns of the tensor shards likewise."""
        tensor_cuts = tuple(cut for cut in self.parts if cut != _DATA)
        return CutArray(name, shape, dtype, (self._data_cuts, tensor_cuts))

    def local_shape(self, array: CutArray) -> tuple[int, ...]:
        """The shape of what one device holds of ``array``."""
        return tuple(
            size // math.prod(self.parts[cut] for cut in cuts)
            for size, cuts in zip(array.shape, array.cuts, strict=True)
        )

    @property
    def _data_cuts(self) -> tuple[str, ...]:
        return (_DATA,) if _DATA in self.parts else ()


@final
@dataclass(frozen=True, slots=True)
class OpCuts:
    """How operands and results of an op are cut. The last operands are the leaves of ``grid``."""

    grid: ShardGrid
    operands: tuple[CutArray, ...]
    results: tuple[CutArray, ...]


def find_grid(leaves: Sequence[Any], pages: GroupPages) -> ShardGrid:
    """How ``leaves`` are cut, by their shapes alone, into what ``pages`` says one device holds.

    Raises ``CacheMismatchError`` where they are no multiples of that, or not cut alike.
    """
    shapes = [tuple(leaf.shape) for leaf in leaves]
    splits = [_split(i, shape, pages) for i, shape in enumerate(shapes)]
    between = {of_leaf[axes[0]] for of_leaf, axes in zip(splits, pages.block_axes, strict=True)}
    through = {
        tuple(parts for axis, parts in enumerate(of_leaf) if parts > 1 and axis not in axes)
        for of_leaf, axes in zip(splits, pages.block_axes, strict=True)
    } - {()}
    if len(between) > 1 or len(through) > 1:
        raise CacheMismatchError(
            f"leaves of shapes {shapes} are cut in different ways into the {list(pages.leaf_shapes)} that "
            "one device holds; shard all leaves of a group alike, or call the op under shard_map"
        )
    parts = {_DATA: between.pop()} | {f"tensor{i}": n for i, n in enumerate(next(iter(through), ()))}
    return ShardGrid(
        parts={cut: n for cut, n in parts.items() if n > 1},
        leaves=tuple(
            CutArray(f"leaf{i}", shapes[i], leaf.dtype, _name_cuts(splits[i], pages.block_axes[i]))
            for i, leaf in enumerate(leaves)
        ),
    )


def _split(index: int, shape: tuple[int, ...], pages: GroupPages) -> tuple[int, ...]:
    """Into how many parts each axis of a leaf is cut."""
    local, block_axes = pages.leaf_shapes[index], pages.block_axes[index]
    if len(shape) != len(local) or any(
        not size or size % part for size, part in zip(shape, local, strict=True)
    ):
        raise CacheMismatchError(
            f"leaf {index} has shape {shape}, no multiple of the {local} that one device held when the "
            "caches were registered; pass those caches, or register these"
        )
    splits = tuple(size // part for size, part in zip(shape, local, strict=True))
    if any(splits[axis] > 1 for axis in block_axes[1:]):
        raise CacheMismatchError(
            f"leaf {index} of shape {shape} is cut along axis {block_axes[-1]}, on which the blocks of a row "
            f"stand; cut axis {block_axes[0]} instead"
        )
    return splits


def _name_cuts(splits: tuple[int, ...], block_axes: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    number = count()
    return tuple(
        () if n == 1 else (_DATA,) if axis in block_axes else (f"tensor{next(number)}",)
        for axis, n in enumerate(splits)
    )


def find_specs(cuts: OpCuts, leaf_shardings: Sequence[Any]) -> dict[str, PartitionSpec]:
    """How all arrays of an op lie, by name, where its leaves lie as ``leaf_shardings`` say.

    Raises ``CacheMismatchError`` unless every leaf is cut exactly as the grid says, and each cut is made by
    the same mesh axes in all leaves.
    """
    made_by: dict[str, MeshAxes] = {}
    leaves = list(zip(cuts.grid.leaves, leaf_shardings, strict=True))
    for leaf, sharding in leaves:
        local = cuts.grid.local_shape(leaf)
        if not isinstance(sharding, NamedSharding) or sharding.shard_shape(leaf.shape) != local:
            raise CacheMismatchError(
                f"{leaf.name} {leaf.shape} lies as {sharding}, but a device held {local} of it when the "
                "caches were registered; constrain its sharding to what it was then"
            )
        for names, axes in zip(leaf.cuts, _axes_by_dimension(sharding, len(leaf.shape)), strict=True):
            if any(made_by.setdefault(name, axes) != axes for name in names):
                raise CacheMismatchError(
                    f"{leaf.name} {leaf.shape} lies as {sharding}, but other mesh axes cut a leaf before it; "
                    "shard all leaves of a group over the same axes, or call the op under shard_map"
                )
    specs = {array.name: array.spec(made_by) for array in (*cuts.operands, *cuts.results)}
    return specs | {leaf.name: sharding.spec for leaf, sharding in leaves}


def _axes_by_dimension(sharding: NamedSharding, rank: int) -> list[MeshAxes]:
    """The mesh axes that cut each axis of an array. Those of size 1 cut nothing."""
    entries = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    named = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in entries]
    return [tuple(axis for axis in axes if sharding.mesh.shape[axis] > 1) for axes in named]


def sharding_rule(cuts: OpCuts) -> tuple[str, dict[str, int]]:
    """The same for Shardy: its rule, in which arrays share cuts, and the sizes of the factors in it.

    Leaves decide and results follow. Ids and records that are operands share nothing, or a leaf that is
    written could come out cut as they happen to be.
    """
    num_others = len(cuts.operands) - len(cuts.grid.leaves)
    others = [replace(array, cuts=((),) * len(array.shape)) for array in cuts.operands[:num_others]]
    operands = [_factors(array, cuts.grid) for array in (*others, *cuts.grid.leaves)]
    results = [_factors(array, cuts.grid) for array in cuts.results]
    axes = [axis for array in (*operands, *results) for axis in array]
    # Shardy knows the size of a factor that is all of some axis, and wants to be told the others.
    known = {name for axis in axes if len(axis) == 1 for name in axis}
    sizes = {name: size for axis in axes for name, size in axis.items() if name not in known}
    return f"{_in_einsum_notation(operands)} -> {_in_einsum_notation(results)}", sizes


def _factors(array: CutArray, grid: ShardGrid) -> list[dict[str, int]]:
    """The factors of each axis with their sizes: its cuts, then what one device holds."""
    factors = []
    for axis, (cuts, local) in enumerate(zip(array.cuts, grid.local_shape(array), strict=True)):
        of_axis = {cut: grid.parts[cut] for cut in cuts}
        if local != 1 or not cuts:
            of_axis[f"{array.name}_{axis}"] = local
        factors.append(of_axis)
    return factors


def _in_einsum_notation(arrays: Sequence[Sequence[Mapping[str, int]]]) -> str:
    return ", ".join(
        " ".join(f"({' '.join(axis)})" if len(axis) > 1 else " ".join(axis) for axis in array)
        for array in arrays
    )
