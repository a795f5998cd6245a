"""The four ops as functions of arrays, for use inside a caller's own ``jit``, ``scan`` and the like (CPU).

Page ops, ``gather_pages`` and ``scatter_pages``, are pure. Pool ops, ``offload`` and ``restore``, read and
write a host pool that XLA does not see. Nothing but data dependence orders them and keeps them from being
dropped, merged or moved out of a loop. So each takes a token and returns one: pass it on, and return the last
one from the jitted function. ``offload`` also returns its leaves; go on with those.

None of them fails for what ids or addresses say: entries that are wrong are skipped and counted in the
status. They move bytes, so ``grad`` and ``vmap`` do not apply to them: JAX refuses both when it traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import ArrayLike

from jaxkv.errors import BlockIdError, CacheMismatchError
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer.status import STATUS_SIZE
from jaxkv.transfer.targets import GATHER_PAGES, OFFLOAD, RESTORE, SCATTER_PAGES, register_targets

_struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor
_STATUS = _struct((STATUS_SIZE,), jnp.int32)


def gather_pages(leaves: Sequence[jax.Array], block_ids: ArrayLike, pages: GroupPages) -> jax.Array:
    """The records of ``block_ids`` (int32, ``(n,)``) as ``(n, pages.record_bytes)`` uint8.

    ``leaves`` are those of the group, in the order of ``pages.leaves``. Records of ids that are -1 or outside
    the group are zero, and so are the bytes between ``pages.block_bytes`` and ``pages.record_bytes``.
    """
    _require_leaves(leaves, pages)
    register_targets()
    ids = _as_ids(block_ids, "block_ids")
    records = _struct((ids.shape[0], pages.record_bytes), jnp.uint8)
    staging, _ = jax.ffi.ffi_call(GATHER_PAGES, (records, _STATUS))(ids, *leaves, **_geometry(pages))
    return staging


def scatter_pages(
    staging: jax.Array, block_ids: ArrayLike, leaves: Sequence[jax.Array], pages: GroupPages
) -> tuple[list[jax.Array], jax.Array]:
    """Write records ``(n, pages.record_bytes)`` uint8 to ``block_ids``; returns ``(leaves, status)``.

    Donate the leaves to have them written in place. Ids that are -1 are skipped; of a repeated id the first
    counts.
    """
    _require_leaves(leaves, pages)
    register_targets()
    call = jax.ffi.ffi_call(
        SCATTER_PAGES,
        (_STATUS, *_shapes(leaves)),
        input_output_aliases={2 + i: 1 + i for i in range(len(leaves))},
    )
    status, *written = call(staging, _as_ids(block_ids, "block_ids"), *leaves, **_geometry(pages))
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
    token_out, status, *written = _pool_call(OFFLOAD, pool, leaves, pages, hands_on=True)(
        _as_ids(block_ids, "block_ids"), _as_ids(addresses, "addresses"), _as_token(token)
    )
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
    token_out, status, *written = _pool_call(RESTORE, pool, leaves, pages, hands_on=True)(
        _as_ids(block_ids, "block_ids"), _as_ids(addresses, "addresses"), _as_token(token)
    )
    return token_out, status, written


def read_blocks(
    pool: AnyPool,
    token: ArrayLike,
    leaves: Sequence[jax.Array],
    block_ids: ArrayLike,
    addresses: ArrayLike,
    pages: GroupPages,
) -> jax.Array:
    """As ``offload``, but a plain read: returns the status alone, which must be used for it to happen.

    Leaves that are neither donated nor returned are not copied either, so this is the form for a program that
    does nothing else.
    """
    call = _pool_call(OFFLOAD, pool, leaves, pages, hands_on=False)
    status: jax.Array
    _, status = call(_as_ids(block_ids, "block_ids"), _as_ids(addresses, "addresses"), _as_token(token))
    return status


def _pool_call(
    target: str, pool: AnyPool, leaves: Sequence[jax.Array], pages: GroupPages, *, hands_on: bool
) -> Any:
    _require_leaves(leaves, pages)
    register_targets()
    returned = _shapes(leaves) if hands_on else ()
    aliases = {2: 0} | {3 + i: 2 + i for i in range(len(returned))}
    call = jax.ffi.ffi_call(
        target,
        (_struct((1,), jnp.int32), _STATUS, *returned),
        input_output_aliases=aliases,
    )
    pool_id = np.int64(pool.pool_id)
    return lambda ids, addresses, token: call(
        ids, addresses, token, *leaves, pool_id=pool_id, **_geometry(pages)
    )


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
