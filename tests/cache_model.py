"""What caches must hold, position by position, and how much of a prefix may be promised.

A reference model: it knows tokens, layers and which chunks were stored, but no block, no pool and no
transfer, and shares no code with jaxkv. A prefix is a number, given out once: two sequences begin with the
same ``n`` tokens exactly where their ``n``-th numbers are equal. What a token leaves behind in a layer is
made of the number of the prefix that ends with it, so that two prefixes never leave the same.
"""

from __future__ import annotations

import math
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


Chunk = tuple[int, int]
"""A layer, and the prefix that names one of its chunks."""


@dataclass(frozen=True)
class Question:
    """How far can a sequence be served of which the device holds ``known`` tokens, up to ``limit`` tokens?

    ``num_hashed`` tokens have names. Prefix 0 names nothing and is never stored.
    """

    ids: Ids
    known: int
    limit: int
    num_hashed: int

    def names(self, ends: Ids, lookahead: int) -> Ids:
        """The prefixes that name the chunks with these ends; 0 for those that have no name yet."""
        ends = ends + lookahead
        if len(ends) and ends[-1] <= self.num_hashed:
            return self.ids[ends - 1]
        return np.where(ends <= self.num_hashed, self.ids[np.minimum(ends, len(self.ids)) - 1], 0)


