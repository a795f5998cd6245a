"""Turns the scheduled parts of a step into the arrays of one program call. Copies rows, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_never, cast

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.serving.cache_manager import CacheManager
from jaxkv.serving.model import StepBatch
from jaxkv.serving.programs import StepShape
from jaxkv.serving.sampling import SamplingBatch
from jaxkv.serving.scheduler import ScheduledChunk
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


def make_step_batch(cache: CacheManager, parts: Sequence[ScheduledChunk], shape: StepShape) -> StepBatch:
    """The model's input for ``parts``, padded to ``shape``; NumPy arrays the call moves to the device."""
    token_ids = np.zeros((shape.rows, shape.tokens), np.int32)
    num_computed = np.zeros(shape.rows, np.int32)
    num_new = np.zeros(shape.rows, np.int32)
    for row, part in enumerate(parts):
        chunk = part.chunk
        token_ids[row, : chunk.num_new] = part.request.token_ids[chunk.start : chunk.end]
        num_computed[row] = chunk.start
        num_new[row] = chunk.num_new
    tables = tuple(_group_table(cache, group, parts, shape.rows) for group in range(len(cache.specs)))
    return StepBatch(
        _as_jax(token_ids), _as_jax(num_computed), _as_jax(num_new), tuple(_as_jax(table) for table in tables)
    )


def make_sampling_batch(parts: Sequence[ScheduledChunk], rows: int) -> SamplingBatch:
    """How each row's next token is chosen; padding rows are greedy."""
    temperature = np.zeros(rows, np.float32)
    seed = np.zeros(rows, np.uint32)
    position = np.zeros(rows, np.int32)
    for row, part in enumerate(parts):
        temperature[row] = part.request.params.temperature
        seed[row] = part.request.params.seed
        position[row] = part.chunk.end
    return SamplingBatch(_as_jax(temperature), _as_jax(seed), _as_jax(position))


def _group_table(
    cache: CacheManager, group: int, parts: Sequence[ScheduledChunk], rows: int
) -> npt.NDArray[np.int32]:
    spec = cache.specs[group]
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec() | ChunkedLocalAttentionSpec() | MLAAttentionSpec():
            table = np.full((rows, cache.max_blocks[group]), -1, np.int32)
            for row, part in enumerate(parts):
                table[row] = cache.row(part.request, group)
        case MambaSpec(block_size=block_size):
            table = np.full((rows, 2), -1, np.int32)
            for row, part in enumerate(parts):
                states = cache.row(part.request, group)
                if part.chunk.start:
                    table[row, 0] = states[(part.chunk.start - 1) // block_size]
                table[row, 1] = states[(part.chunk.end - 1) // block_size]
        case _:
            assert_never(spec)
    return table


def _as_jax(array: npt.NDArray[Any]) -> jax.Array:
    """A compiled program takes NumPy arrays as they are; an explicit transfer would only cost more."""
    return cast(jax.Array, array)
