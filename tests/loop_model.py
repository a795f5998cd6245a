"""Requests of the loop that drives the connector, and what their tokens leave in the caches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from jaxkv.hash_chain import ChainRoot, HashChain
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

BLOCK, STATE_BLOCK, WINDOW = 4, 8, 10
LOCAL, SINKS = 12, 6


def hybrid_config(num_blocks: int = 64) -> KVCacheConfig:
    return make_config({"full": 2, "window": 1, "state": 1}, num_blocks)


def make_config(
    kinds: dict[str, int], num_blocks: int = 64, *, drafter: str = "", **options
) -> KVCacheConfig:
    """One group of so many layers for each of ``kinds``; that called ``drafter`` is a drafter's."""
    groups = []
    for kind, count in kinds.items():
        names = tuple(f"{kind}.{layer}" for layer in range(count))
        blocks = max(2, num_blocks // 4) if kind == "state" else num_blocks
        groups.append(KVCacheGroupSpec(names, _spec(kind), blocks, is_eagle_group=kind == drafter))
    return KVCacheConfig(tuple(groups), **options)


def _spec(kind: str):
    arguments = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": np.int64}
    page = {"page_size_bytes": BLOCK * 8}
    match kind:
        case "state":
            return MambaSpec(STATE_BLOCK, shapes=((2,),), dtypes=(np.int64,))
        case "window":
            return SlidingWindowSpec(**arguments, **page, sliding_window=WINDOW)
        case "sink":
            return SlidingWindowSpec(**arguments, **page, sliding_window=WINDOW, sink_len=SINKS)
        case "local":
            return ChunkedLocalAttentionSpec(**arguments, **page, attention_chunk_size=LOCAL)
        case "latent":
            return MLAAttentionSpec(BLOCK, 1, np.int64)
    return FullAttentionSpec(**arguments, **page)


def make_caches(config: KVCacheConfig) -> dict[str, np.ndarray]:
    caches = {}
    for group in config.groups:
        width = 2 if isinstance(group.spec, MambaSpec) else group.block_size
        for layer in group.layer_names:
            caches[layer] = np.full((group.num_blocks, width), -1, np.int64)
    return caches


def read_places(spec, position: int) -> list[int]:
    """Tokens before ``position`` that the token there reads, in layers that keep every token."""
    match spec:
        case SlidingWindowSpec(sliding_window=window, sink_len=sinks):
            return [p for p in range(position) if p < sinks or p > position - window]
        case ChunkedLocalAttentionSpec(attention_chunk_size=size):
            return list(range(position - position % size, position))
    return list(range(position))


@cache
def value_of(prefix: tuple[int, ...]) -> int:
    """What the last token of ``prefix`` leaves in every layer."""
    if not prefix:
        return 7
    parent = value_of(prefix[:-1])
    return (parent * 6364136223846793005 + prefix[-1] * 1442695040888963407 + 1) % (2**63)


@dataclass(eq=False)
class LoopRequest:
    request_id: str
    tokens: list[int]
    max_new_tokens: int = 1
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    chain: HashChain = field(default_factory=lambda: HashChain(ChainRoot("loop", BLOCK)))
    host_hits: list[int] = field(default_factory=list)
    tables: list[list[int | None]] = field(default_factory=list)
    kv_transfer_params: dict | None = None

    def __post_init__(self):
        self.num_prompt_tokens = len(self.tokens)
        self.extend_hashes()

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def token_ids(self) -> list[int]:
        return self.tokens

    @property
    def block_hashes(self) -> list:
        return self.chain.block_hashes

    @property
    def done(self) -> bool:
        return self.num_tokens - self.num_prompt_tokens >= self.max_new_tokens

    def extend_hashes(self) -> None:
        self.chain.extend(self.tokens[self.chain.num_tokens :])


def expected_output(tokens, max_new_tokens: int) -> list[int]:
    """What the model generates, whatever caches do."""
    known = list(tokens)
    for _ in range(max_new_tokens):
        known.append(value_of(tuple(known)) % 1000)
    return known[len(tokens) :]
