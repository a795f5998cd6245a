"""How a prompt is cut into steps: fixed program shapes, and where a step must stop. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, end)`` of a request, computed by a program that takes ``shape`` tokens."""

    start: int
    end: int
    shape: int

    @property
    def num_new(self) -> int:
        """Tokens that are computed."""
        return self.end - self.start


@final
@dataclass(frozen=True, slots=True)
class ChunkRules:
    """What limits a chunk.

    ``shapes`` ascend; ``block_size`` is the alignment of cache hits on the device, ``snapshot_interval`` that
    of hits the connector has; ``smallest_block`` divides every group's block size. With ``stop_at_blocks``
    (models with recurrent layers) a state can be reused only where a step ended, so a chunk ends on such a
    boundary whenever it reaches one, and one ends at the last boundary a later request can start from.
    """

    shapes: tuple[int, ...]
    block_size: int
    smallest_block: int
    stop_at_blocks: bool
    snapshot_interval: int = 1


def pick_shape(remaining: int, shapes: Sequence[int]) -> int:
    """The program shape for ``remaining`` tokens.

    The next larger shape if under a quarter of it is wasted, else the largest that is filled completely,
    else the smallest.
    """
    for shape in shapes:
        if shape >= remaining and 4 * (shape - remaining) < shape:
            return shape
    filled = [shape for shape in shapes if shape <= remaining]
    return max(filled, default=min(shapes))


def chunk_choices(
    rules: ChunkRules, start: int, num_tokens: int, budget: int, stops: Sequence[int] = ()
) -> Iterator[Chunk]:
    """Chunks that could be computed next, best first, then ever smaller ones for when blocks are short.

    With ``stop_at_blocks`` no chunk goes beyond one of ``stops``, further boundaries worth a snapshot.
    One remaining token is always a chunk of shape 1: it can join the decode batch.

        start          chunk.end        last boundary <= num_tokens - 1         num_tokens
          |---- chunk ----|------------------------|------------------------------|
    """
    if num_tokens - start == 1:
        yield Chunk(start, num_tokens, 1)
        return
    shapes = [shape for shape in rules.shapes if shape <= budget]
    if not shapes:
        return
    target = _next_stop(rules, start, num_tokens, stops)
    best = pick_shape(target - start, shapes)
    for shape in reversed([shape for shape in shapes if shape <= best]):
        yield Chunk(start, _round_end(rules, start, min(start + shape, target), target), shape)
    block_end = start - start % rules.smallest_block + rules.smallest_block
    yield Chunk(start, min(target, block_end, start + shapes[0]), shapes[0])


def _next_stop(rules: ChunkRules, start: int, num_tokens: int, stops: Sequence[int]) -> int:
    if not rules.stop_at_blocks:
        return num_tokens
    last_boundary = (num_tokens - 1) // rules.block_size * rules.block_size
    return min((stop for stop in (*stops, last_boundary) if start < stop < num_tokens), default=num_tokens)


def _round_end(rules: ChunkRules, start: int, end: int, target: int) -> int:
    """End a chunk that does not reach its target on a boundary, if it reaches one at all."""
    if not rules.stop_at_blocks or end >= target:
        return end
    for alignment in (rules.snapshot_interval, rules.block_size):
        boundary = end - end % alignment
        if alignment > 1 and boundary > start:
            return boundary
    return end
