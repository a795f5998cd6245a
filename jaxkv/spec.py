"""What each layer caches per block, and how layers form groups that share a block table.

Specs say how many bytes a block of one layer really holds; how those bytes lie in an array is the business
of ``jaxkv.layout``. Names and meaning follow ``vllm.v1.kv_cache_interface``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, assert_never, final

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkv.errors import ConfigError


def _require_positive(owner: object, **values: int) -> None:
    _require_at_least(1, owner, **values)


def _require_at_least(least: int, owner: object, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise ConfigError(
                f"{type(owner).__name__}.{name} must be an integer of at least {least}, got {value!r}"
            )


def dtype_bits(dtype: DTypeLike) -> int:
    """Bits one element takes in a stored array: types of 2 and 4 bits are packed, those of 6 take a byte.

    Raises ``ConfigError`` for what is not a dtype, and for integers of one bit, on which JAX runs no program.
    """
    try:
        known = np.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f"{dtype!r} is not a dtype; give one that jax.numpy knows") from error
    if dtype is None:
        raise ConfigError("a cache dtype of None would mean float64 to NumPy; name the dtype")
    return _known_bits(known)


@lru_cache
def _known_bits(known: np.dtype[Any]) -> int:
    if not jnp.issubdtype(known, jnp.integer) and not jnp.issubdtype(known, jnp.floating):
        return 8 * known.itemsize
    info: Any = jnp.iinfo if jnp.issubdtype(known, jnp.integer) else jnp.finfo
    bits = int(info(known).bits)
    if bits == 1:
        raise ConfigError(f"JAX runs no program on {known.name}; keep such values in a bool or uint8 array")
    return 8 if bits == 6 else bits


def _whole_bytes(num_elements: int, dtype: DTypeLike) -> int:
    bits = num_elements * dtype_bits(dtype)
    if bits % 8:
        raise ConfigError(
            f"{num_elements} elements of {np.dtype(dtype).name} are {bits} bits, not whole bytes; "
            "pad them to an even number"
        )
    return bits // 8


def _require_attention(spec: KeyValueSpec, **further: int) -> None:
    _require_positive(
        spec,
        block_size=spec.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size if spec.head_size_v is None else spec.head_size_v,
        **further,
    )
    _require_positive(spec, page_size_bytes=page_size_bytes(spec))


@final
@dataclass(frozen=True, slots=True)
class FullAttentionSpec:
    """K and V of every token: ``block_size`` tokens, ``num_kv_heads`` heads of ``head_size`` elements.

    ``head_size_v`` is the size of a V head where it differs from K's. ``page_size_bytes`` is what one block
    of one layer stores where that differs from K plus V (padding, scales, leaves of another dtype); ``None``
    means exactly K plus V.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: DTypeLike
    page_size_bytes: int | None = None
    head_size_v: int | None = None

    def __post_init__(self) -> None:
        _require_attention(self)


@final
@dataclass(frozen=True, slots=True)
class SlidingWindowSpec:
    """K and V of the last ``sliding_window`` tokens, the query's own token included.

    ``sink_len`` tokens at the start of a sequence (attention sinks) stay visible behind the window.
    """

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: DTypeLike
    sliding_window: int
    page_size_bytes: int | None = None
    head_size_v: int | None = None
    sink_len: int = 0

    def __post_init__(self) -> None:
        _require_attention(self, sliding_window=self.sliding_window)
        _require_at_least(0, self, sink_len=self.sink_len)


@final
@dataclass(frozen=True, slots=True)
class ChunkedLocalAttentionSpec:
    """K and V of the tokens since the last multiple of ``attention_chunk_size`` (Llama 4's local layers)."""

    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: DTypeLike
    attention_chunk_size: int
    page_size_bytes: int | None = None
    head_size_v: int | None = None

    def __post_init__(self) -> None:
        _require_attention(self, attention_chunk_size=self.attention_chunk_size)


@final
@dataclass(frozen=True, slots=True)
class MLAAttentionSpec:
    """One latent row of ``head_size`` elements for every token, shared by all heads (DeepSeek's MLA).

    ``page_size_bytes`` as for ``FullAttentionSpec``.
    """

    block_size: int
    head_size: int
    dtype: DTypeLike
    page_size_bytes: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, block_size=self.block_size, head_size=self.head_size)
        _require_positive(self, page_size_bytes=page_size_bytes(self))


