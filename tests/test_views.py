"""Typed views of byte rows against NumPy on raw bytes, and against what a canonical page holds."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
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
    dtype_bits,
)
from jaxkv.testing import assert_same_bytes, numpy_copy
from jaxkv.transfer import ops
from jaxkv.views import PageView, layer_views, write_together

N, ROW = 7, 427
"""Blocks and bytes of a row: odd, and wider than any view below."""

SHAPE, TOKEN = (4, 3, 4), (3, 4)
FULL = FullAttentionSpec(4, 2, 8, jnp.bfloat16)
STATE = MambaSpec(8, ((3, 7), (2, 4, 5)), (jnp.bfloat16, jnp.float32), page_size_padded=256)

DTYPES = (
    *("bool", "int2", "uint2", "int4", "uint4", "float4_e2m1fn", "int8", "uint8", "float8_e4m3fn"),
    *("float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e3m4"),
    *("float8_e4m3", "float8_e8m0fnu", "int16", "uint16", "bfloat16", "float16", "int32", "uint32"),
    *("float32", "int64", "uint64", "float64"),
)


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(jnp, name)) if name != "bool" else np.dtype(bool)


@contextlib.contextmanager
def as_stored(dtype: np.dtype[Any]) -> Iterator[None]:
    """64-bit types exist in JAX only where they are enabled."""
    with jax.enable_x64(True) if dtype.itemsize == 8 else contextlib.nullcontext():
        yield


def random_rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (N, ROW), dtype=np.uint8)


def unpack(raw: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What ``raw``, ``uint8[..., num_bytes]``, means as ``dtype[..., *shape]``; low bits first."""
    lead, bits = raw.shape[:-1], dtype_bits(dtype)
    if dtype == np.bool_:
        return (raw != 0).reshape(*lead, *shape)
    if bits < 8:
        raw = np.stack([raw >> low & (1 << bits) - 1 for low in range(0, 8, bits)], axis=-1)
    return np.ascontiguousarray(raw).view(dtype).reshape(*lead, *shape)


