"""Paged attention with K and V of every head, as serving stacks lay it out.

In shapes, P counts blocks, S tokens of a block, H kv heads, D elements of a head, pk elements of 32 bits.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.layout import LayoutHint
from jaxkv.spec import ChunkedLocalAttentionSpec, FullAttentionSpec, SlidingWindowSpec, dtype_bits
from jaxkv.testing.case_parts import (
    CaseGroup,
    CaseLeaf,
    Sizes,
    Tree,
    leaf,
    make_case,
    own_leaves,
    split_leaf,
    stored_bytes,
)
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

LANES = 128
"""TPU kernels pad the last axis to a multiple of this."""


def attention_cases(sizes: Sizes) -> list[LayoutCase]:
    """Every way to lay out K and V, at the kernel's own block size and at a fraction of it."""
    return [
        *_plain_cases(sizes),
        _other_specs(sizes),
        _value_heads_of_another_size(sizes),
        _one_block(sizes),
        _wide_pages(sizes),
        *_ragged_paged_cases(sizes),
        *_kernel_block_cases(sizes),
    ]


def _attention(name: str, sizes: Sizes, tree: Tree) -> LayoutCase:
    """Two layers of one layout, each with arrays of its own."""
    spec = FullAttentionSpec(sizes.tokens, sizes.heads, sizes.head_size, jnp.bfloat16)
    return make_case(name, CaseGroup(spec, sizes.num_blocks, own_leaves(tree, "layers.0", "layers.1")))


def _plain_cases(sizes: Sizes) -> list[LayoutCase]:
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    bf16 = jnp.bfloat16
    separate = split_leaf((blocks, tokens, heads, size), bf16, 0, 2)
    head_major = split_leaf((heads, blocks, tokens, size), bf16, 1, 0)
    return [
        _attention("separate_kv", sizes, (separate, separate)),
        _attention(
            "packed_kv", sizes, split_leaf((blocks, tokens, 2 * heads, size), bf16, 0, 2, says_heads=True)
        ),
        _attention("kv_axis_first", sizes, split_leaf((2, blocks, tokens, heads, size), bf16, 1, 3)),
        _attention("kv_axis_second", sizes, split_leaf((blocks, 2, tokens, heads, size), bf16, 0, 3)),
        _attention(
            "kv_axis_second_heads_outside", sizes, split_leaf((blocks, 2, heads, tokens, size), bf16, 0, 2)
        ),
        _attention("head_major", sizes, (head_major, head_major)),
        _attention("dict_of_leaves", sizes, {"v": separate, "k": head_major}),
        _attention(
            "block_axis_last",
            sizes,
            split_leaf((tokens, 2 * heads, size, blocks), bf16, 3, 1, says_heads=True),
        ),
    ]


def _other_specs(sizes: Sizes) -> LayoutCase:
    """Groups of every other kind of attention, each with its own number of blocks."""
    tokens, heads, size = sizes.tokens, sizes.heads, sizes.head_size
    chunked = ChunkedLocalAttentionSpec(2 * tokens, heads, size, jnp.float16, attention_chunk_size=4 * tokens)
    window = SlidingWindowSpec(tokens, heads, size, jnp.bfloat16, sliding_window=9, sink_len=tokens)
    packed = split_leaf((9, 2 * tokens, 2 * heads, size), jnp.float16, 0, 2, says_heads=True)
    split = split_leaf((2, 7, tokens, heads, size), jnp.bfloat16, 1, 3)
    return make_case(
        "chunked_local_and_sinks",
        CaseGroup(chunked, 9, own_leaves(packed, "chunked.0")),
        CaseGroup(window, 7, own_leaves([split], "window.0", "window.1")),
    )


def _value_heads_of_another_size(sizes: Sizes) -> LayoutCase:
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    spec = FullAttentionSpec(tokens, heads, size, jnp.bfloat16, head_size_v=size + 2)
    k, v = (
        split_leaf((blocks, tokens, heads, width), jnp.bfloat16, 0, 2, says_heads=True)
        for width in (size, size + 2)
    )
    return make_case("value_heads_of_another_size", CaseGroup(spec, blocks, own_leaves((k, v), "layers.0")))


def _one_block(sizes: Sizes) -> LayoutCase:
    tokens, heads, size = sizes.tokens, sizes.heads, sizes.head_size
    tree = split_leaf((2, 1, tokens, heads, size), jnp.bfloat16, 1, 3, says_heads=True)
    spec = FullAttentionSpec(tokens, heads, size, jnp.bfloat16)
    return make_case("one_block", CaseGroup(spec, 1, {"layers.0": tree}))


