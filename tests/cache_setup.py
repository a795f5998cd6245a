"""What a run of the cache machine is made of: layers, pools, options and odds, drawn from a seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np
from cache_model import TOKEN_KINDS, Layer

from jaxkv.serving.sizing import blocks_to_serve
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

MAX_TOKENS = 96
"""The longest sequence."""
_MAX_ALIGNMENT = 24


@dataclass(frozen=True)
class Setup:
    """One run. ``host_chunks`` is how many of the largest chunks the host pool holds; odds are per event."""

    layers: tuple[Layer, ...]
    page_bytes: tuple[int, ...]
    num_blocks: tuple[int, ...]
    host_chunks: int
    blocks_per_chunk: int = 1
    prompt_only: bool = False
    max_seqs: int = 4
    max_step: int = 16
    max_drafts: int = 0
    tokens_per_hash: int | None = None
    retention_interval: int | None = None
    num_workers: int = 1
    policy: str = "lru"
    store_threshold: int = 0
    stop_at_blocks: bool = True
    finishes_first: bool = False
    wishes: bool = False
    land_odds: float = 1.0
    fail_odds: float = 0.0
    refuse_odds: float = 0.0
    retry_odds: float = 0.0
    emit_odds: float = 0.0
    break_odds: float = 0.0
    save_odds: float = 1.0
    unreported_odds: float = 0.0
    arrive_odds: float = 0.25
    event_odds: float = 0.05
    resets: bool = True

    def __post_init__(self) -> None:
        for layer in self.layers:
            assert layer.chunk == layer.block * self.blocks_per_chunk, f"{layer} is cut otherwise"

    @property
    def is_calm(self) -> bool:
        """Whether nothing is refused, forgotten or lost: then all that is computed can be served again."""
        return not (self.fail_odds or self.refuse_odds or self.retry_odds or self.has_more_trouble)

    @property
    def has_more_trouble(self) -> bool:
        """Whether chunks are forgotten, or stored for some requests alone."""
        return self.resets or self.wishes or self.store_threshold > 1 or self.unreported_odds > 0

    @property
    def config(self) -> KVCacheConfig:
        """The groups as jaxkv sees them: one layer each."""
        return KVCacheConfig(
            tuple(
                KVCacheGroupSpec(
                    (f"layer.{index}",), make_spec(layer, size), count, is_eagle_group=layer.draft
                )
                for index, (layer, size, count) in enumerate(
                    zip(self.layers, self.page_bytes, self.num_blocks, strict=True)
                )
            ),
            self.tokens_per_hash,
        )

    @property
    def alignment(self) -> int:
        """Tokens a host hit is a multiple of."""
        return math.lcm(*(layer.chunk for layer in self.layers))


def make_spec(layer: Layer, page_bytes: int) -> LayerSpec:
    """The spec of a layer whose pages count as ``page_bytes``, whatever the NumPy arrays hold."""
    attention = {"num_kv_heads": 1, "head_size": 1, "dtype": np.int64, "page_size_bytes": page_bytes}
    match layer.kind:
        case "full":
            return FullAttentionSpec(layer.block, **attention)
        case "latent":
            return MLAAttentionSpec(layer.block, 1, np.int64, page_size_bytes=page_bytes)
        case "window":
            return SlidingWindowSpec(
                layer.block, sliding_window=layer.size, sink_len=layer.sinks, **attention
            )
        case "local":
            return ChunkedLocalAttentionSpec(layer.block, attention_chunk_size=layer.size, **attention)
        case _:
            return MambaSpec(layer.block, ((page_bytes,),), (np.int8,))


def draw_setup(draw: Random) -> Setup:
    """Any setup in which a request of ``MAX_TOKENS`` can run."""
    size = draw.choice([1, 1, 2, 3])
    drafts = draw.choice([0, 0, 1, 3])
    layers = _draw_layers(draw, size)
    pages = tuple(draw.choice([100, 500, 700, 1600, 5000]) for _ in layers)
    spare = draw.choice([0, 4, 10, 30, 80])
    least = [
        blocks_to_serve(make_spec(layer, page), MAX_TOKENS + drafts, 1 + drafts)
        for layer, page in zip(layers, pages, strict=True)
    ]
    common = math.gcd(*(layer.block for layer in layers))
    alignment = math.lcm(*(layer.chunk for layer in layers))
    return Setup(
        layers=layers,
        page_bytes=pages,
        num_blocks=tuple(count + draw.randrange(spare + 1) for count in least),
        blocks_per_chunk=size,
        max_drafts=drafts,
        tokens_per_hash=draw.choice([None, None, *(n for n in range(1, common + 1) if common % n == 0)]),
        retention_interval=draw.choice([None, None, None, 0, alignment, 2 * alignment]),
        num_workers=draw.choice([1, 1, 1, 1, 2, 3]),
        policy=draw.choice(["lru", "arc"]),
        prompt_only=draw.random() < 0.4,
        max_seqs=draw.randrange(1, 6),
        max_step=draw.choice([3, 8, 16, 32]),
        stop_at_blocks=draw.random() < 0.8,
        finishes_first=draw.random() < 0.5,
        arrive_odds=draw.choice([0.05, 0.15, 0.4]),
        event_odds=draw.choice([0.02, 0.1]),
        emit_odds=draw.choice([0, 0.1]),
        land_odds=draw.choice([1.0, 1.0, 0.6, 0.3, 0.1]),
        save_odds=draw.choice([1.0, 1.0, 0.5, 0.0]),
        **_draw_trouble(draw),
    )


def _draw_trouble(draw: Random) -> dict[str, object]:
    """What may go wrong; nothing at all in one of four."""
    if draw.random() < 0.25:
        return {"host_chunks": draw.choice([12, 1000, 1000]), "resets": False}
    return {
        "host_chunks": draw.choice([1, 2, 5, 12, 40, 1000]),
        "fail_odds": draw.choice([0, 0, 0.1, 0.4]),
        "refuse_odds": draw.choice([0, 0, 0.1]),
        "retry_odds": draw.choice([0, 0, 0, 0.05]),
        "break_odds": draw.choice([0, 0, 0, 0.02]),
        "unreported_odds": draw.choice([0, 0, 0, 0.1, 0.4]),
        "wishes": draw.random() < 0.3,
        "store_threshold": draw.choice([0, 0, 0, 2, 3]),
    }


def _draw_layers(draw: Random, blocks_per_chunk: int) -> tuple[Layer, ...]:
    while True:
        count = draw.choice([1, 2, 2, 3])
        layers = tuple(_draw_layer(draw, blocks_per_chunk) for _ in range(count))
        if math.lcm(*(layer.chunk for layer in layers)) <= _MAX_ALIGNMENT:
            return layers


def _draw_layer(draw: Random, blocks_per_chunk: int) -> Layer:
    kind = draw.choice([*TOKEN_KINDS, "state", "state", "window"])
    block = draw.choice([2, 3, 4, 4, 6, 8])
    size = draw.randrange(1, 30) if kind in ("window", "local") else 0
    sinks = draw.randrange(1, 16) if kind == "window" and draw.random() < 0.4 else 0
    is_draft = kind != "state" and draw.random() < 0.15
    return Layer(kind, block, block * blocks_per_chunk, size, sinks, is_draft)
