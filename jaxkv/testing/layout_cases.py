"""The table of cache layouts that must round-trip byte for byte.

In shapes, P counts blocks, S tokens of a block, H kv heads, D elements of a head.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkv.layout import LayoutHint
from jaxkv.spec import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    LayerSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

P, S, H, D = 11, 4, 3, 5
"""Odd and all different, so that no axis passes for another and few runs are aligned."""

_DTYPES: tuple[DTypeLike, ...] = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.float8_e4m3fn)


def _leaf(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    struct: Any = jax.ShapeDtypeStruct  # jax does not annotate its constructor
    made: jax.ShapeDtypeStruct = struct(shape, dtype)
    return made


def _one_group(spec: LayerSpec, *layer_names: str, num_blocks: int = P) -> KVCacheConfig:
    return KVCacheConfig((KVCacheGroupSpec(layer_names, spec, num_blocks),))


def _attention(
    name: str, shapes: Any, pages: tuple[PageSlice, ...], dtype: DTypeLike = jnp.bfloat16
) -> LayoutCase:
    """Two layers of one layout, each with arrays of its own."""
    layers = ("layers.0", "layers.1")
    return LayoutCase(
        name=name,
        config=_one_group(FullAttentionSpec(S, H, D, dtype), *layers),
        shapes={
            layer: jax.tree_util.tree_map(lambda shape: _leaf(shape, dtype), shapes, is_leaf=_is_shape)
            for layer in layers
        },
        pages=dict.fromkeys(layers, pages),
    )


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(size, int) for size in node)


def _attention_cases() -> list[LayoutCase]:
    per_dtype = [
        _attention(
            f"separate_kv_{np.dtype(dtype).name}",
            ((P, S, H, D), (P, S, H, D)),
            (PageSlice(0), PageSlice(0)),
            dtype,
        )
        for dtype in _DTYPES
    ]
    return [
        *per_dtype,
        _attention("packed_kv", (P, S, 2 * H, D), (PageSlice(0),)),
        _attention("kv_axis_first", (2, P, S, H, D), (PageSlice(1),)),
        _attention("kv_axis_second", (P, 2, S, H, D), (PageSlice(0),)),
        _attention("kv_axis_second_heads_outside", (P, 2, H, S, D), (PageSlice(0),)),
        _attention("head_major", ((H, P, S, D), (H, P, S, D)), (PageSlice(1), PageSlice(1))),
        _attention("head_major_int8", [(H, P, S, D)] * 2, (PageSlice(1), PageSlice(1)), jnp.int8),
        _attention("dict_of_leaves", {"v": (P, S, H, D), "k": (H, P, S, D)}, (PageSlice(1), PageSlice(0))),
        _attention("block_axis_last", (S, 2 * H, D, P), (PageSlice(3),)),
    ]


def _one_block() -> LayoutCase:
    return LayoutCase(
        name="one_block",
        config=_one_group(FullAttentionSpec(S, H, D, jnp.bfloat16), "layers.0", num_blocks=1),
        shapes={"layers.0": _leaf((2, 1, S, H, D), jnp.bfloat16)},
        pages={"layers.0": (PageSlice(1),)},
    )


def _wide_pages() -> LayoutCase:
    return LayoutCase(
        name="wide_pages",
        config=_one_group(FullAttentionSpec(32, 8, 64, jnp.float32), "layers.0", "layers.1"),
        shapes={
            "layers.0": _leaf((P, 32, 16, 64), jnp.float32),
            "layers.1": _leaf((2, P, 32, 8, 64), jnp.float32),
        },
        pages={"layers.0": (PageSlice(0),), "layers.1": (PageSlice(1),)},
    )


def _kernel_blocks() -> LayoutCase:
    hint = LayoutHint(kernel_blocks_per_block=2)
    return LayoutCase(
        name="kernel_blocks",
        config=_one_group(FullAttentionSpec(S, H, D, jnp.bfloat16), "layers.0", "layers.1"),
        shapes={
            "layers.0": _leaf((2 * P, S // 2, 2 * H, D), jnp.bfloat16),
            "layers.1": (
                _leaf((H, 2 * P, S // 2, D), jnp.bfloat16),
                _leaf((H, 2 * P, S // 2, D), jnp.bfloat16),
            ),
        },
        pages={
            "layers.0": (PageSlice(0, entries=2),),
            "layers.1": (PageSlice(1, entries=2), PageSlice(1, entries=2)),
        },
        hints={"layers.0": hint, "layers.1": hint},
    )


_STATE = MambaSpec(8, ((3, 7), (2, 4, 5)), (jnp.bfloat16, jnp.float32))


def _mamba(num_blocks: int = 6) -> dict[str, Any]:
    return {
        "conv": _leaf((num_blocks, 3, 7), jnp.bfloat16),
        "state": _leaf((num_blocks, 2, 4, 5), jnp.float32),
    }


def _mamba_case() -> LayoutCase:
    layers = ("mamba.0", "mamba.1")
    return LayoutCase(
        name="mamba_two_dtypes",
        config=_one_group(_STATE, *layers, num_blocks=6),
        shapes={layer: _mamba() for layer in layers},
        pages=dict.fromkeys(layers, (PageSlice(0), PageSlice(0))),
    )


def _mamba_equal_axes() -> LayoutCase:
    """A state with an axis as long as the block axis; its spec tells them apart."""
    spec = MambaSpec(8, ((4, 6),), (jnp.float32,))
    return LayoutCase(
        name="mamba_equal_axes",
        config=_one_group(spec, "mamba.0", num_blocks=6),
        shapes={"mamba.0": _leaf((6, 4, 6), jnp.float32)},
        pages={"mamba.0": (PageSlice(0),)},
    )


def _hybrid() -> LayoutCase:
    full = FullAttentionSpec(S, H, D, jnp.bfloat16)
    window = SlidingWindowSpec(S, H, D, jnp.bfloat16, sliding_window=9)
    shapes: dict[str, Any] = {}
    pages: dict[str, tuple[PageSlice, ...]] = {}
    for layer in ("full.0", "full.1"):
        shapes[layer] = (_leaf((P, S, H, D), jnp.bfloat16), _leaf((P, S, H, D), jnp.bfloat16))
        pages[layer] = (PageSlice(0), PageSlice(0))
    for layer in ("window.0", "window.1", "window.2"):
        shapes[layer] = [_leaf((2, 7, S, H, D), jnp.bfloat16)]
        pages[layer] = (PageSlice(1),)
    shapes["mamba.0"] = _mamba()
    pages["mamba.0"] = (PageSlice(0), PageSlice(0))
    return LayoutCase(
        name="hybrid",
        config=KVCacheConfig(
            (
                KVCacheGroupSpec(("full.0", "full.1"), full, P),
                KVCacheGroupSpec(("window.0", "window.1", "window.2"), window, 7),
                KVCacheGroupSpec(("mamba.0",), _STATE, 6),
            )
        ),
        shapes=shapes,
        pages=pages,
    )


def _overlay() -> LayoutCase:
    """vLLM's hybrid memory: rows of bytes that an attention group and a state group both use."""
    attention = FullAttentionSpec(S, 2, 8, jnp.bfloat16)
    row_bytes = 2 * S * 2 * 8 * 2
    state_bytes = 3 * 7 * 2 + 2 * 4 * 5 * 4
    state = MambaSpec(8, _STATE.shapes, _STATE.dtypes, page_size_padded=row_bytes)
    rows = [_leaf((9, row_bytes), jnp.uint8) for _ in range(2)]
    return LayoutCase(
        name="overlaid_rows",
        config=KVCacheConfig(
            (
                KVCacheGroupSpec(("attn.0", "attn.1"), attention, 9),
                KVCacheGroupSpec(("mamba.0", "mamba.1"), state, 9),
            )
        ),
        shapes={"attn.0": rows[0], "attn.1": rows[1], "mamba.0": rows[0], "mamba.1": rows[1]},
        pages={
            "attn.0": (PageSlice(0),),
            "attn.1": (PageSlice(0),),
            "mamba.0": (PageSlice(0, stop=state_bytes),),
            "mamba.1": (PageSlice(0, stop=state_bytes),),
        },
    )


