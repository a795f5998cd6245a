"""The four ops as functions of arrays, for use inside a caller's own ``jit``, ``scan`` and the like.

They run on the CPU and on CUDA devices.

Page ops, ``gather_pages`` and ``scatter_pages``, are pure. Pool ops, ``offload`` and ``restore``, read and
write a host pool that XLA does not see. Nothing but data dependence orders them and keeps them from being
dropped, merged or moved out of a loop. So each takes a token and returns one: pass it on, and return the last
one from the jitted function. ``offload`` also returns its leaves; go on with those.

A ``BlockTransfer`` knows nothing of tokens: before one uses slots that a program wrote, or a program those of
a transfer, wait for the last token, or for the ticket. What was prefetched stays what it was, whatever a
program writes to its slots.

None of them fails for what ids or addresses say: entries that are wrong are skipped and counted in the
status. They move bytes, so ``grad`` and ``vmap`` do not apply to them: JAX refuses both when it traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from jaxkv.errors import BlockIdError, CacheMismatchError
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer.partitioned_ops import run_on_shards
from jaxkv.transfer.shard_grid import OpCuts, ShardGrid, find_grid
from jaxkv.transfer.status import STATUS_SIZE
from jaxkv.transfer.targets import (
    GATHER_PAGES,
    OFFLOAD,
    READ_BLOCKS,
    RESTORE,
    SCATTER_PAGES,
    WRITE_BLOCKS,
    prepare_pool,
    register_targets,
)

_struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor
_STATUS = _struct((STATUS_SIZE,), jnp.int32)


def gather_pages(leaves: Sequence[jax.Array], block_ids: ArrayLike, pages: GroupPages) -> jax.Array:
    """The records of ``block_ids`` (int32, ``(n,)``) as ``(n, pages.record_bytes)`` uint8.

    ``leaves`` are those of the group, in the order of ``pages.leaves``. Records of ids that are -1 or outside
    the group are zero, and so are the bytes between ``pages.block_bytes`` and ``pages.record_bytes``.

    A program that also writes donated leaves should gather after it has; or it goes on with the leaves that
    ``jax.lax.optimization_barrier((records, leaves))`` returns, on the CPU from jax 0.11.2 on. Where nothing
    puts the gather before the writes, XLA copies the leaves.

    Leaves sharded over a mesh, in D data shards along blocks and T tensor shards through them, take ids
    ``(D * n,)``, those of one data shard after those of another, and give records
    ``(D * n, T * pages.record_bytes)``, those of one tensor shard beside those of another. The records stay
    where the blocks are, and no leaf is copied.
    """
    _require_leaves(leaves, pages)
    staging: jax.Array = _gather(_as_ids(block_ids, "block_ids"), *leaves, pages=pages)
    return staging


def scatter_pages(
    staging: jax.Array, block_ids: ArrayLike, leaves: Sequence[jax.Array], pages: GroupPages
) -> tuple[list[jax.Array], jax.Array]:
    """Write records ``(n, pages.record_bytes)`` uint8 to ``block_ids``; returns ``(leaves, status)``.

    Donate the leaves to have them written in place. Ids that are -1 are skipped; of a repeated id the first
    counts.

    Leaves sharded over a mesh take ids and records as ``gather_pages`` does, best where that left them. Every
    copy of a replicated leaf is written, each from the records on its own device. The status is
    ``(D * STATUS_SIZE,)``, that of one data shard after that of another; its times are those of one device.
    """
    _require_leaves(leaves, pages)
    status, *written = _scatter(staging, _as_ids(block_ids, "block_ids"), *leaves, pages=pages)
    return written, status


def offload(
    pool: AnyPool,
    token: ArrayLike,
    leaves: Sequence[jax.Array],
    block_ids: ArrayLike,
    addresses: ArrayLike,
    pages: GroupPages,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Copy block ``block_ids[j]`` to the pool at ``addresses[j]``; returns ``(token, status, leaves)``.

    ``addresses`` (int32, ``(n,)``) count units of 512 bytes, as ``pool.address`` does; a record takes
    ``pages.record_bytes``. The first token is ``pool.token()``. The pool is a constant of the trace.
    """
    _require_one_device(leaves, pages)
    operands = (_as_ids(block_ids, "block_ids"), _as_ids(addresses, "addresses"), _as_token(token))
    token_out, status, *written = _pool_call(OFFLOAD, pool, operands, leaves, pages)
    return token_out, status, written


