"""What dense per-request caches are described as, and which blocks hold the tokens of a row."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv import (
    BlockIdError,
    BlockTransfer,
    CacheMismatchError,
    ConfigError,
    FullAttentionSpec,
    HostPool,
    LayoutHint,
    SlidingWindowSpec,
    canonicalize,
)
from jaxkv.adapters import describe_dense, set_row
from jaxkv.testing import assert_same_caches, numpy_copy, random_caches

B, H, D = 3, 2, 8


def leaf(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def gemma_layer(slots=32, heads=H, dim=D, rows=B):
    return {
        "v": leaf(rows, slots, heads, dim),
        "k": leaf(rows, slots, heads, dim),
        "end_index": leaf(rows, dtype=jnp.int32),
        "positions": leaf(rows, slots, dtype=jnp.int32),
    }


def tunix_layer(**options):
    layer = gemma_layer(**options)
    del layer["positions"]
    return layer


# -- description ------------------------------------------------------------------------------------------


def test_gemma_caches_become_one_group_for_each_kind_of_layer():
    cache = {f"layer_{i}": gemma_layer() for i in range(6)}
    cache["layer_5"] = gemma_layer(heads=1, dim=16)
    windows = {f"layer_{i}": 12 for i in range(5)}
    dense = describe_dense(cache, 8, windows=windows)
    page_bytes = 8 * (2 * H * D * 2 + 4)
    local, last = dense.config.groups
    assert local.spec == SlidingWindowSpec(8, H, D, np.dtype(jnp.bfloat16), 12, page_bytes, D)
    assert last.spec == FullAttentionSpec(8, 1, 16, np.dtype(jnp.bfloat16), 8 * (2 * 16 * 2 + 4), 16)
    assert local.layer_names == tuple(f"layer_{i}" for i in range(5))
    assert (local.num_blocks, last.num_blocks) == (B * 4, B * 4)
    assert (dense.num_rows, dense.row_slots) == (B, (32, 32))
    rows, heads = LayoutHint((0, 1), 8), LayoutHint((0, 1), 8, head_axis=2)
    assert dense.hints["layer_0"] == (heads, rows, heads)  # k, positions, v


def test_rolling_layers_have_a_group_and_a_block_count_of_their_own():
    cache = {"layer_0": tunix_layer(slots=16), "layer_1": tunix_layer(slots=64)}
    dense = describe_dense(cache, 8, windows={"layer_0": 16})
    assert [(group.layer_names, group.num_blocks) for group in dense.config.groups] == [
        (("layer_0",), B * 2),
        (("layer_1",), B * 8),
    ]
    assert dense.row_slots == (16, 64)


def test_the_order_of_the_dict_does_not_change_the_description():
    cache = {f"layer_{i}": gemma_layer() for i in range(12)}
    backwards = {name: dict(reversed(cache[name].items())) for name in reversed(cache)}
    assert describe_dense(cache, 8) == describe_dense(backwards, 8)


def test_maxtext_axis_order_moves_the_row_and_token_axes():
    layer = {
        "cached_ar_key": leaf(24, H, B, D, dtype=jnp.int8),
        "cached_ar_value": leaf(24, H, B, D + 4, dtype=jnp.int8),
        "cached_ar_key_scale": leaf(24, 1, B, 1),
        "cached_ar_value_scale": leaf(24, 1, B, 1),
        "cache_ar_index": leaf(1, dtype=jnp.int32),
    }
    names = [name for name in layer if name != "cache_ar_index"]
    dense = describe_dense({"a": layer}, 8, token_leaves=names, axis_order=(1, 2, 0, 3))
    (group,) = dense.config.groups
    page_bytes = 8 * (H * (2 * D + 4) + 4)
    assert group.spec == FullAttentionSpec(8, H, D, np.dtype(np.int8), page_bytes, D + 4)
    assert set(dense.hints["a"]) == {LayoutHint((2, 0), 8, head_axis=1)}


def test_split_takes_out_what_belongs_to_tokens_and_join_puts_it_back():
    cache = {"layer_0": gemma_layer(), "sampler": {"step": leaf(1)}}
    dense = describe_dense(cache, 8)
    kv_caches, rest = dense.split(cache)
    assert {name: set(leaves) for name, leaves in kv_caches.items()} == {"layer_0": {"k", "v", "positions"}}
    assert {name: set(leaves) for name, leaves in rest.items()} == {
        "layer_0": {"end_index"},
        "sampler": {"step"},
    }
    assert dense.join(kv_caches, rest) == cache


def test_a_sharded_batch_counts_the_rows_of_one_data_shard():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor"))
    abstract = jax.sharding.AbstractMesh((3, 2), ("data", "tensor"))
    spread = jax.sharding.NamedSharding(abstract, jax.sharding.PartitionSpec("data", None, "tensor"))
    for place, rows in ((sharding, 6), (spread, 2)):
        layer = {name: jax.ShapeDtypeStruct((6, 32, H, D), jnp.bfloat16, sharding=place) for name in "kv"}
        dense = describe_dense({"a": layer}, 8)
        assert (dense.num_rows, dense.config.groups[0].num_blocks) == (rows, rows * 4)
        assert dense.config.groups[0].spec.num_kv_heads == H


def test_leaves_that_share_out_their_rows_differently_are_refused():
    mesh = jax.sharding.AbstractMesh((3,), ("data",))
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    layer = tunix_layer() | {"k": jax.ShapeDtypeStruct((B, 32, H, D), jnp.bfloat16, sharding=by_rows)}
    with pytest.raises(
        CacheMismatchError, match=r"k \[3, 32, 2, 8\] \(each device holds \[1, 32.*rows alike"
    ):
        describe_dense({"a": layer}, 8)


@pytest.mark.parametrize(
    ("cache", "options", "error", "message"),
    [
        ({"a": gemma_layer(slots=30)}, {}, ConfigError, "30 token slots.*make the cache 32 slots long"),
        ({"a": {**gemma_layer(), "v": leaf(B, 16, H, D)}}, {}, CacheMismatchError, "differ in rows.*v "),
        ({"a": {**gemma_layer(), "k": leaf(B)}}, {}, CacheMismatchError, r"a\['k'\] has shape \[3\]"),
        ({"a": gemma_layer(), "b": gemma_layer(rows=2)}, {}, CacheMismatchError, r"\[2, 3\] rows"),
        ({"a": {"key": leaf(B, 32, H, D)}}, {}, ConfigError, "no layer of .*'a'.* k or v or positions"),
        ({"a": gemma_layer()}, {"windows": {"b": 4}}, ConfigError, r"without a cache: \['b'\]"),
        ({"a": gemma_layer()}, {"axis_order": (0, 1, 2)}, ConfigError, r"got 8 and \(0, 1, 2\)"),
        ({"a": gemma_layer()}, {"axis_order": (1, 0, 2, 3)}, CacheMismatchError, "correct axis_order"),
    ],
)
def test_a_cache_that_is_no_batch_of_rows_is_refused(cache, options, error, message):
    with pytest.raises(error, match=message):
        describe_dense(cache, 8, **options)


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ConfigError, match="block_size must be at least 1"):
        describe_dense({"a": gemma_layer()}, 0)


# -- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis_order", "dtype"),
    [
        *itertools.product(
            [(0, 1, 2, 3), (1, 2, 0, 3), (0, 2, 1, 3), (2, 0, 1, 3)],
            [jnp.bfloat16, jnp.int4, jnp.float8_e4m3fn],
        ),
        ((3, 1, 0, 2), jnp.float32),
    ],
)
def test_blocks_of_a_row_are_slices_of_the_logical_array(axis_order, dtype):
    slots, size, row, first = 16, 4, 1, 2
    logical = {"k": (B, slots, H, D), "v": (B, slots, H, 2 * D), "k_scale": (B, slots, 1, 1)}
    shapes = {
        name: leaf(*np.array(shape)[list(axis_order)], dtype=jnp.float16 if name == "k_scale" else dtype)
        for name, shape in logical.items()
    }
    shapes["segment"] = leaf(B, slots, dtype=jnp.int32)
    cache = random_caches({"a": shapes}, seed=3)
    dense = describe_dense(cache, size, token_leaves=("k", "v", "k_scale", "segment"), axis_order=axis_order)
    host = numpy_copy(cache)
    in_logical_order = {
        name: array.transpose(np.argsort(axis_order)) if array.ndim == 4 else array
        for name, array in host["a"].items()
    }
    kv_caches, _ = dense.split(cache)
    with HostPool(1 << 16) as pool:
        transfer = BlockTransfer(canonicalize(kv_caches, dense.config, dense.hints), pool)
        ids = dense.held_blocks(0, row, range(first * size, 4 * size), 4 * size)
        with transfer.reserve(0, len(ids)) as chunks:
            assert transfer.offload(kv_caches, 0, ids, chunks).wait().error is None
            to_row = dense.needed_blocks(0, 2, 4 * size)[: len(ids)]
            kv_caches, ticket = transfer.restore(kv_caches, 0, to_row, chunks)
            assert ticket.wait().error is None
    for array in in_logical_order.values():
        array[2, : len(ids) * size] = array[row, first * size :]
    assert_same_caches(kv_caches, {"a": {name: host["a"][name] for name in sorted(host["a"])}})


def test_set_row_changes_the_named_leaves_of_one_row_only():
    cache = random_caches({"a": gemma_layer(), "b": tunix_layer()}, seed=1)
    host = numpy_copy(cache)
    found = set_row(cache, 1, end_index=17, positions=np.arange(32))
    host["a"]["end_index"][1] = host["b"]["end_index"][1] = 17
    host["a"]["positions"][1] = np.arange(32)
    assert_same_caches(found, host)
    assert found["a"]["k"] is cache["a"]["k"]


def test_set_row_names_a_leaf_that_no_layer_has():
    with pytest.raises(CacheMismatchError, match=r"no layer has a leaf \['end'\].*end_index"):
        set_row({"a": {"end_index": jnp.zeros(3)}}, 0, end=1)


# -- block ids --------------------------------------------------------------------------------------------


def ring(slots, num_written):
    """The token in each slot of a row, -1 where none was written."""
    row = np.full(slots, -1)
    for token in range(num_written):
        row[token % slots] = token
    return row


@given(
    block_size=st.integers(1, 5),
    per_row=st.integers(1, 6),
    row=st.integers(0, B - 1),
    num_written=st.integers(0, 70),
    data=st.data(),
)
def test_held_blocks_hold_all_their_tokens(block_size, per_row, row, num_written, data):
    slots = block_size * per_row
    dense = describe_dense({"a": tunix_layer(slots=slots)}, block_size)
    first = data.draw(st.integers(0, num_written // block_size))
    last = data.draw(st.integers(first, num_written // block_size))
    ids = dense.held_blocks(0, row, range(first * block_size, last * block_size), num_written)
    held = ring(slots, num_written)
    for index, block in zip(range(first, last), ids, strict=True):
        tokens = list(range(index * block_size, (index + 1) * block_size))
        here = [list(held[at : at + block_size]) == tokens for at in range(0, slots, block_size)]
        expected = row * per_row + here.index(True) if any(here) else -1
        assert block == expected


@given(
    block_size=st.integers(1, 5),
    per_row=st.integers(1, 8),
    window=st.none() | st.integers(1, 20),
    num_blocks=st.integers(0, 20),
    row=st.integers(0, B - 1),
)
def test_needed_blocks_are_those_the_next_token_reads(block_size, per_row, window, num_blocks, row):
    slots, num_tokens = block_size * per_row, block_size * num_blocks
    dense = describe_dense(
        {"a": tunix_layer(slots=slots)}, block_size, windows={} if window is None else {"a": window}
    )
    read = [token for token in range(num_tokens) if window is None or token > num_tokens - window]
    blocks = sorted({token // block_size for token in read})
    if len(blocks) > per_row:
        with pytest.raises(BlockIdError, match=f"has {slots} slots"):
            dense.needed_blocks(0, row, num_tokens)
        return
    expected = [-1] * num_blocks
    for index in blocks:
        expected[index] = row * per_row + index % per_row
    assert dense.needed_blocks(0, row, num_tokens).tolist() == expected


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda dense: dense.held_blocks(0, 0, range(4, 16), 16), BlockIdError, "not whole blocks of 8"),
        (lambda dense: dense.held_blocks(0, 0, range(12), 16), BlockIdError, "not whole blocks of 8"),
        (lambda dense: dense.held_blocks(0, 0, range(0, 16, 8), 16), BlockIdError, "not whole blocks"),
        (lambda dense: dense.held_blocks(0, 0, range(16), 15), BlockIdError, "only 15 were written"),
        (lambda dense: dense.held_blocks(0, 3, range(16), 16), BlockIdError, "no row 3.*0 to 2"),
        (lambda dense: dense.needed_blocks(0, -1, 16), BlockIdError, "no row -1"),
        (lambda dense: dense.needed_blocks(0, 0, 12), BlockIdError, "not whole blocks of 8"),
        (lambda dense: dense.needed_blocks(0, 0, 40), BlockIdError, "reads tokens from 0 on.*32 slots"),
        (lambda dense: dense.needed_blocks(1, 0, 8), ConfigError, "no group 1"),
    ],
)
def test_ids_that_make_no_sense_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(describe_dense({"a": gemma_layer()}, 8))
