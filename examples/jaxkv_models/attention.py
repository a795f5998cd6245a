"""Attention over paged K and V: writes the new tokens into their pages, then attends tile by tile.

A layer's cache is a pair of leaves (P, S, H, D): P pages of S tokens, H kv heads of size D. The number of
tiles is a run-time value, so one compiled program serves every context length and pays for the tiles the
longest row needs. Softmax runs online over the tiles (Milakov and Gimelshein 2018; Dao 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp

from jaxkv.serving.model import StepBatch

PageCache = tuple[jax.Array, jax.Array]
"""K and V pages of one layer."""

QUERY_TOKENS = 256
"""Queries that visit the same tiles."""
TILE_TOKENS = 256
"""Keys of one tile, rounded to blocks."""
_LOWEST_PEAK, _MASKED = -1e20, -1e30
"""So far apart that a masked score weighs nothing even in a row that has seen no key yet."""


@final
@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one group share in a step; see ``plan_attention``.

    ``table`` (B, M) block ids; ``positions`` (B, T); ``is_new`` (B, T) real tokens; ``kv_end`` (B,) tokens in
    the cache after this step.
    """

    table: jax.Array
    positions: jax.Array
    is_new: jax.Array
    kv_end: jax.Array
    block_size: int
    window: int | None


def token_positions(batch: StepBatch) -> tuple[jax.Array, jax.Array]:
    """Positions (B, T) of the new tokens, and which of them are real."""
    steps = jnp.arange(batch.token_ids.shape[1], dtype=jnp.int32)[None, :]
    return batch.num_computed[:, None] + steps, steps < batch.num_new[:, None]


def plan_attention(
    batch: StepBatch, table: jax.Array, block_size: int, window: int | None = None
) -> AttentionPlan:
    """The plan of a group with block ``table`` (B, M).

    With a ``window``, a query sees the last ``window`` tokens, its own included.
    """
    positions, is_new = token_positions(batch)
    return AttentionPlan(
        table=table,
        positions=positions,
        is_new=is_new,
        kv_end=jnp.where(batch.num_new > 0, batch.num_computed + batch.num_new, 0),
        block_size=block_size,
        window=window,
    )


def _blocks_at(plan: AttentionPlan, columns: jax.Array) -> jax.Array:
    """Block ids (B, n) at ``columns`` (B, n) of the table; -1 past its end."""
    return jnp.take_along_axis(plan.table, columns, axis=1, mode="fill", fill_value=-1)


def write_kv(plan: AttentionPlan, cache: PageCache, k: jax.Array, v: jax.Array) -> PageCache:
    """The cache with the new ``k`` and ``v`` (B, T, H, D) in place; padding and -1 blocks are dropped."""
    num_pages = cache[0].shape[0]
    blocks = _blocks_at(plan, plan.positions // plan.block_size)
    # An index past the end is dropped, while a negative one would wrap around.
    blocks = jnp.where(plan.is_new & (blocks >= 0), blocks, num_pages)
    offsets = plan.positions % plan.block_size
    new_k, new_v = (
        pages.at[blocks, offsets].set(new.astype(pages.dtype), mode="drop")
        for pages, new in zip(cache, (k, v), strict=True)
    )
    return new_k, new_v


def attend(plan: AttentionPlan, cache: PageCache, q: jax.Array, scale: float) -> jax.Array:
    """Attention output (B, T, Hq * D) of queries ``q`` (B, T, Hq, D) over the pages of ``cache``.

    Query head ``h`` reads kv head ``h // (Hq / H)``. Rows without real tokens come out as zeros.
    """
    batch, steps, num_heads, head_size = q.shape
    # (B, H, T, Hq / H, D): free of copies for a single kv head.
    grouped = q.reshape(batch, steps, cache[0].shape[2], -1, head_size).transpose(0, 2, 1, 3, 4) * scale
    outs = []
    for first in range(0, steps, QUERY_TOKENS):
        part = slice(first, first + QUERY_TOKENS)
        outs.append(_attend_part(plan, cache, grouped[:, :, part], plan.positions[:, part]))
    out = jnp.concatenate(outs, axis=2)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, steps, num_heads * head_size)


def _attend_part(plan: AttentionPlan, cache: PageCache, q: jax.Array, positions: jax.Array) -> jax.Array:
    """Attention output, shaped like ``q`` (B, H, T, Hq / H, D), of neighbours at ``positions`` (B, T)."""
    first_block, num_blocks = _blocks_seen(plan, positions)
    blocks_per_tile = max(1, TILE_TOKENS // plan.block_size)
    num_tiles = -(-jnp.max(num_blocks) // blocks_per_tile)

    def add_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak, total, acc = carry
        columns = first_block + tile * blocks_per_tile
        k, v, key_positions, readable = _load_tile(plan, cache, columns, blocks_per_tile)
        visible = _visible(plan, positions, key_positions, readable)[:, None, :, None, :]  # (B, 1, T, 1, K)
        scores = jnp.einsum("bhtgd,bshd->bhtgs", q, k)
        scores = jnp.where(visible, scores, _MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        acc = acc * shrink[..., None] + jnp.einsum("bhtgs,bshd->bhtgd", weights, v)
        return new_peak, total * shrink + weights.sum(axis=-1), acc

    rows = q.shape[:-1]
    start = (jnp.full(rows, _LOWEST_PEAK), jnp.zeros(rows), jnp.zeros(q.shape))
    _, total, acc = jax.lax.fori_loop(0, num_tiles, add_tile, start)
    out: jax.Array = acc / jnp.maximum(total, 1e-30)[..., None]
    return out


def _blocks_seen(plan: AttentionPlan, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First block (B,) that queries at ``positions`` (B, T) see, and how many (B,) from there on."""
    first, end = positions[:, 0], jnp.minimum(positions[:, -1] + 1, plan.kv_end)
    first_seen = jnp.zeros_like(first) if plan.window is None else jnp.maximum(first - (plan.window - 1), 0)
    first_block = first_seen // plan.block_size
    num_blocks = -(-end // plan.block_size) - first_block
    return first_block, jnp.where(first < plan.kv_end, num_blocks, 0)


def _load_tile(
    plan: AttentionPlan, cache: PageCache, first_column: jax.Array, num_columns: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """K and V (B, K, H, D) of a tile as float32, their positions (B, K), and which of them hold a token.

    The tile is ``num_columns`` columns of the table from ``first_column`` (B,) on.
    """
    batch = plan.table.shape[0]
    columns = first_column[:, None] + jnp.arange(num_columns, dtype=jnp.int32)
    blocks = _blocks_at(plan, columns)
    in_block = jnp.arange(plan.block_size, dtype=jnp.int32)
    positions = (columns[:, :, None] * plan.block_size + in_block).reshape(batch, -1)
    readable = jnp.repeat(blocks >= 0, plan.block_size, axis=1) & (positions < plan.kv_end[:, None])
    k, v = (
        pages.at[jnp.maximum(blocks, 0)]
        .get(mode="promise_in_bounds")
        .reshape(batch, -1, *pages.shape[2:])
        .astype(jnp.float32)
        for pages in cache
    )
    # A weight of zero does not silence what an unwritten page may hold, such as NaN.
    return k, jnp.where(readable[:, :, None, None], v, 0.0), positions, readable


def _visible(
    plan: AttentionPlan, positions: jax.Array, key_positions: jax.Array, readable: jax.Array
) -> jax.Array:
    """(B, T, K): which keys each query sees."""
    distance = positions[:, :, None] - key_positions[:, None, :]
    visible = readable[:, None, :] & (distance >= 0)
    return visible if plan.window is None else visible & (distance < plan.window)
