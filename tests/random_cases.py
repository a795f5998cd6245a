"""Hypothesis strategies for caches of every kind: random specs, shapes, hints and shared arrays."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxkv.layout import LayoutHint
from jaxkv.spec import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    page_size_bytes,
)
from jaxkv.testing import PageSlice
from jaxkv.testing.case_parts import CaseGroup, CaseLeaf, leaf, make_case, stored_bytes

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.int4)
TOKENS = 4


@st.composite
def blocked_leaf(draw, page_axes, num_blocks, dtype):
    """An array of blocks of ``TOKENS`` times ``page_axes`` in any order: plain, in kernel blocks or in rows.

    Runs are whole bytes as long as the last of ``page_axes``, which is even, stays last.
    """
    kind = draw(st.sampled_from(["plain", "kernel", "rows"]))
    rows = draw(st.sampled_from([n for n in range(1, num_blocks + 1) if num_blocks % n == 0]))
    per_block = {"plain": 1, "kernel": draw(st.sampled_from([2, 4])), "rows": TOKENS}[kind]
    sizes = {"entry": num_blocks // rows * per_block if kind == "rows" else num_blocks * per_block}
    sizes |= {"row": rows} if kind == "rows" else {}
    tokens = [] if kind == "rows" else [TOKENS // per_block]
    order = [*draw(st.permutations([*sizes, *tokens, *page_axes[:-1]])), page_axes[-1]]
    shape = tuple(sizes.get(size, size) for size in order)
    axis, row_axis = order.index("entry"), order.index("row") if kind == "rows" else None
    page = PageSlice(axis, per_block, row_axis=row_axis)
    can_find = kind != "rows" and shape.count(sizes["entry"]) == 1
    named = axis if row_axis is None else (row_axis, axis)
    hint = LayoutHint("auto" if can_find and draw(st.booleans()) else named, per_block)
    return leaf(shape, dtype, page, hint)


@st.composite
def key_value_groups(draw, index):
    """Layers of one kind of attention, with K and V in one array or two, or with raw bytes."""
    heads, size, num_blocks = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)), draw(st.integers(1, 6))
    size_v = draw(st.sampled_from([None, size + 2]))
    dtype = draw(st.sampled_from(DTYPES))
    make = draw(
        st.sampled_from(
            [
                FullAttentionSpec,
                partial(SlidingWindowSpec, sliding_window=9, sink_len=1),
                partial(ChunkedLocalAttentionSpec, attention_chunk_size=8),
            ]
        )
    )
    spec = make(block_size=TOKENS, num_kv_heads=heads, head_size=size, dtype=dtype, head_size_v=size_v)
    layers = {}
    for layer in range(draw(st.integers(1, 3))):
        if size_v is None and draw(st.booleans()):
            tree = draw(blocked_leaf([2, heads, size], num_blocks, dtype))
        else:
            tree = [draw(blocked_leaf([heads, width], num_blocks, dtype)) for width in (size, size_v or size)]
        layers[f"kv{index}.{layer}"] = tree
    return CaseGroup(spec, num_blocks, layers)


@st.composite
def latent_groups(draw, index):
    """MLA layers: values, and sometimes scales of another dtype beside them."""
    size, num_blocks = 2 * draw(st.integers(1, 5)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from(DTYPES))
    has_scales = draw(st.booleans())
    layers = {}
    for layer in range(draw(st.integers(1, 2))):
        tree = {"latent": draw(blocked_leaf([size], num_blocks, dtype))}
        if has_scales:
            tree["scale"] = draw(blocked_leaf([2], num_blocks, jnp.float16))
        layers[f"mla{index}.{layer}"] = tree
    stored = stored_bytes(tree, num_blocks) if has_scales else None
    return CaseGroup(MLAAttentionSpec(TOKENS, size, dtype, stored), num_blocks, layers)


@st.composite
def states(draw):
    """Shapes and dtypes of a recurrent state."""
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=3))
    return tuple(shapes), tuple(draw(st.sampled_from([jnp.float32, jnp.bfloat16])) for _ in shapes)


@st.composite
def state_groups(draw, index):
    """Recurrent states with their block axis anywhere."""
    shapes, dtypes = draw(states())
    num_blocks = draw(st.integers(1, 6))
    layers = {}
    for layer in range(draw(st.integers(1, 2))):
        tree = []
        for shape, dtype in zip(shapes, dtypes, strict=True):
            axis = draw(st.integers(0, len(shape)))
            whole = (*shape[:axis], num_blocks, *shape[axis:])
            tree.append(leaf(whole, dtype, PageSlice(axis), LayoutHint(axis)))
        layers[f"state{index}.{layer}"] = tuple(tree)
    return CaseGroup(MambaSpec(8, shapes, dtypes), num_blocks, layers)


@st.composite
def packed_groups(draw, index):
    """Layers that each take a part of the blocks of one array, with gaps between; raw bytes or values."""
    size, num_blocks, count = 2 * draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([jnp.uint8, jnp.bfloat16]))
    spec = MLAAttentionSpec(TOKENS, size, dtype)
    page, itemsize = page_size_bytes(spec), np.dtype(dtype).itemsize
    gaps = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    starts = [sum(gaps[: i + 1]) * itemsize + i * page for i in range(count)]
    width = (starts[-1] + page) // itemsize + draw(st.integers(0, 3))
    made = leaf((num_blocks, width), dtype)
    parts = [
        CaseLeaf(
            made.struct,
            PageSlice(0, start=start, stop=start + page),
            LayoutHint(0, page_offset_bytes=start, page_size_bytes=page),
        )
        for start in starts
    ]
    order = draw(st.permutations(range(count)))
    return CaseGroup(spec, num_blocks, {f"packed{index}.{i}": parts[i] for i in order})


@st.composite
def overlaid_groups(draw, index):
    """vLLM's hybrid memory: attention over rows of bytes, and padded states over the same rows."""
    num_blocks, count, size = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(4, 16))
    shapes, dtypes = draw(states())
    state_bytes = page_size_bytes(MambaSpec(8, shapes, dtypes))
    row_bytes = max(2 * TOKENS * 4 * size, -(-state_bytes // (8 * TOKENS)) * 8 * TOKENS)
    attention = FullAttentionSpec(TOKENS, 1, row_bytes // (8 * TOKENS), jnp.float32)
    padded = MambaSpec(8, shapes, dtypes, page_size_padded=row_bytes)
    rows = [leaf((num_blocks, row_bytes), jnp.uint8, hint=LayoutHint(0)) for _ in range(count)]
    state_rows = [CaseLeaf(row.struct, PageSlice(0, stop=state_bytes), LayoutHint(0)) for row in rows]
    return [
        CaseGroup(attention, num_blocks, {f"row{index}.{i}": row for i, row in enumerate(rows)}),
        CaseGroup(padded, num_blocks, {f"over{index}.{i}": row for i, row in enumerate(state_rows)}),
    ]


@st.composite
def layout_cases(draw):
    """A model with one to three kinds of caches."""
    kinds = [key_value_groups, latent_groups, state_groups, packed_groups, overlaid_groups]
    groups = []
    for index, kind in enumerate(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3))):
        made = draw(kind(index))
        groups += made if isinstance(made, list) else [made]
    return make_case("random", *groups)


def num_bytes(struct):
    """Bytes of an array of float, integer or 4-bit elements."""
    bits = 4 if struct.dtype == jnp.int4 else 8 * struct.dtype.itemsize
    return math.prod(struct.shape) * bits // 8
