"""How many blocks a request needs, and how a budget of device bytes becomes block counts. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never, final

from jaxkv.errors import ConfigError
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    page_size_bytes,
)

DEFAULT_PREFILL_SHAPES = (32, 128, 512)
"""Tokens of the prefill programs."""

_SCALE_STEPS = 1024


def ceil_div(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens`` tokens."""
    return -(-tokens // block_size)


def blocks_to_serve(spec: LayerSpec, num_tokens: int, chunk_tokens: int) -> int:
    """Blocks of one group with which a request of ``num_tokens`` runs, ``chunk_tokens`` of prefill a step.

    Full attention and MLA hold every token; a sliding window its sinks, the tokens before a step and those
    of it; chunked local attention an attention chunk and a step that begins with its last token; a
    recurrent layer the state that is read, the one that is written and those of drafted tokens.
    """
    block_size = spec.block_size
    whole = ceil_div(num_tokens, block_size)
    match spec:
        case FullAttentionSpec() | MLAAttentionSpec():
            return whole
        case SlidingWindowSpec(sliding_window=window, sink_len=sinks):
            parts = (sinks, window - 1, chunk_tokens)
            return min(whole, sum(ceil_div(tokens, block_size) for tokens in parts))
        case ChunkedLocalAttentionSpec(attention_chunk_size=size):
            # An attention chunk may begin within a block, this many tokens behind its start at most.
            offset = block_size - math.gcd(size, block_size)
            return min(whole, ceil_div(offset + size - 1 + chunk_tokens, block_size))
        case MambaSpec(num_speculative_blocks=num_speculative):
            return min(whole, 2) + num_speculative
        case _:
            assert_never(spec)


@final
@dataclass(frozen=True, slots=True)
class _GroupNeed:
    page_bytes: int
    least: int
    wanted: int

    def count(self, scale: int) -> int:
        return max(self.least, self.wanted * scale // _SCALE_STEPS)


def divide_device_bytes(
    cache_groups: Sequence[tuple[tuple[str, ...], LayerSpec]],
    total_bytes: int,
    max_tokens: int,
    prefill_shapes: Sequence[int] = DEFAULT_PREFILL_SHAPES,
) -> KVCacheConfig:
    """Block counts whose pages together take at most ``total_bytes``.

    ``max_tokens`` is the longest request, prompt and new tokens. Every group gets what such a request cannot
    do without; the rest is divided in proportion to what a request would like: room for the largest prefill
    shape and, for recurrent layers, one state for each such chunk. Raises ``ConfigError`` that names
    the bytes that would suffice.
    """
    if max_tokens < 1 or not prefill_shapes or min(prefill_shapes) < 1:
        raise ConfigError(
            f"max_tokens and prefill shapes must be at least 1, got {max_tokens} and {tuple(prefill_shapes)}"
        )
    needs = [_group_need(names, spec, max_tokens, prefill_shapes) for names, spec in cache_groups]
    if _total(needs, 0) > total_bytes:
        parts = ", ".join(
            f"{need.least} x {need.page_bytes} bytes for {type(spec).__name__}"
            for need, (_, spec) in zip(needs, cache_groups, strict=True)
        )
        raise ConfigError(
            f"{total_bytes} device bytes cannot serve a request of {max_tokens} tokens; "
            f"{_total(needs, 0)} bytes would suffice ({parts})"
        )
    scale = _largest_scale(needs, total_bytes)
    return KVCacheConfig(
        tuple(
            KVCacheGroupSpec(names, spec, need.count(scale))
            for need, (names, spec) in zip(needs, cache_groups, strict=True)
        )
    )


def _group_need(
    names: tuple[str, ...], spec: LayerSpec, max_tokens: int, prefill_shapes: Sequence[int]
) -> _GroupNeed:
    least = blocks_to_serve(spec, max_tokens, min(prefill_shapes))
    wanted = blocks_to_serve(spec, max_tokens, max(prefill_shapes))
    if isinstance(spec, MambaSpec):
        wanted += ceil_div(max_tokens, max(prefill_shapes))
    return _GroupNeed(len(names) * page_size_bytes(spec), least, wanted)


def _total(needs: Sequence[_GroupNeed], scale: int) -> int:
    return sum(need.page_bytes * need.count(scale) for need in needs)


def _largest_scale(needs: Sequence[_GroupNeed], total_bytes: int) -> int:
    low, high = 0, _SCALE_STEPS
    while _total(needs, high) <= total_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _total(needs, middle) <= total_bytes else (low, middle)
    return low