def bits_of(array: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """The bits of every element; NumPy keeps four-bit types in a byte whose upper half means nothing."""
    assert array.dtype == dtype
    raw = np.array(array)[..., None].view(np.uint8)
    return raw & 15 if dtype_bits(dtype) == 4 else raw


def assert_same_bits(actual: Any, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(bits_of(actual, expected.dtype), bits_of(expected, expected.dtype))


def size_of(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape)) * dtype_bits(dtype) // 8


def storable(raw: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Bytes as JAX stores them: a bool is 0 or 1."""
    return raw & 1 if dtype == np.bool_ else raw


@pytest.mark.parametrize(("name", "offset"), [*((name, 37) for name in DTYPES), ("float32", 0)])
def test_pages_are_read_and_written_as_they_lie_in_the_row(name: str, offset: int) -> None:
    dtype = dtype_of(name)
    view = PageView(SHAPE, dtype, offset)
    rows, ids = random_rows(1), np.array([[5, 0], [6, 2]], np.int32)
    columns = slice(offset, offset + view.num_bytes)
    new = storable(random_rows(2, 2, 2, view.num_bytes), dtype)

    @jax.jit
    def step(leaf: jax.Array, ids: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return view.read(leaf, ids), view.write(leaf, ids, values)

    with as_stored(dtype):
        read, written = step(jnp.array(rows), jnp.array(ids), jnp.array(unpack(new, SHAPE, dtype)))
    assert_same_bits(read, unpack(rows[ids][..., columns], SHAPE, dtype))
    expected = rows.copy()
    expected[ids, columns] = new
    assert_same_bytes(written, expected)


@pytest.mark.parametrize("name", ["bool", "int2", "int4", "float8_e5m2", "bfloat16", "float32", "float64"])
def test_tokens_are_read_by_block_table_and_written_by_slot(name: str) -> None:
    dtype = dtype_of(name)
    view = PageView(SHAPE, dtype, offset_bytes=3)
    rows, token_bytes = random_rows(3), size_of(TOKEN, dtype)
    table = np.array([[5, 0, 6], [2, 5, -1]], np.int32)
    blocks, slots = np.array([5, 2, 5, 0], np.int32), np.array([3, 0, 1, 2], np.int32)
    new = storable(random_rows(4, 4, token_bytes), dtype)

    @jax.jit
    def step(leaf: jax.Array, table: jax.Array, *tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaf = view.write_tokens(leaf, *tokens)
        return leaf, view.read_tokens(leaf, table)

    with as_stored(dtype):
        written, tokens = step(jnp.array(rows), table, blocks, slots, jnp.array(unpack(new, TOKEN, dtype)))
    expected = rows.copy()
    for block, slot, raw in zip(blocks, slots, new, strict=True):
        start = 3 + slot * token_bytes
        expected[block, start : start + token_bytes] = raw
    assert_same_bytes(written, expected)
    pages = expected[table, 3 : 3 + view.num_bytes]
    pages[1, 2] = 0
    assert_same_bits(tokens, unpack(pages, SHAPE, dtype).reshape(2, 12, *TOKEN))


SPECIAL_BITS = {
    "bfloat16": (0x7FC1, 0x7F81, 0xFF81, 0x8000, 0x0001, 0x807F, 0x7F80),
    "float16": (0x7E01, 0x7C01, 0xFC01, 0x8000, 0x0001, 0x83FF, 0x7C00),
    "float32": (0x7FC00001, 0x7F800001, 0xFFABCDEF, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000),
    "float64": (0x7FF8000000000001, 0x7FF0000000000001, 0xFFFABCDEF0123456, 1 << 63, 1, (1 << 63) + 1),
    "float8_e5m2": (0x7D, 0x7E, 0x7F, 0xFD, 0x80, 0x01, 0x83),
    "float8_e4m3fn": (0x7F, 0xFF, 0x80, 0x01, 0x87),
}


@pytest.mark.parametrize("name", SPECIAL_BITS)
def test_nan_payloads_subnormals_and_negative_zeros_survive(name: str) -> None:
    dtype = dtype_of(name)
    bits = np.array(SPECIAL_BITS[name], f"u{dtype.itemsize}")
    view = PageView((1, bits.size), dtype, offset_bytes=5)
    ids, slots = jnp.array([2], jnp.int32), jnp.array([0], jnp.int32)

    @jax.jit
    def through(leaf: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        pages = view.write(leaf, ids, values[None, None])
        tokens = view.write_tokens(leaf, ids, slots, values[None])
        return view.read_tokens(pages, ids), view.read(tokens, ids)

    with as_stored(dtype):
        for back in through(jnp.zeros((N, ROW), jnp.uint8), jnp.array(bits.view(dtype))):
            np.testing.assert_array_equal(np.array(back).view(bits.dtype).reshape(-1), bits)


@pytest.mark.parametrize("bad", [-1, N, -N - 1, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_ids_of_no_block_read_as_zeros_and_are_not_written(bad: int) -> None:
    view = PageView((2,), jnp.float32, offset_bytes=2)
    rows = random_rows(5)
    leaf, ids = jnp.array(rows), jnp.array([bad, 3], jnp.int32)
    read = np.array(view.read(leaf, ids))
    assert not read[0].view(np.uint32).any()
    assert_same_bytes(read[1], rows[3, 2:10])
    expected = rows.copy()
    expected[3, 2:10] = 0
    assert_same_bytes(view.write(leaf, ids, jnp.zeros((2, 2))), expected)


@pytest.mark.parametrize("bad", [-1, 4, np.iinfo(np.int32).max, np.iinfo(np.int32).min])
def test_slots_outside_the_block_are_not_written(bad: int) -> None:
    view = PageView((4, 2), jnp.int16, offset_bytes=50)
    rows = random_rows(6)
    ids, slots = jnp.array([3, 3], jnp.int32), jnp.array([bad, 1], jnp.int32)
    expected = rows.copy()
    expected[3, 54:58] = 0
    assert_same_bytes(view.write_tokens(jnp.array(rows), ids, slots, jnp.zeros((2, 2), jnp.int16)), expected)


@pytest.mark.parametrize("ids_shape", [(), (0,), (3,), (2, 3)])
def test_ids_of_any_shape_lead_the_shape_of_the_values(ids_shape: tuple[int, ...]) -> None:
    view = PageView((2, 3), jnp.float32)
    rows = random_rows(7)
    ids = np.arange(np.prod(ids_shape, dtype=int), dtype=np.int32).reshape(ids_shape)
    read = view.read(jnp.array(rows), ids)
    assert read.shape == (*ids_shape, 2, 3)
    assert_same_bytes(read, rows[ids, :24])
    expected = np.zeros_like(rows)
    expected[ids, :24] = rows[ids, :24]
    assert_same_bytes(view.write(jnp.zeros((N, ROW), jnp.uint8), ids, read), expected)


def test_an_array_of_one_number_is_a_view_too() -> None:
    view = PageView((), jnp.int32, offset_bytes=1)
    leaf = view.write(
        jnp.zeros((N, ROW), jnp.uint8), jnp.array([4, 2], jnp.int32), jnp.array([-5, 9], jnp.int32)
    )
    assert view.read(leaf, jnp.arange(N, dtype=jnp.int32)).tolist() == [0, 0, 9, 0, -5, 0, 0]
    with pytest.raises(ConfigError, match="no axis that counts tokens"):
        view.read_tokens(leaf, jnp.array([4], jnp.int32))


def test_arrays_written_together_are_those_written_one_by_one() -> None:
    views, ids = layer_views(STATE, offset_bytes=3), jnp.array([4, -1, 0], jnp.int32)
    rows = random_rows(11)
    arrays = [
        jnp.array(unpack(random_rows(12, 3, view.num_bytes), view.shape, np.dtype(view.dtype)))
        for view in views
    ]
    expected = jnp.array(rows)
    for view, array in zip(views, arrays, strict=True):
        expected = view.write(expected, ids, array)
    assert_same_bytes(write_together(views, jnp.array(rows), ids, arrays), expected)


def describe(views: tuple[PageView, ...]) -> list[str]:
    return [str(view) for view in views]


@pytest.mark.parametrize(
    ("spec", "views"),
    [
        (FULL, ["bfloat16[4, 2, 8] at byte 0", "bfloat16[4, 2, 8] at byte 128"]),
        (SlidingWindowSpec(4, 1, 2, jnp.int4, 9), ["int4[4, 1, 2] at byte 0", "int4[4, 1, 2] at byte 4"]),
        (
            ChunkedLocalAttentionSpec(2, 1, 8, jnp.int8, 16, head_size_v=4),
            ["int8[2, 1, 8] at byte 0", "int8[2, 1, 4] at byte 16"],
        ),
        (MLAAttentionSpec(4, 576, jnp.float16), ["float16[4, 576] at byte 0"]),
        (STATE, ["bfloat16[3, 7] at byte 0", "float32[2, 4, 5] at byte 42"]),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, list) else "",
)
def test_views_of_a_layer_lie_one_after_another(spec: LayerSpec, views: list[str]) -> None:
    assert describe(layer_views(spec)) == views
    shifted = layer_views(spec, offset_bytes=100)
    assert [view.offset_bytes for view in shifted] == [100 + v.offset_bytes for v in layer_views(spec)]


def test_views_of_a_padded_page_leave_the_padding_alone() -> None:
    spec = FullAttentionSpec(4, 2, 8, jnp.bfloat16, page_size_bytes=300)
    assert layer_views(spec) == layer_views(FULL)


def typed_leaves(spec: LayerSpec, num_blocks: int, seed: int) -> tuple[np.ndarray, ...]:
    """One array of random bits for each array of the layer, the block axis first."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.integers(0, 256, (num_blocks, view.num_bytes), dtype=np.uint8)
        .view(np.dtype(view.dtype))
        .reshape(num_blocks, *view.shape)
        for view in layer_views(spec)
    )


def record_of(kv_caches: Any, spec: LayerSpec, block: int) -> bytes:
    config = KVCacheConfig((KVCacheGroupSpec(("layer",), spec, N),))
    pages = canonicalize({"layer": kv_caches}, config).groups[0]
    leaves = jax.tree_util.tree_leaves(kv_caches)
    staging = ops.gather_pages(leaves, jnp.array([block], jnp.int32), pages)
    return bytes(np.array(staging)[0, : pages.block_bytes])


@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        FullAttentionSpec(4, 2, 8, jnp.float8_e4m3fn),
        SlidingWindowSpec(4, 3, 5, jnp.float32, 9),
        ChunkedLocalAttentionSpec(2, 1, 8, jnp.int8, 16, head_size_v=4),
        MLAAttentionSpec(4, 20, jnp.float16),
        MambaSpec(8, STATE.shapes, STATE.dtypes, page_size_padded=500),
    ],
    ids=lambda spec: f"{type(spec).__name__}_{layer_views(spec)[0].dtype.__name__}",
)
def test_written_views_are_the_canonical_page_of_the_layer(spec: LayerSpec) -> None:
    """The same as a record of the layer stored in typed leaves of its own, and as its arrays' bytes."""
    arrays = typed_leaves(spec, N, seed=8)
    width = spec.page_size_padded if isinstance(spec, MambaSpec) else sum(a[0].nbytes for a in arrays)
    leaf = jnp.array(random_rows(9, N, width))
    every_block = jnp.arange(N, dtype=jnp.int32)
    for view, array in zip(layer_views(spec), arrays, strict=True):
        leaf = view.write(leaf, every_block, jnp.array(array))
    for block in (0, 4, N - 1):
        record = record_of(leaf, spec, block)
        assert record == b"".join(array[block].tobytes() for array in arrays)
        assert record == record_of(tuple(jnp.array(array) for array in arrays), spec, block)


