"""Choosing the next token on the device. Pure and traceable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Per row: ``temperature`` (B,) float32, 0 for greedy; ``seed`` (B,) uint32; ``position`` (B,) int32.

    ``position`` is where in its sequence the sampled token will stand.
    """

    temperature: jax.Array
    seed: jax.Array
    position: jax.Array


def sample(logits: jax.Array, batch: SamplingBatch) -> jax.Array:
    """Tokens (B,) int32 from ``logits`` (B, V) float32. A row's draw depends on nothing but that row."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row: jax.Array, temperature: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, row / jnp.maximum(temperature, 1e-6)).astype(jnp.int32)

    def mixed() -> jax.Array:
        drawn = jax.vmap(draw)(logits, batch.temperature, batch.seed, batch.position)
        return jnp.where(batch.temperature > 0, drawn, greedy)

    tokens: jax.Array = jax.lax.cond(jnp.any(batch.temperature > 0), mixed, lambda: greedy)
    return tokens
