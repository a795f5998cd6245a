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
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

VOCAB = 97
POISON = 0xDEADBEEF
SINK_WINDOW, SINKS = 11, 6
LOCAL = 24


@dataclass(frozen=True)
class ToyModel:
    """Layers in the order of ``step``; any subset of the groups may be left out.

    ``sink`` is a sliding window with attention sinks, ``local`` chunked local attention, ``latent`` MLA.
    """

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
        factors = dict(self.size_factors)
        return [
            ((f"{kind}.0",), self._spec(kind, block_size * factors.get(kind, 1), dtype))
            for kind in self.kinds
        ]

    def _spec(self, kind, size, dtype):
        if kind == "full":
            return FullAttentionSpec(size, 1, 1, dtype)
        if kind == "window":
            return SlidingWindowSpec(size, 1, 1, dtype, self.window)
        if kind == "sink":
            return SlidingWindowSpec(size, 1, 1, dtype, SINK_WINDOW, sink_len=SINKS)
        if kind == "local":
            return ChunkedLocalAttentionSpec(size, 1, 1, dtype, LOCAL)
        if kind == "latent":
            return MLAAttentionSpec(size, 1, dtype)
        return MambaSpec(size, ((2,),), (dtype,))

    def init_caches(self, config):
        caches = {}
        for kind, group in zip(self.kinds, config.groups, strict=True):
            blocks, size = group.num_blocks, group.block_size
            if kind == "full":
                leaf = jnp.zeros((2, blocks, size), jnp.uint32)
            elif kind == "state":
                leaf = jnp.zeros((blocks, 2), jnp.uint32)
            else:
                leaf = tuple(jnp.zeros((blocks, size), jnp.uint32) for _ in range(1 + (kind != "latent")))
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
        for kind in ("window", "sink", "local", "latent"):
            if kind in tables:
                leaves = caches[f"{kind}.0"]
                seen, caches[f"{kind}.0"] = _write(leaves, tables[kind], hidden, positions, real)
                hidden = hidden * 3 + self._attend(kind, seen, positions)
        if "full" in tables:
            leaves = (caches["full.0"][0], caches["full.0"][1])
            seen, written = _write(leaves, tables["full"], hidden * 5 + 1, positions, real)
            caches["full.0"] = jnp.stack(written)
            hidden = hidden ^ self._attend("full", seen, positions)
        last = jnp.take_along_axis(hidden, jnp.maximum(batch.num_new - 1, 0)[:, None], axis=1)[:, 0]
        return toy_logits(last, jnp), caches

    def _attend(self, kind, seen, positions):
        keys, values = seen[0], seen[-1]
        place = jnp.arange(keys.shape[1])
        distance = positions[:, :, None] - place
        visible = distance >= 0
        if kind == "window":
            visible &= distance < self.window
        elif kind == "sink":
            visible &= (distance < SINK_WINDOW) | (place < SINKS)
        elif kind == "local":
            visible &= place >= positions[:, :, None] // LOCAL * LOCAL
        weight = distance.astype(jnp.uint32) * 2 + 1
        terms = keys[:, None] * weight + values[:, None]
        return jnp.sum(jnp.where(visible, terms, 0), axis=2, dtype=jnp.uint32)


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


def _write(leaves, table, hidden, positions, real):
    """What each row sees in its blocks, per leaf, and the leaves with the new tokens: keys, then values."""
    num_blocks, size = leaves[0].shape
    block = jnp.take_along_axis(table, jnp.minimum(positions // size, table.shape[1] - 1), axis=1)
    block = jnp.where(real & (block >= 0), block, num_blocks)
    place = positions.astype(jnp.uint32)
    written = tuple(
        leaf.at[block, positions % size].set(value, mode="drop")
        for leaf, value in zip(leaves, (hidden * 7 + place, hidden ^ (place * 11)), strict=False)
    )
    held = jnp.repeat(table >= 0, size, axis=1)
    seen = [jnp.where(held, leaf[table].reshape(table.shape[0], -1), jnp.uint32(POISON)) for leaf in written]
    return seen, written


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
    for kind in ("window", "sink", "local", "latent"):
        if kind in kinds:
            hidden = [
                (value * 3 + _oracle_sum(kind, hidden, index, window)) & mask
                for index, value in enumerate(hidden)
            ]
    if "full" in kinds:
        scaled = [(value * 5 + 1) & mask for value in hidden]
        return hidden[-1] ^ _oracle_sum("full", scaled, len(hidden) - 1, window)
    return hidden[-1]


def _oracle_sum(kind, hidden, index, window):
    firsts = {"window": index - window + 1, "sink": index - SINK_WINDOW + 1, "local": index - index % LOCAL}
    first = max(0, firsts.get(kind, 0))
    sinks = range(min(SINKS, first)) if kind == "sink" else ()
    total = 0
    for place in (*sinks, *range(first, index + 1)):
        key, value = hidden[place] * 7 + place, hidden[place] ^ ((place * 11) & 0xFFFFFFFF)
        total += key * ((index - place) * 2 + 1) + (key if kind == "latent" else value)
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
