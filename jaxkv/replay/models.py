"""Shapes of well-known models, for sizing and replay: what their layers cache, without their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
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
)

CacheGroups = tuple[tuple[tuple[str, ...], LayerSpec], ...]
"""Layer names and spec of each group, as ``divide_device_bytes`` takes them."""


@final
@dataclass(frozen=True, slots=True)
class ModelShape:
    """The caches of one model, and which published model they are those of."""

    name: str
    description: str
    make_groups: Callable[[int], CacheGroups]


def gemma_like(block_size: int) -> CacheGroups:
    """Gemma 3 12B: 8 full and 40 sliding layers, window 1,024, 8 KV heads of 256, bfloat16."""
    full = FullAttentionSpec(block_size, 8, 256, "bfloat16")
    sliding = SlidingWindowSpec(block_size, 8, 256, "bfloat16", sliding_window=1024)
    return ((_names("full", 8), full), (_names("sliding", 40), sliding))


def llama_like(block_size: int) -> CacheGroups:
    """Llama 3.1 8B: 32 full layers, 8 KV heads of 128, bfloat16."""
    return ((_names("full", 32), FullAttentionSpec(block_size, 8, 128, "bfloat16")),)


def bamba_like(block_size: int) -> CacheGroups:
    """Bamba 9B: 3 full layers and 29 Mamba-2 layers with a float32 state, a snapshot every 64 blocks."""
    full = FullAttentionSpec(block_size, 8, 128, "bfloat16")
    shapes = ((3, 8448), (128, 64, 128))
    state = MambaSpec(64 * block_size, shapes, ("bfloat16", "float32"))
    return ((_names("full", 3), full), (_names("state", 29), state))


MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("gemma-like", "8 full + 40 sliding layers, window 1,024 (Gemma 3 12B)", gemma_like),
        ModelShape("llama-like", "32 full layers (Llama 3.1 8B)", llama_like),
        ModelShape("bamba-like", "3 full + 29 recurrent layers (Bamba 9B)", bamba_like),
    )
}


def find_model_shape(name: str) -> ModelShape:
    """The shape called ``name``, or that of a function at a dotted path, which is given the block size.

    Raises ``ConfigError`` for a name that is neither.
    """
    if name in MODEL_SHAPES:
        return MODEL_SHAPES[name]
    module_name, _, function_name = name.rpartition(".")
    try:
        make_groups = getattr(import_module(module_name), function_name) if module_name else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import the model shape {name!r} ({error})") from error
    if not callable(make_groups):
        raise ConfigError(
            f"unknown model shape {name!r}; give one of {sorted(MODEL_SHAPES)}, or the dotted path of a "
            "function that answers layer names and spec of each group for a block size"
        )
    return ModelShape(name, "", make_groups)


def kind_of(spec: LayerSpec) -> str:
    """What tables call a kind of layer."""
    match spec:
        case FullAttentionSpec():
            return "full"
        case MLAAttentionSpec():
            return "MLA"
        case SlidingWindowSpec():
            return "sliding"
        case ChunkedLocalAttentionSpec():
            return "chunked"
        case MambaSpec():
            return "recurrent"
        case _:
            assert_never(spec)


def bytes_per_token(group: KVCacheGroupSpec) -> Fraction:
    """Bytes a group stores for one token, where every block is stored."""
    return Fraction(group.page_size_bytes, group.block_size)


def whole_prefix_groups(config: KVCacheConfig) -> tuple[KVCacheGroupSpec, ...]:
    """Groups that read every token of a prefix: full attention and MLA."""
    return tuple(
        group for group in config.groups if isinstance(group.spec, FullAttentionSpec | MLAAttentionSpec)
    )


def _names(kind: str, number: int) -> tuple[str, ...]:
    return tuple(f"{kind}.{index}" for index in range(number))
