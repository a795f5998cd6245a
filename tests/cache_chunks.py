"""How much of a request a step of the cache machine computes: chunks, drafted tokens, emitted states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from cache_request import MachineRequest, Part
from cache_setup import Setup

from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.chunking import Chunk


class ChunkChooser:
    """Draws the chunks of steps. Takes blocks for emitted states, gives none back."""

    def __init__(self, setup: Setup, cache: CacheManager, draw: Random, counts: Counter) -> None:
        self._setup = setup
        self._cache = cache
        self._draw = draw
        self._counts = counts
        self._states = [group for group, layer in enumerate(setup.layers) if layer.kind == "state"]
        self._alignment = cache.config.alignment_tokens

    def choices(
        self, request: MachineRequest, start: int, stops: Sequence[int], max_drafts: int = 0
    ) -> Iterator[Chunk]:
        """Chunks to compute next, the wanted one first; the last one needs least."""
        known = request.num_tokens
        if known - start == 1:
            drafts = self._num_drafts(start, max_drafts)
            if drafts:
                yield Chunk(start, known + drafts, 1)
            yield Chunk(start, known, 1)
            return
        end = min(known, start + self._draw.randrange(1, self._setup.max_step + 1))
        if self._states and self._setup.stop_at_blocks:
            last = (known - 1) // self._alignment * self._alignment
            end = min([end, *(stop for stop in (last, *stops) if stop > start)])
            rounded = end // self._alignment * self._alignment
            if rounded > start and end not in stops:
                end = rounded
        yield Chunk(start, end, 1)
        yield Chunk(start, start + 1, 1)

    def _num_drafts(self, start: int, max_drafts: int) -> int:
        """Drafted tokens of a step. A state may end at any of them, so each needs a block that is held."""
        drafts = self._draw.randrange(max_drafts + 1)
        for group in self._states if drafts else ():
            block = self._setup.layers[group].block
            read, first = (start - 1) // block, start // block
            last = first if read < first else first + 1
            drafts = min(drafts, (last + 1) * block - 1 - start)
        return drafts

    def make_part(self, request: MachineRequest, chunk: Chunk) -> Part:
        """What comes of a chunk: how many drafts are accepted, which states are emitted."""
        drafts = max(0, chunk.end - request.num_tokens)
        kept = chunk.end
        if drafts:
            accepted = min(self._draw.randrange(drafts + 1), request.max_tokens - 1 - request.num_tokens)
            kept = request.num_tokens + accepted
            self._counts["drafts accepted"] += accepted
            self._counts["drafts rejected"] += drafts - accepted
        part = Part(request, chunk.start, chunk.end, kept, samples=kept >= request.num_tokens)
        if self._states and self._draw.random() < self._setup.emit_odds:
            self._emit(part)
        return part

    def _emit(self, part: Part) -> None:
        """Let the step leave its state at a boundary on its way, for as many groups as there is room for."""
        step = self._cache.config.hash_block_size
        boundaries = range(part.start - part.start % step + step, part.kept + 1, step)
        if not boundaries:
            return
        boundary = self._draw.choice(boundaries)
        for group in self._states:
            if self._cache.pools[group].num_free:
                part.emitted.append((group, self._cache.pools[group].allocate(), boundary))
                self._counts["states emitted"] += 1
