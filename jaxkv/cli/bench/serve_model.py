"""A model that computes nothing and takes a known time: what a device step looks like to the loop around it.

Its caches have layers and bytes of Gemma 3 270M in bfloat16, 288 KiB a block of 16 tokens, and every step
writes the keys and values of its tokens there, donated and in place. Then it spins on one core. A step on an
accelerator takes no core at all; one on the CPU takes all of them. The elements are float32, of half as many
channels: XLA's CPU code would rewrite whole leaves of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.serving.model import KVCaches, StepBatch
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, LayerSpec, SlidingWindowSpec

LAYERS, _LAYERS_A_FULL_ONE = 18, 6
_HEADS, _HEAD_SIZE, _WINDOW = 1, 128, 512
_TOKENS_A_TURN = 256  # A prompt's chunk of so many tokens takes as long as a step of one token for each row.
_CALIBRATION_SPINS, _CALIBRATION_REPEATS = 1000, 15
_LANES = 256  # What one spin computes: some microseconds of one core.


@final
@dataclass(slots=True)
class StandInModel:
    """``spins`` says how long a step takes; it may be changed at any time and recompiles nothing."""

    spins: int = 0
    max_model_len: int = 2048
    num_layers: int = LAYERS
    name: str = field(default="stand-in", init=False)
    vocab_size: int = field(default=256, init=False)

    @property
    def params(self) -> dict[str, jax.Array]:
        """What a step is given."""
        return {"spins": jnp.int32(self.spins)}

    def cache_groups(self, block_size: int, dtype: DTypeLike) -> Sequence[tuple[tuple[str, ...], LayerSpec]]:
        """See ``Model``."""
        full = FullAttentionSpec(block_size, _HEADS, _HEAD_SIZE, dtype)
        sliding = SlidingWindowSpec(block_size, _HEADS, _HEAD_SIZE, dtype, _WINDOW)
        num_full = -(-self.num_layers // _LAYERS_A_FULL_ONE)
        return [
            (tuple(f"full.{i}" for i in range(num_full)), full),
            (tuple(f"sliding.{i}" for i in range(self.num_layers - num_full)), sliding),
        ]

    def init_caches(self, config: KVCacheConfig) -> KVCaches:
        """See ``Model``. Of float32; a leaf is ``(blocks, 2, tokens, heads, head size)``."""
        caches: KVCaches = {}
        for group in config.groups:
            shape = (group.num_blocks, 2, group.block_size, _HEADS, _HEAD_SIZE)
            caches |= {name: jnp.zeros(shape, jnp.float32) for name in group.layer_names}
        return caches

    def step(self, params: Any, kv_caches: Mapping[str, Any], batch: StepBatch) -> tuple[jax.Array, KVCaches]:
        """See ``Model``. The next token depends on the last one and its position alone."""
        offsets = jnp.arange(batch.token_ids.shape[1])
        positions = batch.num_computed[:, None] + offsets
        real = offsets < batch.num_new[:, None]
        groups = (("full", batch.block_tables[0]), ("sliding", batch.block_tables[1]))
        caches = {
            name: _write(leaf, table, positions, real, batch.token_ids)
            for prefix, table in groups
            for name, leaf in kv_caches.items()
            if name.startswith(prefix)
        }
        last = jnp.take_along_axis(batch.token_ids, jnp.maximum(batch.num_new - 1, 0)[:, None], 1)[:, 0]
        following = (last * 31 + batch.num_computed + batch.num_new) % self.vocab_size
        spun = _spin(params["spins"] * max(1, len(offsets) // _TOKENS_A_TURN))
        return jax.nn.one_hot(following, self.vocab_size) + spun, caches


def _write(leaf: Any, table: Any, positions: Any, real: Any, token_ids: Any) -> jax.Array:
    num_blocks, _, block_size = leaf.shape[:3]
    blocks = jnp.take_along_axis(table, positions // block_size, axis=1)
    blocks = jnp.where(real & (blocks >= 0), blocks, num_blocks)  # out of range: dropped
    values = jnp.broadcast_to(
        token_ids[:, :, None, None, None].astype(leaf.dtype), (*token_ids.shape, 2, *leaf.shape[3:])
    )
    written: jax.Array = leaf.at[blocks, :, positions % block_size].set(values, mode="drop")
    return written


def _spin(spins: Any) -> jax.Array:
    """0, after a while."""

    def turn(_: Any, x: jax.Array) -> jax.Array:
        return jnp.sin(x) + 1e-3

    x = jax.lax.fori_loop(0, spins, turn, jnp.full((_LANES,), 0.5))
    return jnp.minimum(jnp.abs(x).sum(), 0.0)


def seconds_per_spin() -> float:
    """How long a spin takes on this machine, now."""
    spin = jax.jit(_spin)
    times: dict[int, list[float]] = {_CALIBRATION_SPINS: [], 2 * _CALIBRATION_SPINS: []}
    spin(0).block_until_ready()
    for _ in range(_CALIBRATION_REPEATS):
        for spins, seconds in times.items():
            start = perf_counter()
            spin(spins).block_until_ready()
            seconds.append(perf_counter() - start)
    once, twice = (median(seconds) for seconds in times.values())
    return max(twice - once, 1e-9) / _CALIBRATION_SPINS
