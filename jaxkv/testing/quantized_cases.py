"""Latent attention, and caches of quantized values with scales beside them.

Letters as in ``jaxkv.testing.attention_cases``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.spec import FullAttentionSpec, MLAAttentionSpec
from jaxkv.testing.attention_cases import LANES
from jaxkv.testing.case_parts import (
    CaseGroup,
    Sizes,
    Tree,
    leaf,
    make_case,
    own_leaves,
    split_leaf,
    stored_bytes,
)
from jaxkv.testing.page_oracle import LayoutCase

LATENT_ROW_BYTES = 656
"""A token of DeepSeek V3.2: 512 float8 values, 4 float32 scales, 64 bfloat16 values of rotary position."""
INDEXER_ROW_BYTES = 132
"""A token of its indexer: 128 float8 values and a float32 scale."""


def latent_cases(sizes: Sizes) -> list[LayoutCase]:
    """DeepSeek's MLA: one row a token, which every device holds whole."""
    blocks, tokens = sizes.num_blocks, sizes.tokens
    row = 16 + 3  # rank of the latent, and rotary position
    plain = leaf((blocks, tokens, row), jnp.bfloat16)
    in_words = leaf((blocks, -(-tokens // 2), 2, LANES), jnp.bfloat16)
    float8 = leaf((blocks, tokens, LATENT_ROW_BYTES), jnp.uint8)
    indexer = leaf((blocks - 1, tokens, INDEXER_ROW_BYTES), jnp.uint8)
    padded = MLAAttentionSpec(tokens, row, jnp.bfloat16, stored_bytes(in_words, blocks))
    scaled = MLAAttentionSpec(tokens, 576, jnp.float8_e4m3fn, stored_bytes(float8, blocks))
    return [
        make_case(
            "mla", CaseGroup(MLAAttentionSpec(tokens, row, jnp.bfloat16), blocks, own_leaves(plain, "mla.0"))
        ),
        make_case("mla_v2", CaseGroup(padded, blocks, own_leaves(in_words, "mla.0", "mla.1"))),
        make_case(
            "mla_float8_with_indexer",
            CaseGroup(scaled, blocks, {"mla.0": float8}),
            CaseGroup(
                MLAAttentionSpec(tokens, INDEXER_ROW_BYTES, jnp.uint8), blocks - 1, {"indexer.0": indexer}
            ),
        ),
    ]


def quantized_cases(sizes: Sizes) -> list[LayoutCase]:
    """K and V of few bits, packed by XLA or by the model, and their scales."""
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    int8 = split_leaf((heads, blocks, tokens, size), jnp.int8, 1, 0)
    scales = {dtype: split_leaf((heads, blocks, tokens), dtype, 1, 0) for dtype in ("float32", "bfloat16")}
    return [
        _quantized("head_major_int8", sizes, jnp.int8, [int8, int8]),
        *(
            _quantized(f"head_major_int8_scales_{dtype}", sizes, jnp.int8, [int8, int8, scale, scale])
            for dtype, scale in scales.items()
        ),
        *(
            _quantized(f"codes_scales_{dtype}", sizes, jnp.uint8, _codes_and_scales(sizes, dtype))
            for dtype in ("float8_e4m3fn", "bfloat16")
        ),
        *(
            _quantized(f"float4_scales_{dtype}", sizes, jnp.float4_e2m1fn, _float4_and_scales(sizes, dtype))
            for dtype in ("float8_e4m3fn", "float8_e8m0fnu")
        ),
        _quantized("turboquant", sizes, jnp.uint8, _turboquant(sizes)),
    ]


def _quantized(name: str, sizes: Sizes, dtype: DTypeLike, tree: Tree) -> LayoutCase:
    page_bytes = stored_bytes(tree, sizes.num_blocks)
    spec = FullAttentionSpec(sizes.tokens, sizes.heads, sizes.head_size, dtype, page_bytes)
    return make_case(name, CaseGroup(spec, sizes.num_blocks, own_leaves(tree, "layers.0")))


def _codes_and_scales(sizes: Sizes, scale: DTypeLike) -> Tree:
    """Two 4-bit values a byte, packed by the model, and a scale for every head of a token."""
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    codes = split_leaf((blocks, tokens, heads, size), jnp.uint8, 0, 2)
    scales = split_leaf((blocks, tokens, heads), scale, 0, 2)
    return {"k": codes, "k_scale": scales, "v": codes, "v_scale": scales}


def _float4_and_scales(sizes: Sizes, scale: DTypeLike) -> Tree:
    """nvfp4 and mxfp4: a scale for each 16 values, K and V packed in one array of 4-bit floats."""
    blocks, tokens, heads = sizes.num_blocks, sizes.tokens, sizes.heads
    return (
        split_leaf((blocks, tokens, 2 * heads, 32), jnp.float4_e2m1fn, 0, 2, says_heads=True),
        split_leaf((blocks, tokens, 2 * heads, 2), scale, 0, 2, says_heads=True),
    )


def _turboquant(sizes: Sizes) -> Tree:
    """EasyDeL's five arrays a layer: codes and norms of K and V, and signs of what the codes of K leave."""
    blocks, tokens, heads = sizes.num_blocks, sizes.tokens, sizes.heads
    head_size = 24
    return {
        "key_indices": split_leaf((blocks, tokens, heads, head_size // 2), jnp.uint8, 0, 2),
        "key_norms": split_leaf((blocks, tokens, heads, 2), jnp.bfloat16, 0, 2),
        "key_signs": split_leaf((blocks, tokens, heads, head_size // 8), jnp.uint8, 0, 2),
        "value_indices": split_leaf((blocks, tokens, heads, head_size // 2), jnp.uint8, 0, 2),
        "value_norms": split_leaf((blocks, tokens, heads), jnp.bfloat16, 0, 2),
    }
