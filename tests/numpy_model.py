"""A toy model of any layers, computed in NumPy: for fuzzing the serving loop without compiling anything.

As in ``toy_model`` arithmetic is exact and every logit depends on every cached value it should see. The paged
form and the oracle share nothing but the formulas of one token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from toy_model import VOCAB, embedding, toy_logits

from jaxkv.serving.programs import StepShape
from jaxkv.serving.sampling import SamplingBatch, sample
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

MASK = 0xFFFFFFFF
_sample = jax.jit(sample)


@dataclass(frozen=True)
class Layer:
    """One group of one layer: ``full``, ``window``, ``local`` (chunked), ``latent`` (MLA) or ``state``.

    ``size`` are the tokens of the window or of the attention chunk, ``sinks`` those visible behind a window.
    """

    kind: str
    block_size: int
    size: int | None = None
    sinks: int = 0

    @property
    def spec(self):
        attention = (self.block_size, 1, 1, np.uint32)
        if self.kind == "state":
            return MambaSpec(self.block_size, ((2,),), (np.uint32,))
        if self.kind == "latent":
            return MLAAttentionSpec(self.block_size, 1, np.uint32)
        if self.kind == "window":
            return SlidingWindowSpec(*attention, self.size, sink_len=self.sinks)
        if self.kind == "local":
            return ChunkedLocalAttentionSpec(*attention, self.size)
        return FullAttentionSpec(*attention)

    @property
    def page_shape(self):
        if self.kind == "state":
            return (2,)
        return (1 if self.kind == "latent" else 2, self.block_size)

    def visible(self, position):
        """Places the token at ``position`` reads, its own included, ascending."""
        if self.kind == "window":
            return [
                place for place in range(position + 1) if place < self.sinks or position - place < self.size
            ]
        return range(position - position % self.size if self.kind == "local" else 0, position + 1)


class HostLeaf(np.ndarray):
    """A NumPy cache leaf with the two methods the engine asks of a ``jax.Array``."""

    def is_deleted(self):
        return False

    def block_until_ready(self):
        return self


@dataclass(frozen=True)
class NumpyModel:
    """``on_device`` keeps the caches as ``jax.Array``s and deletes the old ones at every step."""

    layers: tuple[Layer, ...]
    max_model_len: int
    on_device: bool
    name: str = "numpy toy"
    vocab_size: int = VOCAB
    params: tuple = ()

    def cache_config(self, num_blocks):
        return KVCacheConfig(
            tuple(
                KVCacheGroupSpec((f"layer.{index}",), layer.spec, count)
                for index, (layer, count) in enumerate(zip(self.layers, num_blocks, strict=True))
            )
        )

    def init_caches(self, config):
        leaves = {
            group.layer_names[0]: np.full((group.num_blocks, *layer.page_shape), 0xDEADBEEF, np.uint32)
            for group, layer in zip(config.groups, self.layers, strict=True)
        }
        return {name: self.as_leaf(leaf) for name, leaf in leaves.items()}

    def as_leaf(self, array):
        return jnp.array(array, copy=True) if self.on_device else array.view(HostLeaf)


class NumpyPrograms:
    """Stands in for ``StepPrograms``. Reads what others wrote in the same call from before the call."""

    num_compilations = 0

    def __init__(self, model):
        self.model = model

    def __contains__(self, shape):
        return True

    def fill(self, shape: StepShape, kv_caches, batch):
        return self._step(kv_caches, batch)[1]

    def run(self, shape: StepShape, kv_caches, batch, sampling: SamplingBatch):
        hidden, caches = self._step(kv_caches, batch)
        logits = toy_logits(hidden, np)
        if np.any(sampling.temperature > 0):
            return np.asarray(_sample(logits, sampling)), logits, caches
        return np.argmax(logits, axis=-1).astype(np.int32), logits, caches

    def _step(self, kv_caches, batch):
        before = {name: np.array(leaf) for name, leaf in kv_caches.items()}
        after = {name: leaf.copy() for name, leaf in before.items()}
        last = np.zeros(len(batch.num_new), np.uint32)
        for row, count in enumerate(batch.num_new.tolist()):
            if not count:
                continue
            hidden = embedding()[batch.token_ids[row, :count]]
            start = int(batch.num_computed[row])
            for index, layer in enumerate(self.model.layers):
                name, table = f"layer.{index}", batch.block_tables[index][row]
                compute = _recur if layer.kind == "state" else _attend
                hidden = compute(layer, before[name], after[name], table, hidden, start)
            last[row] = hidden[-1]
        if not self.model.on_device:
            for name, leaf in after.items():
                kv_caches[name][...] = leaf
            return last, kv_caches
        caches = {name: self.model.as_leaf(leaf) for name, leaf in after.items()}
        for leaf in kv_caches.values():
            leaf.delete()
        return last, caches


def _recur(layer, before, after, table, hidden, start):
    assert (table[0] >= 0) == (start > 0), "a state is read exactly where there is one"
    first, second = (int(value) for value in before[table[0]]) if start else (0, 0)
    out = []
    for value in hidden.tolist():
        first, second = _next_state(first, second, value)
        out.append(value ^ first ^ second)
    after[table[1]] = (first, second)
    return np.array(out, np.uint32)


def _attend(layer, before, after, table, hidden, start):
    size, out = layer.block_size, []
    own = {}
    for position, value in enumerate(hidden.tolist(), start):
        own[position] = _cell(layer, value, position)
        block = table[position // size]
        assert block >= 0, f"no block for token {position}"
        after[block, :, position % size] = own[position]
        visible = layer.visible(position)
        old = np.array([place for place in visible if place < start], int)
        blocks = table[old // size]
        assert (blocks >= 0).all(), f"token {position} reads blocks that are not held: {blocks}"
        cells = before[blocks, :, old % size].astype(np.uint64)
        total = int((cells[:, 0] * _weight(position, old).astype(np.uint64) + cells[:, -1]).sum())
        total += _sum({place: own[place] for place in visible if place >= start}, position)
        out.append((value * 3 + total) & MASK)
    return np.array(out, np.uint32)


def _sum(cells, position):
    return sum(cell[0] * _weight(position, place) + cell[-1] for place, cell in cells.items())


def _weight(position, place):
    return (position - place) * 2 + 1


def _next_state(first, second, value):
    return (first * 31 + value) & MASK, second ^ ((value + first) & MASK)


def _cell(layer, hidden, position):
    """What a token leaves in the cache: key and value, or one latent row that is both."""
    cell = (hidden * 7 + position) & MASK, hidden ^ ((position * 11) & MASK)
    return cell[:1] if layer.kind == "latent" else cell


class Oracle:
    """One sequence without any cache: every token from all tokens before it."""

    def __init__(self, layers, tokens):
        self.layers = layers
        self.states = [(0, 0)] * len(layers)
        self.cells = [[] for _ in layers]
        self.tokens = []
        self.last = 0
        for token in tokens:
            self.push(token)

    def push(self, token):
        position = len(self.tokens)
        self.tokens.append(token)
        value = int(embedding()[token])
        for index, layer in enumerate(self.layers):
            if layer.kind == "state":
                self.states[index] = first, second = _next_state(*self.states[index], value)
                value ^= first ^ second
                continue
            cells = self.cells[index]
            cells.append(_cell(layer, value, position))
            read = {place: cells[place] for place in layer.visible(position)}
            value = (value * 3 + _sum(read, position)) & MASK
        self.last = value

    def next_token(self, params):
        logits = toy_logits(np.array([self.last], np.uint32), np)
        if params.temperature == 0:
            return int(np.argmax(logits))
        batch = SamplingBatch(
            np.array([params.temperature], np.float32),
            np.array([params.seed], np.uint32),
            np.array([len(self.tokens)], np.int32),
        )
        return int(_sample(logits, batch)[0])


def oracle_output(layers, prompt, params):
    """What a request of ``params`` generates, stop tokens included."""
    oracle, output = Oracle(layers, prompt), []
    while len(output) < params.max_new_tokens:
        output.append(oracle.next_token(params))
        if output[-1] in params.stop_token_ids:
            break
        oracle.push(output[-1])
    return tuple(output)