_PAGE_BYTES = 2 * S * H * D * 2


def _shared_leaf(
    name: str, leaf: jax.ShapeDtypeStruct, block_axis: int, offsets: tuple[int, ...]
) -> LayoutCase:
    """Layers that each take ``_PAGE_BYTES`` of every block of one leaf, at their own offset."""
    layers = tuple(f"layers.{index}" for index in range(len(offsets)))
    return LayoutCase(
        name=name,
        config=_one_group(FullAttentionSpec(S, H, D, jnp.bfloat16), *layers),
        shapes=dict.fromkeys(layers, leaf),
        pages={
            layer: (PageSlice(block_axis, start=start, stop=start + _PAGE_BYTES),)
            for layer, start in zip(layers, offsets, strict=True)
        },
        hints={
            layer: LayoutHint(block_axis, page_offset_bytes=start, page_size_bytes=_PAGE_BYTES)
            for layer, start in zip(layers, offsets, strict=True)
        },
    )


def _shared_leaf_cases() -> list[LayoutCase]:
    packed = (0, _PAGE_BYTES, 2 * _PAGE_BYTES)
    spaced = (24, 24 + _PAGE_BYTES + 1)
    return [
        _shared_leaf("layers_in_one_block", _leaf((P, 3, S, 2 * H, D), jnp.bfloat16), 0, packed),
        _shared_leaf("layers_outside_blocks", _leaf((3, P, S, 2 * H, D), jnp.bfloat16), 1, packed),
        _shared_leaf("layers_outside_kv_axis", _leaf((3, 2, P, S, H, D), jnp.bfloat16), 2, packed),
        _shared_leaf("layers_in_padded_rows", _leaf((P, 2 * _PAGE_BYTES + 64), jnp.uint8), 0, spaced),
    ]


LAYOUT_CASES: tuple[LayoutCase, ...] = (
    *_attention_cases(),
    _one_block(),
    _wide_pages(),
    _kernel_blocks(),
    _mamba_case(),
    _mamba_equal_axes(),
    _hybrid(),
    _overlay(),
    *_shared_leaf_cases(),
)


def layout_case(name: str) -> LayoutCase:
    """The case called ``name``; ``KeyError`` if there is none."""
    return {case.name: case for case in LAYOUT_CASES}[name]
