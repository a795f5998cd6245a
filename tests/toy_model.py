"""A tiny hybrid model whose every logit depends on every cached value it should see, and its NumPy oracle.

All arithmetic is unsigned 32-bit and exact, so one wrong, stale or missing cache entry changes the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.serving import StepBatch
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayerSpec,
    MambaSpec,
    SlidingWindowSpec,
)

VOCAB = 97
POISON = 0xDEADBEEF


@dataclass(frozen=True)
class ToyModel:
    """Layers: recurrent, sliding window, full attention; any subset of the groups may be left out."""

    window: int = 20
    max_model_len: int = 256
    kinds: tuple[str, ...] = ("full", "window", "state")
    size_factors: tuple[tuple[str, int], ...] = ()
    name: str = "toy"
    vocab_size: int = VOCAB

    @property
    def params(self):
        return {"embed": jnp.asarray(embedding())}

    def cache_groups(self, block_size, dtype=jnp.uint32):
        size = {kind: block_size * dict(self.size_factors).get(kind, 1) for kind in self.kinds}
        specs = {}
        if "full" in size:
            specs["full"] = FullAttentionSpec(size["full"], 1, 1, dtype)
        if "window" in size:
            specs["window"] = SlidingWindowSpec(size["window"], 1, 1, dtype, self.window)
        if "state" in size:
            specs["state"] = MambaSpec(size["state"], ((2,),), (dtype,))
        return [((f"{kind}.0",), specs[kind]) for kind in self.kinds]

    def init_caches(self, config):
        caches = {}
        for group in config.groups:
            blocks, size = group.num_blocks, group.block_size
            if isinstance(group.spec, MambaSpec):
                leaf = jnp.zeros((blocks, 2), jnp.uint32)
            elif isinstance(group.spec, SlidingWindowSpec):
                leaf = (jnp.zeros((blocks, size), jnp.uint32), jnp.zeros((blocks, size), jnp.uint32))
            else:
                leaf = jnp.zeros((2, blocks, size), jnp.uint32)
            caches[group.layer_names[0]] = leaf
        return caches

    def step(self, params, kv_caches, batch: StepBatch):
        caches = dict(kv_caches)
        tables = dict(zip(self.kinds, batch.block_tables, strict=True))
        offsets = jnp.arange(batch.token_ids.shape[1])
        positions = batch.num_computed[:, None] + offsets
        real = offsets < batch.num_new[:, None]
        hidden = params["embed"][batch.token_ids]
        if "state" in tables:
            hidden, caches["state.0"] = _recur(caches["state.0"], tables["state"], hidden, real)
        if "window" in tables:
            keys, values, caches["window.0"] = _write_pair(
                caches["window.0"], tables["window"], hidden, positions, real
            )
            hidden = hidden * 3 + _attend(keys, values, positions, self.window)
        if "full" in tables:
            stacked = caches["full.0"]
            keys, values, pair = _write_pair(
                (stacked[0], stacked[1]), tables["full"], hidden * 5 + 1, positions, real
            )
            caches["full.0"] = jnp.stack(pair)
            hidden = hidden ^ _attend(keys, values, positions, None)
        last = jnp.take_along_axis(hidden, jnp.maximum(batch.num_new - 1, 0)[:, None], axis=1)[:, 0]
        return toy_logits(last, jnp), caches


def embedding():
    tokens = np.arange(VOCAB, dtype=np.uint32)
    return tokens * np.uint32(2654435761) + np.uint32(12345)


def toy_logits(hidden, xp):
    """(B,) uint32 -> (B, VOCAB) float32, exact integers below 2**20."""
    odd = xp.arange(VOCAB, dtype=xp.uint32) * xp.uint32(2) + xp.uint32(1)
    mixed = (hidden[:, None] ^ (hidden[:, None] >> 15)) * (odd * xp.uint32(40503))
    return (mixed >> 12).astype(xp.float32)


def _recur(leaf, table, hidden, real):
    start = jnp.where(table[:, :1] >= 0, leaf[table[:, 0]], 0)

    def token(state, inputs):
        value, is_real = inputs
        new = jnp.stack([state[:, 0] * 31 + value, state[:, 1] ^ (value + state[:, 0])], axis=1)
        state = jnp.where(is_real[:, None], new, state)
        return state, value ^ state[:, 0] ^ state[:, 1]

    end, out = jax.lax.scan(token, start, (hidden.T, real.T))
    written = jnp.where((table[:, 1] >= 0) & real[:, 0], table[:, 1], leaf.shape[0])
    return out.T, leaf.at[written].set(end, mode="drop")


def _write_pair(pair, table, hidden, positions, real):
    num_blocks, size = pair[0].shape
    block = jnp.take_along_axis(table, jnp.minimum(positions // size, table.shape[1] - 1), axis=1)
    block = jnp.where(real & (block >= 0), block, num_blocks)
    place = positions.astype(jnp.uint32)
    written = [
        leaf.at[block, positions % size].set(value, mode="drop")
        for leaf, value in zip(pair, (hidden * 7 + place, hidden ^ (place * 11)), strict=True)
    ]
    held = jnp.repeat(table >= 0, size, axis=1)
    seen = [jnp.where(held, leaf[table].reshape(table.shape[0], -1), jnp.uint32(POISON)) for leaf in written]
    return seen[0], seen[1], tuple(written)


def _attend(keys, values, positions, window):
    place = jnp.arange(keys.shape[1])
    distance = positions[:, :, None] - place
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    weight = distance.astype(jnp.uint32) * 2 + 1
    return jnp.sum(jnp.where(visible, keys[:, None] * weight + values[:, None], 0), axis=2, dtype=jnp.uint32)


def oracle_last(tokens, kinds=("full", "window", "state"), window=20):
    """The last hidden value of a whole sequence, computed position by position without any cache."""
    mask = 0xFFFFFFFF
    embed = [int(value) for value in embedding()]
    hidden = [embed[token] for token in tokens]
    if "state" in kinds:
        first = second = 0
        for index, value in enumerate(hidden):
            first, second = (first * 31 + value) & mask, second ^ ((value + first) & mask)
            hidden[index] = value ^ first ^ second
    if "window" in kinds:
        hidden = [
            (value * 3 + _oracle_sum(hidden, index, max(0, index - window + 1))) & mask
            for index, value in enumerate(hidden)
        ]
    if "full" in kinds:
        scaled = [(value * 5 + 1) & mask for value in hidden]
        return hidden[-1] ^ _oracle_sum(scaled, len(hidden) - 1, 0)
    return hidden[-1]


def _oracle_sum(hidden, index, first):
    total = 0
    for place in range(first, index + 1):
        weight = (index - place) * 2 + 1
        total += (hidden[place] * 7 + place) * weight + (hidden[place] ^ ((place * 11) & 0xFFFFFFFF))
    return total & 0xFFFFFFFF


def oracle_tokens(prompt, num_new, kinds=("full", "window", "state"), window=20):
    """Greedy continuation of ``prompt``, every token from the whole sequence."""
    tokens = list(prompt)
    for _ in range(num_new):
        last = np.array([oracle_last(tokens, kinds, window)], np.uint32)
        tokens.append(int(np.argmax(toy_logits(last, np)[0])))
    return tuple(tokens[len(prompt) :])


def make_config(model: ToyModel, block_size: int, **num_blocks: int) -> KVCacheConfig:
    """Groups of ``model`` with the block counts given by kind."""
    groups: list[tuple[tuple[str, ...], LayerSpec]] = model.cache_groups(block_size)
    return KVCacheConfig(
        tuple(KVCacheGroupSpec(names, spec, num_blocks[names[0].split(".")[0]]) for names, spec in groups)
    )


def share_programs(engine):
    """Let engines of the same model and caches share compiled programs; compiling is most of a test."""
    key = (engine._model, engine.cache_config, engine.max_model_len)
    engine._programs = _PROGRAMS.setdefault(key, engine._programs)
    return engine


_PROGRAMS: dict = {}


def random_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()