def restore(
    pool: AnyPool,
    token: ArrayLike,
    leaves: Sequence[jax.Array],
    block_ids: ArrayLike,
    addresses: ArrayLike,
    pages: GroupPages,
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Copy records of the pool at ``addresses[j]`` to ``block_ids[j]``; returns ``(token, status, leaves)``.

    Arguments as for ``offload``. Donate the leaves to have them written in place. Of a repeated id the
    first counts.
    """
    _require_one_device(leaves, pages)
    operands = (_as_ids(block_ids, "block_ids"), _as_ids(addresses, "addresses"), _as_token(token))
    room = _room_for_repeats(operands[0])
    token_out, status, _, *written = _pool_call(RESTORE, pool, operands, leaves, pages, room)
    return token_out, status, written


def read_blocks(
    pool: AnyPool, numbers: jax.Array, leaves: Sequence[jax.Array], pages: GroupPages
) -> jax.Array:
    """``offload`` as a plain read: returns the status alone, which must be used for it to happen.

    Leaves that are neither donated nor returned are not copied either, so this is the form for a program that
    does nothing else. ``numbers`` are those of ``Entries``.
    """
    _require_one_device(leaves, pages)
    (status,) = _call(READ_BLOCKS, (_STATUS,), (numbers, *leaves), pages, pool_id=np.int64(pool.pool_id))
    return status


def write_blocks(
    pool: AnyPool, numbers: jax.Array, leaves: Sequence[jax.Array], pages: GroupPages
) -> tuple[jax.Array, list[jax.Array]]:
    """``restore`` as ``read_blocks`` is ``offload``; returns ``(status, leaves)``."""
    _require_one_device(leaves, pages)
    aliases = {1 + i: 1 + i for i in range(len(leaves))}
    results = (_STATUS, *_shapes(leaves))
    operands = (numbers, *leaves)
    status, *written = _call(WRITE_BLOCKS, results, operands, pages, aliases, pool_id=np.int64(pool.pool_id))
    return status, written


@partial(jax.jit, static_argnames="pages", inline=True)
def _gather(ids: jax.Array, *leaves: jax.Array, pages: GroupPages) -> jax.Array:
    def gather(*operands: jax.Array) -> tuple[jax.Array, ...]:
        records = _struct((len(operands[0]), pages.record_bytes), jnp.uint8)
        return _call(GATHER_PAGES, (records, _STATUS), operands, pages)[:1]

    grid = find_grid(leaves, pages)
    _require_ids_for_each_shard(ids, grid)
    records = (len(ids), grid.num_tensor_shards * pages.record_bytes)
    cuts = OpCuts(
        grid,
        operands=(grid.by_data("ids", ids.shape, ids.dtype), *grid.leaves),
        results=(grid.by_shard("records", records, jnp.uint8),),
    )
    (staging,) = run_on_shards(gather, cuts, (ids, *leaves))
    return staging


@partial(jax.jit, static_argnames="pages", inline=True)
def _scatter(
    staging: jax.Array, ids: jax.Array, *leaves: jax.Array, pages: GroupPages
) -> tuple[jax.Array, ...]:
    def scatter(*operands: jax.Array) -> tuple[jax.Array, ...]:
        aliases = {i: i for i in range(2, len(operands))}
        results = (_STATUS, _room_for_repeats(operands[1]), *_shapes(operands[2:]))
        status, _, *written = _call(SCATTER_PAGES, results, operands, pages, aliases)
        return status, *written

    grid = find_grid(leaves, pages)
    _require_ids_for_each_shard(ids, grid)
    _require_records_for_each_shard(staging, ids, grid, pages)
    cuts = OpCuts(
        grid,
        operands=(
            grid.by_shard("records", staging.shape, staging.dtype),
            grid.by_data("ids", ids.shape, ids.dtype),
            *grid.leaves,
        ),
        results=(grid.by_data("status", (grid.num_data_shards * STATUS_SIZE,), jnp.int32), *grid.leaves),
    )
    return run_on_shards(scatter, cuts, (staging, ids, *leaves))


def _pool_call(
    target: str,
    pool: AnyPool,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    leaves: Sequence[jax.Array],
    pages: GroupPages,
    *rooms: jax.ShapeDtypeStruct,
) -> tuple[jax.Array, ...]:
    """An op that hands on the token, the last of ``operands``, and the leaves. ``rooms`` are results between
    them."""
    prepare_pool(pool)
    aliases = {2: 0} | {3 + i: 2 + len(rooms) + i for i in range(len(leaves))}
    results = (_struct((1,), jnp.int32), _STATUS, *rooms, *_shapes(leaves))
    return _call(target, results, (*operands, *leaves), pages, aliases, pool_id=np.int64(pool.pool_id))


def _call(
    target: str,
    results: Sequence[Any],
    operands: Sequence[jax.Array],
    pages: GroupPages,
    aliases: dict[int, int] | None = None,
    **attributes: np.int64,
) -> tuple[jax.Array, ...]:
    register_targets()
    call: Any = jax.ffi.ffi_call(target, tuple(results), input_output_aliases=aliases)
    outputs = call(*operands, **attributes, **_geometry(pages))
    # Under shard_map JAX takes what a custom call returns for the same on every device, unless told.
    types: list[Any] = [jax.typeof(operand) for operand in operands]
    varying = sorted(set().union(*(type_.manual_axis_type.varying for type_ in types)))
    return tuple(jax.lax.pcast(output, tuple(varying), to="varying") for output in outputs)


def _room_for_repeats(ids: jax.Array) -> jax.ShapeDtypeStruct:
    """Where a device notes which ids it was given before."""
    room: jax.ShapeDtypeStruct = _struct(ids.shape, jnp.int32)
    return room


def _shapes(leaves: Sequence[jax.Array]) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(_struct(leaf.shape, leaf.dtype) for leaf in leaves)


def _as_ids(values: ArrayLike, name: str) -> jax.Array:
    ids = jnp.asarray(values)
    if ids.ndim != 1 or ids.dtype != jnp.int32:
        raise BlockIdError(f"{name} must be int32 of shape (n,), got {ids.dtype} of shape {ids.shape}")
    return ids


def _as_token(token: ArrayLike) -> jax.Array:
    values = _as_ids(token, "token")
    if values.shape != (1,):
        raise BlockIdError(
            f"token must be int32 of shape (1,), got shape {values.shape}; "
            "pass pool.token(), or the token of the op before"
        )
    return values


def _require_leaves(leaves: Sequence[jax.Array], pages: GroupPages) -> None:
    if len(leaves) != len(pages.leaves):
        raise CacheMismatchError(
            f"the group has {len(pages.leaves)} leaves, got {len(leaves)}; "
            "pass those of CanonicalKVCaches.group_leaves()"
        )


def _require_one_device(leaves: Sequence[jax.Array], pages: GroupPages) -> None:
    _require_leaves(leaves, pages)
    if find_grid(leaves, pages).parts:
        raise CacheMismatchError(
            f"leaves of shapes {[leaf.shape for leaf in leaves]} are more than one device holds; use "
            "BlockTransfer, or call the op under shard_map"
        )


def _require_ids_for_each_shard(ids: jax.Array, grid: ShardGrid) -> None:
    if len(ids) % grid.num_data_shards:
        raise BlockIdError(
            f"block_ids has {len(ids)} entries for {grid.num_data_shards} data shards; give as many for each "
            "of them, filled up with -1"
        )


def _require_records_for_each_shard(
    staging: jax.Array, ids: jax.Array, grid: ShardGrid, pages: GroupPages
) -> None:
    """On one device the op itself counts records that are missing; cut up, they would pass for others."""
    expected = (len(ids), grid.num_tensor_shards * pages.record_bytes)
    if grid.parts and staging.shape != expected:
        raise CacheMismatchError(
            f"staging has shape {staging.shape}, but {len(ids)} blocks in {grid.num_tensor_shards} tensor "
            f"shards take {expected}; pass records as gather_pages returns them"
        )


def _geometry(pages: GroupPages) -> dict[str, Any]:
    return {
        "record_bytes": np.int64(pages.record_bytes),
        "clear_from": np.int64(pages.clear_from),
        "plans": _plan_rows(pages),
    }


@lru_cache(maxsize=256)
def _plan_rows(pages: GroupPages) -> npt.NDArray[np.int64]:
    """The plans as in ``ffi/copy.h``, fourteen numbers each; leaves by their place in ``pages.leaves``."""
    place = {leaf: i for i, leaf in enumerate(pages.leaves)}
    rows = [
        (
            place[placement.leaf],
            placement.plan.num_blocks,
            placement.plan.block_stride,
            placement.plan.run_bytes,
            placement.plan.leaf_offset,
            placement.plan.record_offset,
            placement.plan.outer_count,
            placement.plan.outer_leaf_stride,
            placement.plan.outer_page_stride,
            placement.plan.inner_count,
            placement.plan.inner_leaf_stride,
            placement.plan.inner_page_stride,
            placement.plan.num_rows,
            placement.plan.row_stride,
        )
        for placement in pages.placements
    ]
    flat = np.array(rows, np.int64).reshape(-1)
    flat.setflags(write=False)
    return flat