def _wide_pages(sizes: Sizes) -> LayoutCase:
    """Pages large enough that their copy is shared out to threads."""
    blocks, spec = sizes.num_blocks, FullAttentionSpec(32, 8, 64, jnp.float32)
    layers = {
        "layers.0": split_leaf((blocks, 32, 16, 64), jnp.float32, 0, 2, says_heads=True),
        "layers.1": split_leaf((2, blocks, 32, 8, 64), jnp.float32, 1, 3),
    }
    return make_case("wide_pages", CaseGroup(spec, blocks, layers))


def _ragged_paged_cases(sizes: Sizes) -> list[LayoutCase]:
    """JAX's ragged paged attention v3: words of 32 bits, lanes of 128 elements, padding around both."""
    return [
        _ragged_paged("rpa_v3_bfloat16", sizes, jnp.bfloat16),
        _ragged_paged("rpa_v3_float8", sizes, jnp.float8_e4m3fn),
        _half_lane_heads(sizes),
        _sequence_on_lanes(sizes),
    ]


def _ragged_paged(name: str, sizes: Sizes, dtype: DTypeLike) -> LayoutCase:
    """``[P, S, ceil(2 H / pk), pk, align128(D)]``: K and V of a head side by side."""
    word = 32 // dtype_bits(dtype)
    blocks, tokens, size = sizes.num_blocks, sizes.tokens, -(-sizes.head_size // LANES) * LANES
    shape = (blocks, tokens, -(-2 * sizes.heads // word), word, size)
    made = split_leaf(shape, dtype, 0, 2, says_heads=shape[2] != sizes.heads)
    spec = FullAttentionSpec(tokens, sizes.heads, sizes.head_size, dtype, stored_bytes(made, blocks))
    return make_case(name, CaseGroup(spec, blocks, {"layers.0": made}))


def _half_lane_heads(sizes: Sizes) -> LayoutCase:
    """``[P, S, ceil(H / pk), pk, 128]``: K and V of a head of 64 side by side on the lanes."""
    dtype, blocks, tokens = jnp.bfloat16, sizes.num_blocks, sizes.tokens
    shape = (blocks, tokens, -(-sizes.heads // 2), 2, LANES)
    made = split_leaf(shape, dtype, 0, 2, says_heads=True)
    spec = FullAttentionSpec(tokens, sizes.heads, LANES // 2, dtype, stored_bytes(made, blocks))
    return make_case("rpa_head_size_64", CaseGroup(spec, blocks, {"layers.0": made}))


def _sequence_on_lanes(sizes: Sizes) -> LayoutCase:
    """``[P, 2 H, D / pk, pk, S]``."""
    dtype, blocks, tokens = jnp.bfloat16, sizes.num_blocks, sizes.tokens
    shape = (blocks, 2 * sizes.heads, sizes.head_size, 2, tokens)
    spec = FullAttentionSpec(tokens, sizes.heads, 2 * sizes.head_size, dtype)
    made = split_leaf(shape, dtype, 0, 1, says_heads=True)
    return make_case("rpa_sequence_on_lanes", CaseGroup(spec, blocks, {"layers.0": made}))


def _kernel_block_cases(sizes: Sizes) -> list[LayoutCase]:
    """Kernels whose blocks are half, or a quarter, of the scheduler's."""
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    half, quarter = tokens // 2, tokens // 4
    spec = FullAttentionSpec(tokens, heads, size, jnp.bfloat16)
    head_major = _in_kernel_blocks((heads, 2 * blocks, half, size), 1, 0, 2)
    plain = {
        "layers.0": _in_kernel_blocks((2 * blocks, half, 2 * heads, size), 0, 2, 2),
        "layers.1": tuple(own_leaves(head_major, "k", "v").values()),
    }
    split = {
        "layers.0": _in_kernel_blocks((2, 4 * blocks, quarter, heads, size), 1, 3, 4),
        "layers.1": _in_kernel_blocks((2 * blocks, 2, half, heads, size), 0, 3, 2),
        "layers.2": _in_kernel_blocks((2 * blocks, 2, heads, half, size), 0, 2, 2),
        "layers.3": _in_kernel_blocks((half, 2 * heads, size, 2 * blocks), 3, 1, 2),
    }
    return [
        make_case("kernel_blocks", CaseGroup(spec, blocks, plain)),
        make_case("kernel_blocks_of_split_kv", CaseGroup(spec, blocks, split)),
    ]


def _in_kernel_blocks(shape: tuple[int, ...], block_axis: int, split_axis: int, per_block: int) -> CaseLeaf:
    page = PageSlice(block_axis, entries=per_block, split_axis=split_axis)
    hint = LayoutHint(block_axis, kernel_blocks_per_block=per_block, head_axis=split_axis)
    return leaf(shape, jnp.bfloat16, page, hint)
