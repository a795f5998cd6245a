"""Recurrent states, models that mix them with attention, and rows of bytes that layers share.

In shapes, N counts snapshots of a state; other letters as in ``jaxkv.testing.attention_cases``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkv.layout import LayoutHint
from jaxkv.spec import (
    FullAttentionSpec,
    LayerSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    page_size_bytes,
)
from jaxkv.testing.case_parts import CaseGroup, CaseLeaf, Sizes, Tree, leaf, make_case, own_leaves, split_leaf
from jaxkv.testing.page_oracle import LayoutCase, PageSlice

_NUM_STATES = 13
_STATE = MambaSpec(8, ((3, 7), (2, 4, 5)), (jnp.bfloat16, jnp.float32))
_STATE_BYTES = 3 * 7 * 2 + 2 * 4 * 5 * 4


def state_cases(sizes: Sizes) -> list[LayoutCase]:
    """Mamba, Mamba-2, gated delta nets, RG-LRU and short convolutions."""
    heads, bf16 = sizes.heads, jnp.bfloat16
    return [
        _state_case("mamba_two_dtypes", _mamba(), "mamba.0", "mamba.1"),
        _state_case("mamba_equal_axes", _state((4, _NUM_STATES), jnp.float32), "mamba.0"),
        _state_case(
            "mamba2_conv_by_channel",
            {"conv": _channels((2 * heads, 3), 1), "ssm": _heads((heads, 4, 5))},
            "mamba.0",
        ),
        _state_case(
            "gated_delta_net",
            {
                "conv_k": _channels((3, 2 * heads), 2),
                "conv_q": _channels((3, 2 * heads), 2),
                "conv_v": _channels((3, 4 * heads), 2),
                "state": _heads((heads, 2, 4)),
            },
            "gdn.0",
        ),
        _state_case("rg_lru", (_state((3, 2 * heads), bf16), _heads((2 * heads,))), "rec.0"),
        _state_case("short_convolution", _state((2, 9), bf16), "conv.0", "conv.1"),
        _hybrid(sizes),
    ]


def _state(shape: tuple[int, ...], dtype: DTypeLike) -> CaseLeaf:
    return leaf((_NUM_STATES, *shape), dtype)


def _channels(shape: tuple[int, ...], axis: int) -> CaseLeaf:
    """A conv state: its channels are those of several inputs, so a part of them is no part of one input."""
    return leaf((_NUM_STATES, *shape), jnp.bfloat16, PageSlice(0, split_axis=axis, lists_heads=False))


def _heads(shape: tuple[int, ...]) -> CaseLeaf:
    return split_leaf((_NUM_STATES, *shape), jnp.float32, 0, 1, says_heads=True)


def _mamba() -> dict[str, CaseLeaf]:
    shapes = dict(zip(("conv", "state"), zip(_STATE.shapes, _STATE.dtypes, strict=True), strict=True))
    return {name: _state(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _state_case(name: str, tree: Tree, *layers: str) -> LayoutCase:
    structs = [made.struct for made in jax.tree_util.tree_leaves(tree)]
    spec = MambaSpec(8, tuple(s.shape[1:] for s in structs), tuple(s.dtype for s in structs))
    return make_case(name, CaseGroup(spec, _NUM_STATES, own_leaves(tree, *layers)))


def _hybrid(sizes: Sizes) -> LayoutCase:
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    full = FullAttentionSpec(tokens, heads, size, jnp.bfloat16)
    window = SlidingWindowSpec(tokens, heads, size, jnp.bfloat16, sliding_window=9)
    separate = split_leaf((blocks, tokens, heads, size), jnp.bfloat16, 0, 2)
    split = split_leaf((2, 7, tokens, heads, size), jnp.bfloat16, 1, 3)
    return make_case(
        "hybrid",
        CaseGroup(full, blocks, own_leaves((separate, separate), "full.0", "full.1")),
        CaseGroup(window, 7, own_leaves([split], "window.0", "window.1", "window.2")),
        CaseGroup(_STATE, _NUM_STATES, own_leaves(_mamba(), "mamba.0")),
    )


def shared_cases(sizes: Sizes) -> list[LayoutCase]:
    """Several layers, of one group or of several, in one array."""
    blocks, tokens, heads, size = sizes.num_blocks, sizes.tokens, sizes.heads, sizes.head_size
    page = 2 * tokens * heads * size * 2
    packed = (0, page, 2 * page)
    spec = FullAttentionSpec(tokens, heads, size, jnp.bfloat16)
    return [
        _overlay(sizes),
        _packed_rows(sizes),
        _cut(
            "layers_in_one_block", spec, leaf((blocks, 3, tokens, 2 * heads, size), jnp.bfloat16), 0, packed
        ),
        _cut(
            "layers_outside_blocks", spec, leaf((3, blocks, tokens, 2 * heads, size), jnp.bfloat16), 1, packed
        ),
        _cut(
            "layers_outside_kv_axis", spec, leaf((3, 2, blocks, tokens, heads, size), jnp.bfloat16), 2, packed
        ),
        _cut("layers_in_padded_rows", spec, leaf((blocks, 2 * page + 64), jnp.uint8), 0, (24, page + 25)),
    ]


def _part(row: CaseLeaf, block_axis: int, start: int, num_bytes: int) -> CaseLeaf:
    """``num_bytes`` of every block of an array, from ``start`` on."""
    page = PageSlice(block_axis, start=start, stop=start + num_bytes)
    hint = LayoutHint(block_axis, page_offset_bytes=start, page_size_bytes=num_bytes)
    return CaseLeaf(row.struct, page, hint)


def _cut(
    name: str, spec: FullAttentionSpec, row: CaseLeaf, block_axis: int, starts: tuple[int, ...]
) -> LayoutCase:
    """Layers that each take one page of every block of one array, at their own offset."""
    page = page_size_bytes(spec)
    layers = {f"layers.{i}": _part(row, block_axis, start, page) for i, start in enumerate(starts)}
    return make_case(name, CaseGroup(spec, row.struct.shape[block_axis], layers))


def _overlay(sizes: Sizes) -> LayoutCase:
    """vLLM's hybrid memory: rows of bytes that an attention group and a state group both use."""
    num_blocks, attention = 9, FullAttentionSpec(sizes.tokens, 2, 8, jnp.bfloat16)
    row_bytes = 2 * sizes.tokens * 2 * 8 * 2
    state = MambaSpec(8, _STATE.shapes, _STATE.dtypes, page_size_padded=row_bytes)
    rows = [leaf((num_blocks, row_bytes), jnp.uint8) for _ in range(2)]
    states = [CaseLeaf(row.struct, PageSlice(0, stop=_STATE_BYTES), None) for row in rows]
    return make_case(
        "overlaid_rows",
        CaseGroup(attention, num_blocks, {f"attn.{i}": row for i, row in enumerate(rows)}),
        CaseGroup(state, num_blocks, {f"mamba.{i}": row for i, row in enumerate(states)}),
    )


