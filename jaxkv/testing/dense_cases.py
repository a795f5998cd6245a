"""Dense caches of whole requests, whose blocks are stretches of each request's tokens.

In shapes, B counts requests, L tokens of one; other letters as in ``jaxkv.testing.attention_cases``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec
from jaxkv.testing.case_parts import (
    CaseGroup,
    CaseLeaf,
    Sizes,
    Tree,
    leaf,
    make_case,
    own_leaves,
    stored_bytes,
)
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

_NUM_REQUESTS = 2
_BLOCKS_PER_REQUEST = 7
_NUM_BLOCKS = _NUM_REQUESTS * _BLOCKS_PER_REQUEST


def dense_cases(sizes: Sizes) -> list[LayoutCase]:
    """gemma, tunix and MaxText: K and V with the axes of requests and tokens in every order."""
    tokens, heads, size = sizes.tokens, sizes.heads, sizes.head_size
    requests, length, bf16, int8 = _NUM_REQUESTS, _BLOCKS_PER_REQUEST * tokens, jnp.bfloat16, jnp.int8
    by_token = _dense((requests, length, heads, size), bf16, tokens, (0, 1), 2)
    by_head = _dense((requests, heads, length, size), bf16, tokens, (0, 2), 1)
    head_first = _dense((heads, requests, length, size), bf16, tokens, (1, 2), 0)
    request_inside = _dense((length, heads, requests, size), int8, tokens, (2, 0), 1)
    scale = _dense((length, 1, requests, 1), bf16, tokens, (2, 0), None)
    positions = _dense((requests, length), jnp.int32, tokens, (0, 1), None)
    return [
        _dense_case("dense_rows", sizes, (by_token, by_token)),
        _dense_case("dense_with_positions", sizes, {"k": by_token, "positions": positions, "v": by_token}),
        _dense_case("dense_heads_outside", sizes, (by_head, head_first)),
        _dense_case("dense_request_inside", sizes, (request_inside, request_inside), int8),
        _dense_case("dense_scales", sizes, [request_inside, scale, request_inside, scale, positions], int8),
        # Whole these are copied in two loops, a part of their heads in three.
        _dense_case(
            "dense_stacked_kv", sizes, _dense((2, length, heads, requests, size), bf16, tokens, (3, 1), 2)
        ),
        _dense_case(
            "dense_stacked_by_request",
            sizes,
            _dense((2, requests, 2, length, heads, size), bf16, tokens, (1, 3), 4),
        ),
        _dense_case(
            "dense_int4",
            sizes,
            _dense((2, length, requests, heads, 6), jnp.int4, tokens, (2, 1), 3),
            jnp.int4,
        ),
        _one_token_blocks(sizes),
    ]


def _dense(
    shape: tuple[int, ...], dtype: DTypeLike, tokens: int, block_axis: tuple[int, int], split_axis: int | None
) -> CaseLeaf:
    """An array with requests along the first of ``block_axis`` and their tokens along the second."""
    row_axis, axis = block_axis
    page = PageSlice(axis, entries=tokens, row_axis=row_axis, split_axis=split_axis)
    return leaf(shape, dtype, page, LayoutHint(block_axis, tokens, head_axis=split_axis))


def _dense_case(name: str, sizes: Sizes, tree: Tree, dtype: DTypeLike = jnp.bfloat16) -> LayoutCase:
    page_bytes = stored_bytes(tree, _NUM_BLOCKS)
    spec = FullAttentionSpec(sizes.tokens, sizes.heads, sizes.head_size, dtype, page_bytes)
    return make_case(name, CaseGroup(spec, _NUM_BLOCKS, own_leaves(tree, "layers.0")))


def _one_token_blocks(sizes: Sizes) -> LayoutCase:
    """Every entry of a request is a block of its own."""
    made = _dense((2, _NUM_REQUESTS, _BLOCKS_PER_REQUEST, sizes.heads, 4), jnp.float16, 1, (1, 2), 3)
    spec = FullAttentionSpec(1, sizes.heads, 4, jnp.float16)
    return make_case("dense_one_token_blocks", CaseGroup(spec, _NUM_BLOCKS, {"layers.0": made}))
