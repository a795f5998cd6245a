"""The page ops in plain JAX: slower, but at home on every platform. No byte goes through float.

Signatures and meaning as in ``jaxkv.transfer.ops``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from jaxkv.errors import CacheMismatchError
from jaxkv.page_plan import PagePlan
from jaxkv.records import GroupPages
from jaxkv.transfer.status import STATUS_SIZE, StatusEntry


def gather_pages(leaves: Sequence[jax.Array], block_ids: jax.Array, pages: GroupPages) -> jax.Array:
    """As ``jaxkv.transfer.ops.gather_pages``."""
    flat = [_to_bytes(leaf) for leaf in leaves]
    valid = (block_ids >= 0) & (block_ids < pages.num_blocks)
    blocks = jnp.where(valid, block_ids, 0)
    staging = jnp.zeros((block_ids.shape[0], pages.record_bytes), jnp.uint8)
    for placement in pages.placements:
        leaf = flat[pages.leaves.index(placement.leaf)]
        units = _UnitView(placement.plan, leaf.size)
        rows = leaf.reshape(-1, units.unit)
        page = rows[units.leaf_rows(blocks)].reshape(block_ids.shape[0], placement.plan.page_bytes)
        staging = _set_columns(staging, units.record_bytes(), page)
    return jnp.where(valid[:, None], staging, 0)


def scatter_pages(
    staging: jax.Array, block_ids: jax.Array, leaves: Sequence[jax.Array], pages: GroupPages
) -> tuple[list[jax.Array], jax.Array]:
    """As ``jaxkv.transfer.ops.scatter_pages``."""
    if block_ids.shape[0] == 0:
        return list(leaves), jnp.zeros(STATUS_SIZE, jnp.int32)
    wanted = block_ids != -1
    valid = (block_ids >= 0) & (block_ids < pages.num_blocks)
    same = block_ids[:, None] == block_ids[None, :]
    first = jnp.argmax(same, axis=1) == jnp.arange(block_ids.shape[0])
    written = valid & first
    flat = [_to_bytes(leaf) for leaf in leaves]
    for placement in pages.placements:
        place = pages.leaves.index(placement.leaf)
        units = _UnitView(placement.plan, flat[place].size)
        rows = flat[place].reshape(-1, units.unit)
        at = units.leaf_rows(jnp.where(written, block_ids, 0))
        at = jnp.where(written[:, None], at, rows.shape[0])
        page = _get_columns(staging, units.record_bytes()).reshape(*at.shape, units.unit)
        flat[place] = rows.at[at].set(page, mode="drop").reshape(-1)
    known = {
        StatusEntry.MOVED: jnp.sum(written),
        StatusEntry.BAD_BLOCK: jnp.sum(wanted & ~valid),
        StatusEntry.REPEATED: jnp.sum(valid & ~first),
        StatusEntry.FIRST_REFUSED: jnp.argmax(wanted & ~written),
    }
    status = jnp.stack([known.get(StatusEntry(entry), 0) for entry in range(STATUS_SIZE)]).astype(jnp.int32)
    return [_from_bytes(data, leaf) for data, leaf in zip(flat, leaves, strict=True)], status


def written_bytes(pages: GroupPages) -> slice | npt.NDArray[np.int64]:
    """The bytes of a record that ``pages`` write: all of them, or their places."""
    if pages.block_bytes == pages.clear_from:
        return slice(None)
    places = [_UnitView(placement.plan, 0).record_bytes() for placement in pages.placements]
    return np.concatenate([*places, np.arange(pages.clear_from, pages.record_bytes)])


def _set_columns(staging: jax.Array, columns: npt.NDArray[np.int64], values: jax.Array) -> jax.Array:
    """``staging`` with ``values`` in these columns; a plain copy where they lie side by side."""
    if _are_neighbours(columns):
        return jax.lax.dynamic_update_slice(staging, values, (0, int(columns[0])))
    return staging.at[:, columns].set(values)


def _get_columns(staging: jax.Array, columns: npt.NDArray[np.int64]) -> jax.Array:
    if _are_neighbours(columns):
        return staging[:, int(columns[0]) : int(columns[-1]) + 1]
    return staging[:, columns]


def _are_neighbours(columns: npt.NDArray[np.int64]) -> bool:
    return bool((np.diff(columns) == 1).all())


class _UnitView:
    """A leaf as rows of the largest unit all offsets of a plan share, so that 32-bit indices reach far."""

    def __init__(self, plan: PagePlan, leaf_bytes: int) -> None:
        self._plan = plan
        self.unit = math.gcd(
            leaf_bytes,
            plan.leaf_offset,
            plan.row_stride,
            plan.block_stride,
            plan.run_bytes,
            plan.outer_leaf_stride,
            plan.inner_leaf_stride,
        )
        if leaf_bytes // self.unit > np.iinfo(np.int32).max:
            raise CacheMismatchError(
                f"a leaf of {leaf_bytes} bytes in runs of {self.unit} is more than the xla backend can index"
                "; use backend='cpu'"
            )

    def leaf_rows(self, blocks: jax.Array) -> jax.Array:
        """``(n, rows per page)``: the rows of each block's page, in page order."""
        plan = self._plan
        offsets = plan.leaf_offset + self._grid(plan.outer_leaf_stride, plan.inner_leaf_stride, self.unit)
        rows = jnp.asarray(offsets // self.unit, jnp.int32)
        blocks_per_row = plan.num_blocks // plan.num_rows
        starts = blocks // blocks_per_row * (plan.row_stride // self.unit)
        starts += blocks % blocks_per_row * (plan.block_stride // self.unit)
        return starts[:, None] + rows

    def record_bytes(self) -> npt.NDArray[np.int64]:
        """The record byte of each byte of a page, in page order."""
        plan = self._plan
        return plan.record_offset + self._grid(plan.outer_page_stride, plan.inner_page_stride, 1)

    def _grid(self, outer_stride: int, inner_stride: int, step: int) -> npt.NDArray[np.int64]:
        plan = self._plan
        outer = np.arange(plan.outer_count)[:, None, None] * outer_stride
        inner = np.arange(plan.inner_count)[None, :, None] * inner_stride
        within = np.arange(0, plan.run_bytes, step)[None, None, :]
        return (outer + inner + within).reshape(-1)


def _bits(dtype: DTypeLike) -> int:
    return jax.dtypes.itemsize_bits(dtype)


def _to_bytes(leaf: jax.Array) -> jax.Array:
    """The bytes of a leaf in row-major order, as they lie in memory."""
    _require_bitcast(leaf.dtype)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint8).reshape(-1)
    bits = _bits(leaf.dtype)
    flat = leaf.reshape(-1) if bits >= 8 else leaf.reshape(-1, 8 // bits)
    return jax.lax.bitcast_convert_type(flat, jnp.uint8).reshape(-1)


def _from_bytes(data: jax.Array, like: jax.Array) -> jax.Array:
    if like.dtype == jnp.bool_:
        return data.astype(jnp.bool_).reshape(like.shape)
    bits = _bits(like.dtype)
    grouped = data.reshape(-1, bits // 8) if bits > 8 else data
    with jax.enable_x64(True):  # Without it a leaf of 64-bit elements would come back with 32.
        return jax.lax.bitcast_convert_type(grouped, like.dtype).reshape(like.shape)


def _require_bitcast(dtype: DTypeLike) -> None:
    bits = _bits(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating) or (8 % bits and bits % 8):
        raise CacheMismatchError(f"the xla backend cannot read {dtype} as bytes; use backend='cpu'")