def _packed_rows(sizes: Sizes) -> LayoutCase:
    """DeepSeek V4: rows of bytes with the pages of three layers and padding, and windows laid over them.

    Two rows, each with two compressed latent layers and the indexer of one; the windows use the start of
    the same rows for other blocks.
    """
    num_blocks, tokens = 9, sizes.tokens
    latent, indexer = MLAAttentionSpec(tokens, 33, jnp.uint8), MLAAttentionSpec(tokens, 12, jnp.uint8)
    window = SlidingWindowSpec(tokens, 1, 19, jnp.bfloat16, sliding_window=9)
    page, aligned = page_size_bytes(latent), -(-page_size_bytes(latent) // 16) * 16
    rows = [leaf((num_blocks, 2 * aligned + page_size_bytes(indexer) + 24), jnp.uint8) for _ in range(2)]
    starts = {f"latent.{2 * i + j}": (row, j * aligned) for i, row in enumerate(rows) for j in range(2)}
    return make_case(
        "packed_rows",
        CaseGroup(
            latent, num_blocks, {name: _part(row, 0, start, page) for name, (row, start) in starts.items()}
        ),
        _at_offset(indexer, num_blocks, "indexer", rows, 2 * aligned),
        _at_offset(window, num_blocks, "window", rows, 0),
    )


def _at_offset(spec: LayerSpec, num_blocks: int, name: str, rows: list[CaseLeaf], start: int) -> CaseGroup:
    """A group with one layer in each row, at one offset."""
    num_bytes = page_size_bytes(spec)
    layers = {f"{name}.{i}": _part(row, 0, start, num_bytes) for i, row in enumerate(rows)}
    return CaseGroup(spec, num_blocks, layers)
