"""Moves random blocks of caches that a package allocated, against slices of its logical arrays in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxkv import BlockTransfer, HostPool, canonicalize
from jaxkv.testing import assert_same_caches, numpy_copy, random_caches


@dataclass(frozen=True)
class Blocks:
    """Where the blocks of a leaf are: ``find(leaf, block)`` is a view of what a data shard holds.

    ``data_axis`` is the axis that data shards share out.
    """

    find: Callable[[np.ndarray, int], np.ndarray]
    data_axis: int = 0


def paged(axis: int = 0, entries: int = 1) -> Blocks:
    """``entries`` entries of ``axis`` are one block."""

    def find(leaf, block):
        return leaf[(*[slice(None)] * axis, slice(block * entries, (block + 1) * entries))]

    return Blocks(find, axis)


def dense(block_size: int, axis_order: Sequence[int] = (0, 1, 2, 3)) -> Blocks:
    """Blocks of rows of a ``[batch, token, head, dim]`` stored in ``axis_order``, or a ``[batch, token]``."""

    def find(leaf, block):
        logical = leaf.transpose(np.argsort(axis_order)) if leaf.ndim == 4 else leaf
        row, index = divmod(block, logical.shape[1] // block_size)
        return logical[row, index * block_size : (index + 1) * block_size]

    return Blocks(find, list(axis_order).index(0))


def fill(kv_caches, seed=0):
    """Random bits in arrays of the same shapes, dtypes and shardings."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), kv_caches)
    return jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), random_caches(shapes, seed), kv_caches
    )


def check_moves(
    kv_caches, config, hints, where: Mapping[str, Blocks | Sequence[Blocks]], *, num_data_shards=1, fill=fill
):
    """Random blocks of every group go to the host and come back as others; every other byte stays.

    ``kv_caches`` are registered as the package made them. ``where`` has one ``Blocks`` for all leaves of a
    layer, or one for each.
    """
    canonical = canonicalize(kv_caches, config, hints)
    kv_caches = fill(kv_caches)
    expected = numpy_copy(kv_caches)
    rng = np.random.default_rng(1)
    with HostPool(1 << 24) as pool:
        for shard in range(num_data_shards):
            transfer = BlockTransfer(canonical, pool, data_shard=shard)
            for group, spec in enumerate(config.groups):
                count = min(3, spec.num_blocks)
                out, back = (rng.choice(spec.num_blocks, count, replace=False) for _ in range(2))
                with transfer.reserve(group, count) as slots:
                    assert transfer.offload(kv_caches, group, out, slots).wait().error is None
                    kv_caches, ticket = transfer.restore(kv_caches, group, back, slots)
                    assert ticket.wait().error is None
                for layer in spec.layer_names:
                    _move(expected[layer], where[layer], out, back, (shard, num_data_shards))
            assert transfer.num_copied_leaves == 0
    assert_same_caches(kv_caches, expected)


def _move(layer, where, out, back, shard):
    leaves = jax.tree.leaves(layer)
    for leaf, blocks in zip(
        leaves, [where] * len(leaves) if isinstance(where, Blocks) else where, strict=True
    ):
        index, count = shard
        part = np.split(leaf, count, blocks.data_axis)[index]
        pages = [blocks.find(part, block).copy() for block in out]
        for block, page in zip(back, pages, strict=True):
            blocks.find(part, block)[...] = page