@final
@dataclass(frozen=True, slots=True)
class MambaSpec:
    """A recurrent state, any tuple of ``shapes`` and ``dtypes``; one block is one snapshot of all of them.

    Mamba, RG-LRU, gated delta nets and short convolutions are all of this kind. ``block_size`` is the number
    of tokens between two snapshots that may be reused. ``page_size_padded`` is the width of the row the state
    lies in when it is wider than the state. ``num_speculative_blocks`` are further slots that a running
    request needs for drafted tokens; they are never offloaded.
    """

    block_size: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[DTypeLike, ...]
    page_size_padded: int | None = None
    num_speculative_blocks: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, block_size=self.block_size)
        _require_at_least(0, self, num_speculative_blocks=self.num_speculative_blocks)
        if not isinstance(self.shapes, tuple) or not all(isinstance(shape, tuple) for shape in self.shapes):
            raise ConfigError(f"MambaSpec.shapes must be a tuple of tuples, got {self.shapes!r}")
        if not self.shapes or len(self.shapes) != len(self.dtypes):
            raise ConfigError(
                f"MambaSpec needs one dtype for each state shape, got {len(self.shapes)} shapes "
                f"and {len(self.dtypes)} dtypes"
            )
        if not all(
            isinstance(size, int | np.integer) and size >= 1 for shape in self.shapes for size in shape
        ):
            raise ConfigError(
                f"every axis of a MambaSpec state must be a whole number of at least 1, got {self.shapes}"
            )
        state_bytes = page_size_bytes(self)
        if self.page_size_padded is None:
            return
        _require_positive(self, page_size_padded=self.page_size_padded)
        if self.page_size_padded < state_bytes:
            raise ConfigError(
                f"MambaSpec.page_size_padded is {self.page_size_padded}, "
                f"less than the state's {state_bytes} bytes"
            )


KeyValueSpec = FullAttentionSpec | SlidingWindowSpec | ChunkedLocalAttentionSpec
"""Attention with K and V of its own for every head."""

AttentionSpec = KeyValueSpec | MLAAttentionSpec
"""What is stored token by token."""

LayerSpec = AttentionSpec | MambaSpec


def page_size_bytes(spec: LayerSpec) -> int:
    """Bytes one layer stores in one block; padding around a recurrent state is not stored."""
    match spec:
        case FullAttentionSpec() | SlidingWindowSpec() | ChunkedLocalAttentionSpec():
            row = spec.head_size + (spec.head_size if spec.head_size_v is None else spec.head_size_v)
            implied = _whole_bytes(spec.block_size * spec.num_kv_heads * row, spec.dtype)
            return implied if spec.page_size_bytes is None else spec.page_size_bytes
        case MLAAttentionSpec():
            implied = _whole_bytes(spec.block_size * spec.head_size, spec.dtype)
            return implied if spec.page_size_bytes is None else spec.page_size_bytes
        case MambaSpec():
            return sum(
                _whole_bytes(math.prod(shape), dtype)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            )


def kind_name(spec: LayerSpec) -> str:
    """The kind of a layer as vLLM names it in metrics and events, such as ``"sliding_window"``."""
    match spec:
        case FullAttentionSpec():
            return "full_attention"
        case SlidingWindowSpec():
            return "sliding_window"
        case ChunkedLocalAttentionSpec():
            return "chunked_local_attention"
        case MLAAttentionSpec():
            return "mla_attention"
        case MambaSpec():
            return "mamba"
        case _:
            assert_never(spec)


@final
@dataclass(frozen=True, slots=True)
class KVCacheGroupSpec:
    """Layers that share one block table and one id space of ``num_blocks`` blocks.

    ``is_eagle_group`` marks the attention layers of an EAGLE or MTP drafter: what they cached for the last
    accepted token may still be rewritten while the request decodes.
    """

    layer_names: tuple[str, ...]
    spec: LayerSpec
    num_blocks: int
    is_eagle_group: bool = False

    def __post_init__(self) -> None:
        _require_positive(self, num_blocks=self.num_blocks)
        if not self.layer_names:
            raise ConfigError("a KVCacheGroupSpec needs at least one layer name")
        if len(set(self.layer_names)) != len(self.layer_names):
            raise ConfigError(f"a layer is named twice in one group: {self.layer_names}")

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.spec.block_size

    @property
    def page_size_bytes(self) -> int:
        """Bytes of one block over all layers of the group."""
        return len(self.layer_names) * page_size_bytes(self.spec)


@final
@dataclass(frozen=True, slots=True)
class KVCacheConfig:
    """All groups of one model, as vLLM's ``KVCacheConfig``, but with a block count per group.

    ``tokens_per_hash`` is the length of a link of the hash chain where it should be finer than blocks, so
    that the last, incomplete block of a prompt can be found again; ``None`` takes the longest that fits.
    """

    groups: tuple[KVCacheGroupSpec, ...]
    tokens_per_hash: int | None = None

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("a KVCacheConfig needs at least one group")
        common = math.gcd(*(group.block_size for group in self.groups))
        if self.tokens_per_hash is not None:
            _require_positive(self, tokens_per_hash=self.tokens_per_hash)
            if common % self.tokens_per_hash:
                raise ConfigError(
                    f"tokens_per_hash is {self.tokens_per_hash}, which does not divide the {common} tokens "
                    "that all block sizes are multiples of"
                )
        names = [name for group in self.groups for name in group.layer_names]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ConfigError(f"layers belong to more than one group: {doubled}; name each layer once")

    @property
    def hash_block_size(self) -> int:
        """Tokens per link of the hash chain: every group's block size is a multiple of it."""
        if self.tokens_per_hash is not None:
            return self.tokens_per_hash
        return math.gcd(*(group.block_size for group in self.groups))

    @property
    def alignment_tokens(self) -> int:
        """A cache hit ends at a multiple of this many tokens: a block boundary of every group."""
        return math.lcm(*(group.block_size for group in self.groups))
