"""What caches must hold, position by position, and how much of a prefix may be promised.

A reference model: it knows tokens, layers and which chunks were stored, but no block, no pool and no
transfer, and shares no code with jaxkv. A prefix is a number, given out once: two sequences begin with the
same ``n`` tokens exactly where their ``n``-th numbers are equal. What a token leaves behind in a layer is
made of the number of the prefix that ends with it, so that two prefixes never leave the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Ids = np.ndarray
"""(num_tokens,) int64, ascending: entry ``i`` is the number of the prefix of ``i + 1`` tokens."""

VALUES_PER_PREFIX = 32
"""Each prefix leaves values of its own: four for each of eight layers, of which shards add 0 to 3."""
KINDS = ("full", "latent", "window", "local", "state")
TOKEN_KINDS = ("full", "latent", "window", "local")


@dataclass(frozen=True)
class Layer:
    """One kind of layer and how its cache is cut: ``chunk`` tokens are stored together, whole blocks each.

    ``size`` is the window of a ``window`` layer, its own token included, or the attention chunk of a
    ``local`` one. ``sinks`` tokens at the start stay visible behind a window. What a ``draft`` layer leaves
    for a token depends on the next token too.
    """

    kind: str
    block: int
    chunk: int
    size: int = 0
    sinks: int = 0
    draft: bool = False

    def first_read(self, position: int) -> int:
        """The first of the tokens right before ``position`` that the token there reads; all from it on."""
        if self.kind == "window":
            return max(0, position - self.size + 1)
        if self.kind == "local":
            return position - position % self.size
        if self.kind == "state":
            return max(0, position - 1)
        return 0

    def first_reads(self, positions: Ids) -> Ids:
        """``first_read`` of many positions."""
        if self.kind == "window":
            return np.maximum(0, positions - self.size + 1)
        if self.kind == "local":
            return positions - positions % self.size
        if self.kind == "state":
            return np.maximum(0, positions - 1)
        return np.zeros_like(positions)


class Contents:
    """What the caches of one sequence hold when every token is computed: one array per layer.

    ``tokens[layer]`` (num_tokens,) is what each token leaves; for a state layer, what the state is once
    that token was taken in. ``blocks[layer]`` are the same as whole blocks (num_blocks, values of a block):
    a block of a state layer holds the state at its end and the length of that prefix.
    """

    __slots__ = ("blocks", "ids", "tokens")

    def __init__(self, layers: Sequence[Layer], ids: Ids) -> None:
        self.ids = ids
        self.tokens = []
        self.blocks = []
        for index, layer in enumerate(layers):
            values = ids * VALUES_PER_PREFIX + index * 4
            if layer.draft:
                values = np.append(values[1:], -1)
            self.tokens.append(values)
            whole = len(ids) // layer.block
            if layer.kind == "state":
                ends = np.arange(layer.block, whole * layer.block + 1, layer.block)
                self.blocks.append(np.stack([values[ends - 1], ends], axis=1))
            else:
                self.blocks.append(values[: whole * layer.block].reshape(whole, layer.block))


class CacheModel:
    """Hands out prefixes and remembers which chunks can be loaded, by the prefix that ends with them."""

    def __init__(self, layers: Sequence[Layer], alignment: int) -> None:
        self.layers = tuple(layers)
        self.alignment = alignment
        self._num_prefixes = 1
        self._loadable = [np.zeros(1024, bool) for _ in layers]
        self._ever_stored = [np.zeros(1024, bool) for _ in layers]

    # -- sequences --------------------------------------------------------------------------------------

    def extend(self, ids: Ids, num_new: int) -> Ids:
        """A sequence that goes on with ``num_new`` tokens which nobody has used there."""
        first = self._num_prefixes
        self._num_prefixes += num_new
        self._reserve()
        return np.concatenate([ids, np.arange(first, self._num_prefixes)])

    def _reserve(self) -> None:
        if self._num_prefixes > len(self._loadable[0]):
            for arrays in (self._loadable, self._ever_stored):
                arrays[:] = [np.concatenate([array, np.zeros_like(array)]) for array in arrays]

    # -- what was stored --------------------------------------------------------------------------------

    def stored(self, chunks: Iterable[tuple[int, int]]) -> None:
        """Chunks, each a layer and the prefix that ends with it, became loadable."""
        for layer, prefix in chunks:
            self._loadable[layer][prefix] = self._ever_stored[layer][prefix] = True

    def dropped(self, chunks: Iterable[tuple[int, int]]) -> None:
        """Chunks can no longer be loaded."""
        for layer, prefix in chunks:
            self._loadable[layer][prefix] = False

    def forget_all(self) -> None:
        """Nothing can be loaded any more."""
        for array in (*self._loadable, *self._ever_stored):
            array[:] = False

    def is_loadable(self, layer: int, ids: Ids, end: int) -> bool:
        """Whether all chunks of a layer up to ``end`` tokens can be loaded."""
        chunk = self.layers[layer].chunk
        return bool(self._loadable[layer][ids[chunk - 1 : end : chunk]].all())

    # -- what may be promised ---------------------------------------------------------------------------

    def longest_hit(self, ids: Ids, known: int, limit: int, *, ever: bool = False) -> int:
        """The longest prefix of at most ``limit`` tokens that can be served where ``known`` are there
        already.

        A boundary can be served where every layer has all that the next token reads and that lies behind
        ``known``. With ``ever`` chunks count that were loadable once and have been given up since.
        """
        first = known - known % self.alignment + self.alignment
        ends = np.arange(first, limit + 1, self.alignment)
        if not len(ends):
            return known
        served = np.ones(len(ends), bool)
        for index, layer in enumerate(self.layers):
            stored = (self._ever_stored if ever else self._loadable)[index]
            served &= _served(layer, stored[ids[layer.chunk - 1 : limit : layer.chunk]], known, ends)
        return int(ends[served][-1]) if served.any() else known


def _served(layer: Layer, chunks: np.ndarray, known: int, ends: Ids) -> np.ndarray:
    """At which of ``ends`` a layer can go on, given which of its chunks are there."""
    size = layer.chunk
    if layer.kind == "state":
        return chunks[ends // size - 1]
    missing_before = np.zeros(len(chunks) + 1, np.int64)
    np.cumsum(~chunks, out=missing_before[1:])
    first = np.minimum(np.maximum(layer.first_reads(ends), known), ends)
    served = missing_before[ends // size] == missing_before[first // size]
    if layer.sinks > known:
        sinks_end = np.minimum(layer.sinks, ends)
        served &= missing_before[-(-sinks_end // size)] == missing_before[known // size]
    return served