def test_a_view_is_a_value_and_can_be_a_static_argument() -> None:
    view, same = (PageView((4, 2), jnp.float32, 9) for _ in range(2))
    assert view == same
    assert hash(view) == hash(same)
    rows, ids = random_rows(10), jnp.array([4, 1], jnp.int32)
    assert_same_bytes(jax.jit(PageView.read, static_argnums=0)(view, rows, ids), rows[[4, 1], 9:41])


@functools.cache
def snippet_names() -> dict[str, Any]:
    page = Path(__file__).parent.parent / "docs" / "views.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names


def test_snippet_of_the_docs_stores_a_token_and_a_state() -> None:
    names = snippet_names()
    rows = numpy_copy(names["leaf"])
    expected = np.zeros_like(rows)
    token = np.ones((2, 64), jnp.bfloat16).view(np.uint8).reshape(-1)
    for start in (0, 4096):
        expected[7, start + 3 * 256 : start + 4 * 256] = token
    expected[9, 576 : 576 + 2048] = np.ones(512, np.float32).view(np.uint8)
    assert_same_bytes(rows, expected)
    keys = np.zeros((1, 48, 2, 64), jnp.bfloat16)
    keys[0, 16 + 3] = 1
    assert_same_bytes(names["keys"], keys)
    assert_same_bytes(names["values"], keys)
    assert not np.array(names["state"]).any()
    assert len(names["canonical"].tensors) == 1


def test_comments_of_the_snippet_say_where_the_views_are() -> None:
    names = snippet_names()
    assert describe((names["k_view"], names["v_view"])) == [
        "bfloat16[16, 2, 64] at byte 0",
        "bfloat16[16, 2, 64] at byte 4096",
    ]
    assert describe((names["conv_view"], names["state_view"])) == [
        "bfloat16[3, 96] at byte 0",
        "float32[4, 8, 16] at byte 576",
    ]