class CacheModel:
    """Hands out prefixes and remembers which chunks can be loaded, by the prefix that names them.

    A chunk is named by the prefix that ends with it, that of a draft layer by the one that is
    ``tokens_per_hash`` tokens longer. The last chunk of a prompt may be stored cut short, at a multiple of
    ``tokens_per_hash``.
    """

    def __init__(self, layers: Sequence[Layer], tokens_per_hash: int) -> None:
        self.layers = tuple(layers)
        self.tokens_per_hash = tokens_per_hash
        self.alignment = math.lcm(*(layer.chunk for layer in layers))
        self._num_prefixes = 1
        self._computed = np.zeros(1024, bool)
        self._loadable, self._ever_stored, self._excused = (
            [np.zeros(1024, bool) for _ in layers] for _ in range(3)
        )

    # -- sequences --------------------------------------------------------------------------------------

    def extend(self, ids: Ids, num_new: int) -> Ids:
        """A sequence that goes on with ``num_new`` tokens which nobody has used there."""
        first = self._num_prefixes
        self._num_prefixes += num_new
        while self._num_prefixes > len(self._computed):
            self._computed = _twice(self._computed)
            for arrays in (self._loadable, self._ever_stored, self._excused):
                arrays[:] = [_twice(array) for array in arrays]
        return np.concatenate([ids, np.arange(first, self._num_prefixes)])

    def computed(self, prefixes: Ids) -> None:
        """Tokens were computed."""
        self._computed[prefixes] = True

    def was_computed(self, prefixes: Ids) -> bool:
        """Whether all of these tokens were computed by somebody; layers that forget may skip some."""
        return bool(self._computed[prefixes].all())

    def lookahead(self, layer: int) -> int:
        """How many tokens behind a chunk its name covers."""
        return self.tokens_per_hash if self.layers[layer].draft else 0

    # -- what was stored --------------------------------------------------------------------------------

    def stored(self, chunks: Iterable[Chunk]) -> None:
        """Chunks became loadable."""
        for layer, prefix in chunks:
            self._loadable[layer][prefix] = self._ever_stored[layer][prefix] = True

    def dropped(self, chunks: Iterable[Chunk]) -> None:
        """Chunks can no longer be loaded."""
        for layer, prefix in chunks:
            self._loadable[layer][prefix] = False
            self._excused[layer][prefix] = True

    def excused(self, chunks: Iterable[Chunk]) -> None:
        """Nobody is to blame if these chunks cannot be loaded."""
        for layer, prefix in chunks:
            self._excused[layer][prefix] = True

    def forget_all(self) -> None:
        """Nothing can be loaded any more, and what is known by now need not be stored again."""
        for array in (*self._loadable, *self._ever_stored):
            array[:] = False
        for array in self._excused:
            array[: self._num_prefixes] = True

    def missing(self, layer: int, ids: Ids, end: int, boundaries: Sequence[int] | None = None) -> list[Chunk]:
        """Whole chunks within ``end`` tokens that should have been stored by now and were not.

        What must be stored of a chunk is what is read where it ends; if that is nothing, or if not all of it
        was ever computed, the chunk is not expected. Nor is one that is read at none of ``boundaries``, by
        default all that are aligned, or a state: those are made only where a step happens to end.
        """
        spec, ahead = self.layers[layer], self.lookahead(layer)
        ends = np.arange(spec.chunk, end - ahead + 1, spec.chunk)
        if spec.kind == "state" or not len(ends):
            return []
        uncomputed_before = np.zeros(end + 1, np.int64)
        np.cumsum(~self._computed[ids[:end]], out=uncomputed_before[1:])
        starts = ends - spec.chunk
        firsts = np.where(starts < spec.sinks, starts, np.maximum(starts, spec.first_reads(ends)))
        expected = (firsts < ends) & (uncomputed_before[ends] == uncomputed_before[firsts])
        expected &= self._is_wanted(spec, starts, ends, boundaries)
        names = ids[ends + ahead - 1]
        lost = expected & ~(self._loadable[layer][names] | self._excused[layer][names])
        return [(layer, prefix) for prefix in names[lost].tolist()]

    def _is_wanted(self, spec: Layer, starts: Ids, ends: Ids, boundaries: Sequence[int] | None) -> np.ndarray:
        """Which chunks are read at one of the boundaries that lie behind them."""
        if boundaries is None:
            aligned = -(-ends // self.alignment) * self.alignment
            return (spec.first_reads(aligned) < ends) | (starts < spec.sinks)
        wanted = np.zeros(len(ends), bool)
        for boundary in boundaries:
            is_read = (spec.first_read(boundary) < ends) | (starts < spec.sinks)
            wanted |= is_read & (ends <= boundary)
        return wanted

    # -- what may be promised ---------------------------------------------------------------------------

    def longest_hit(self, question: Question, *, ever: bool = False) -> int:
        """The longest prefix that can be served: up to an aligned boundary, or a tail less than one further.

        With ``ever`` chunks count that were loadable once and have been given up since.
        """
        first = question.known - question.known % self.alignment + self.alignment
        best = self._last_served(question, np.arange(first, question.limit + 1, self.alignment), ever=ever)
        best = question.known if best is None else best
        step = self.tokens_per_hash
        if step == self.alignment:
            return best
        next_aligned = best - best % self.alignment + self.alignment
        tails = np.arange(best - best % step + step, min(question.limit + 1, next_aligned), step)
        tail = self._last_served(question, tails, ever=ever)
        return best if tail is None else tail

    def can_serve(self, question: Question, boundary: int) -> bool:
        """Whether all that the token at ``boundary`` reads can be loaded, or is known."""
        return self._last_served(question, np.array([boundary]), ever=False) is not None

    def _last_served(self, question: Question, ends: Ids, *, ever: bool) -> int | None:
        if not len(ends):
            return None
        served = np.ones(len(ends), bool)
        for index in range(len(self.layers)):
            served &= self._serves(index, question, ends, self._ever_stored if ever else self._loadable)
        return int(ends[served][-1]) if served.any() else None

    def _serves(self, index: int, question: Question, ends: Ids, stored: Sequence[np.ndarray]) -> np.ndarray:
        """At which of ``ends`` a layer can go on: all is there that the next token reads behind ``known``."""
        layer, size, known = self.layers[index], self.layers[index].chunk, question.known
        if layer.kind == "state":
            return stored[index][question.names(ends, 0)]
        whole = stored[index][question.names(np.arange(size, ends[-1] + 1, size), self.lookahead(index))]
        missing_before = np.zeros(len(whole) + 1, np.int64)
        np.logical_not(whole).cumsum(out=missing_before[1:])
        num_whole = ends // size
        is_cut = num_whole * size != ends
        first_read = layer.first_reads(ends)
        first = np.minimum(np.maximum(first_read, known) // size, num_whole)
        served = missing_before[num_whole] == missing_before[first]
        if layer.sinks > known:
            sinks_end = np.minimum(-(-layer.sinks // size), num_whole)
            served &= missing_before[sinks_end] == missing_before[np.minimum(known // size, sinks_end)]
        if is_cut.any():
            is_read = (first_read < ends) | (num_whole * size < layer.sinks)
            names = question.names(ends, self.lookahead(index))
            served &= ~(is_cut & is_read) | stored[index][names]
        return served


def _twice(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros_like(array)])
