"""Zeroed caches for a config, and reading and writing recurrent states in them by block.

A recurrent layer's cache is a tuple of leaves (N, ...): N snapshots of each part of its state.
"""

from __future__ import annotations

from typing import assert_never

import jax
import jax.numpy as jnp

from jaxkv.serving.model import KVCaches
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

StateCache = tuple[jax.Array, jax.Array]
"""Convolution inputs (N, K - 1, width) and recurrent states (N, ...) of one layer."""


def init_caches(config: KVCacheConfig) -> KVCaches:
    """Zeroed leaves for every layer of ``config``; no two share a buffer."""
    return {
        name: _zero_leaves(group.spec, group.num_blocks)
        for group in config.groups
        for name in group.layer_names
    }


def _zero_leaves(spec: LayerSpec, num_blocks: int) -> tuple[jax.Array, ...]:
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            rows = (num_blocks, spec.block_size, spec.num_kv_heads)
            value_size = spec.head_size if spec.head_size_v is None else spec.head_size_v
            return jnp.zeros((*rows, spec.head_size), spec.dtype), jnp.zeros((*rows, value_size), spec.dtype)
        case MLAAttentionSpec():
            return (jnp.zeros((num_blocks, spec.block_size, spec.head_size), spec.dtype),)
        case MambaSpec():
            return tuple(
                jnp.zeros((num_blocks, *shape), dtype)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            )
        case _:
            assert_never(spec)


def read_states(cache: StateCache, blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states (B, ...) in ``blocks`` (B,) as float32; zeros where the block is -1."""
    conv, recurrent = cache
    return _read_rows(conv, blocks), _read_rows(recurrent, blocks)


def _read_rows(leaf: jax.Array, blocks: jax.Array) -> jax.Array:
    """Reads row after row, up to the last that has a block.

    A plain gather is cheap enough for the compiler to repeat it wherever the state is used; then the later
    write is no longer ordered after all reads, and costs a copy of the whole leaf.
    """
    rows = jnp.arange(1, len(blocks) + 1, dtype=jnp.int32)
    end = jnp.max(jnp.where(blocks >= 0, rows, 0))

    def read(row: jax.Array, states: jax.Array) -> jax.Array:
        state = leaf[jnp.maximum(blocks[row], 0)].astype(jnp.float32)
        return states.at[row].set(jnp.where(blocks[row] >= 0, state, 0.0))

    start = jnp.zeros((len(blocks), *leaf.shape[1:]), jnp.float32)
    states: jax.Array = jax.lax.fori_loop(0, end, read, start)
    return states


def write_states(
    cache: StateCache, blocks: jax.Array, states: tuple[jax.Array, jax.Array], num_new: jax.Array
) -> StateCache:
    """The cache with ``states`` (B, ...) in ``blocks`` (B,), in place; -1 and empty rows are dropped."""
    # An index past the end is dropped, while a negative one would wrap around.
    targets = jnp.where((blocks >= 0) & (num_new > 0), blocks, cache[0].shape[0])
    conv, recurrent = (
        leaf.at[targets].set(state.astype(leaf.dtype), mode="drop")
        for leaf, state in zip(cache, states, strict=True)
    )
    return conv, recurrent
