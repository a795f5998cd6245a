"""A small decoder over dense per-request caches, with every kind of row that gemma and tunix have.

Rows are computed by one program each, one token at a time, so equal rows give equal bits wherever they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_SIZE = 4
HEADS, DIM, WIDTH, VOCAB = 2, 4, 8, 19


@dataclass(frozen=True)
class Layer:
    """``slots`` to a row; a ``window`` is found by the slots' positions (gemma) or by their order (tunix)."""

    slots: int
    window: int | None = None
    has_positions: bool = False
    heads: int = HEADS


LAYERS = {
    "layer_0": Layer(slots=8, window=8),
    "layer_1": Layer(slots=48),
    "layer_2": Layer(slots=48, window=6, has_positions=True),
    "layer_3": Layer(slots=16, window=10),
    "layer_4": Layer(slots=48, has_positions=True, heads=1),
}
WINDOWS = {name: layer.window for name, layer in LAYERS.items() if layer.window}


def init_cache(num_rows: int):
    """``{layer: {"k", "v", "end_index"[, "positions"]}}``, as gemma and tunix make it."""
    cache = {}
    for name, layer in LAYERS.items():
        shape = (num_rows, layer.slots, layer.heads, DIM)
        cache[name] = {
            "v": jnp.zeros(shape, jnp.float32),
            "k": jnp.zeros(shape, jnp.float32),
            "end_index": jnp.zeros(num_rows, jnp.int32),
        }
        if layer.has_positions:
            cache[name]["positions"] = jnp.zeros((num_rows, layer.slots), jnp.int32)
    return cache


def _weights():
    rng = np.random.default_rng(0)

    def make(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.5, jnp.float32)

    layers = {
        name: {"q": make(WIDTH, layer.heads, DIM), "kv": make(2, WIDTH, layer.heads, DIM)}
        for name, layer in LAYERS.items()
    }
    out = {name: make(layer.heads, DIM, WIDTH) for name, layer in LAYERS.items()}
    return {"embed": make(VOCAB, WIDTH), "places": make(256, WIDTH), "layers": layers, "out": out}


WEIGHTS = _weights()


def _visible(layer: Layer, row, position):
    """Which slots the newest token of a row may read; that token's own slot is written already."""
    end = row["end_index"]
    slots = jnp.arange(layer.slots)
    token = end - (end - slots) % layer.slots
    visible = token >= 0
    if layer.window and layer.has_positions:
        visible &= row["positions"] > position - layer.window
    elif layer.window:
        visible &= token > end - layer.window
    return visible


def _row_step(inputs):
    cache, token, position = inputs
    x = WEIGHTS["embed"][token] + WEIGHTS["places"][position]
    new_cache = {}
    for name, layer in LAYERS.items():
        row, weights = dict(cache[name]), WEIGHTS["layers"][name]
        slot = row["end_index"] % layer.slots
        query = jnp.einsum("w,whd->hd", x, weights["q"])
        keys, values = jnp.einsum("w,cwhd->chd", x, weights["kv"])
        row["k"], row["v"] = row["k"].at[slot].set(keys), row["v"].at[slot].set(values)
        if layer.has_positions:
            row["positions"] = row["positions"].at[slot].set(position)
        logits = jnp.einsum("hd,shd->hs", query, row["k"])
        scores = jax.nn.softmax(jnp.where(_visible(layer, row, position), logits, -1e30))
        x = x + jnp.einsum("hs,shd,hdw->w", scores, row["v"], WEIGHTS["out"][name])
        row["end_index"] = row["end_index"] + 1
        new_cache[name] = row
    return new_cache, x @ WEIGHTS["embed"].T


@partial(jax.jit, donate_argnums=0)
def step(cache, row, token, position):
    """One token of one row: the cache, in place, and the logits behind it."""
    of_row = jax.tree.map(lambda leaf: leaf[row], cache)
    of_row, logits = _row_step((of_row, token, position))
    return jax.tree.map(lambda leaf, new: leaf.at[row].set(new), cache, of_row), logits


@dataclass
class Batch:
    """A cache and what has been fed to it."""

    num_rows: int = 3
    cache: dict = field(init=False)

    def __post_init__(self):
        self.cache = init_cache(self.num_rows)

    def feed(self, row, tokens, first_position=0, after_token=lambda num_tokens: None):
        """Logits behind each token; ``after_token`` is told how many of these tokens the row holds."""
        logits = []
        for count, token in enumerate(tokens):
            self.cache, found = step(self.cache, row, token, first_position + count)
            logits.append(np.array(found))
            after_token(count + 1)
        return logits

    def begin(self, row):
        """Let a new request have ``row``, as samplers do: what the row held stays where it is."""
        for leaves in self.cache.values():
            leaves["end_index"] = leaves["end_index"].at[row].set(0)
