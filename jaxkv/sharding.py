"""Which device holds which part of a cache leaf. Knows shardings and shapes, no layouts and no bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import jax

from jaxkv.errors import CacheMismatchError, ConfigError

Cell = tuple[int, ...]
"""Index of a device's part along every axis of a leaf."""


@final
@dataclass(frozen=True, slots=True)
class LeafShards:
    """A leaf in ``grid[a]`` equal parts along each axis ``a``, or whole on one device where that is all.

    ``cells`` pairs device ids with the part each holds, for those devices whose bytes are wanted; devices
    with equal cells hold the same bytes. A leaf whole on one device has no cells: it may lie on any.
    """

    grid: tuple[int, ...]
    cells: tuple[tuple[int, Cell], ...] = ()

    @property
    def is_spread(self) -> bool:
        """Whether more than one device holds the leaf, in parts or whole."""
        return bool(self.cells)

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what one device holds of a leaf of ``shape``."""
        return tuple(size // parts for size, parts in zip(shape, self.grid, strict=True))

    def merge_copies(self, axis: int, num_copies: int) -> LeafShards:
        """The same with each ``num_copies`` neighbours along ``axis`` taken for holders of one part."""
        cells = tuple(
            (device, (*cell[:axis], cell[axis] // num_copies, *cell[axis + 1 :]))
            for device, cell in self.cells
        )
        grid = (*self.grid[:axis], self.grid[axis] // num_copies, *self.grid[axis + 1 :])
        return replace(self, grid=grid, cells=cells)


def whole_leaf(rank: int) -> LeafShards:
    """A leaf of ``rank`` axes that lies whole on one device."""
    return LeafShards((1,) * rank)


def find_shards(
    sharding: jax.sharding.Sharding, shape: tuple[int, ...], label: str, processes: Collection[int] | None
) -> LeafShards:
    """How ``sharding`` spreads a leaf of ``shape``, as far as devices of ``processes`` hold it.

    ``None`` stands for the calling process. Raises ``CacheMismatchError`` where devices hold parts of
    different sizes, or no parts but summands, or where the calling process holds none; ``ConfigError`` for
    ``processes`` without it.
    """
    here = jax.process_index()
    wanted = {here} if processes is None else set(processes)
    if here not in wanted:
        raise ConfigError(
            f"processes {sorted(wanted)} leave out {here}, the one that asks; name all that share the pool"
        )
    if not sharding.addressable_devices:
        raise CacheMismatchError(
            f"{label} lies on no device of process {here}; register caches in processes that hold them"
        )
    if len(sharding.device_set) == 1:
        return whole_leaf(len(shape))
    try:
        local = sharding.shard_shape(shape)
        index_of: Any = sharding.devices_indices_map(shape)
    except (ValueError, NotImplementedError) as error:
        raise CacheMismatchError(f"{label} is not in equal parts on its devices: {error}") from error
    cells = sorted(
        (device.id, _find_cell(index, local))
        for device, index in index_of.items()
        if device.process_index in wanted
    )
    grid = tuple(size // part if part else 1 for size, part in zip(shape, local, strict=True))
    return LeafShards(grid, tuple(cells))


def _find_cell(index: Sequence[slice], local_shape: tuple[int, ...]) -> Cell:
    return tuple(
        (part.start or 0) // size if size else 0 for part, size in zip(index, local_shape, strict=True)
    )
