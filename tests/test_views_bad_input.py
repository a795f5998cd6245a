"""What views refuse, with the value that is wrong and what to do instead."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.errors import BlockIdError, CacheMismatchError, ConfigError
from jaxkv.spec import FullAttentionSpec, LayerSpec, MambaSpec
from jaxkv.views import PageView, layer_views, write_together

ROWS = np.zeros((7, 427), np.uint8)
IDS = np.array([1, 2], np.int32)
VIEW = PageView((4, 2), jnp.float32, offset_bytes=9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PageView((2,), jnp.complex64), "cannot hold complex64"),
        (lambda: PageView((2,), "S3"), r"cannot hold \|S3"),
        (lambda: PageView((2,), ">f4"), "cannot hold >f4"),
        (lambda: PageView((2,), "no dtype"), "is not a dtype"),
        (lambda: PageView((3,), jnp.uint4), r"uint4\[3\] is 12 bits, not whole bytes; pad"),
        (lambda: PageView((2, 0), jnp.int8), r"at least 1 long, got shape \(2, 0\)"),
        (lambda: PageView((2,), jnp.int8, -1), "offset_bytes must be 0, 1, ..., got -1"),
        (lambda: PageView((2,), jnp.int8, 1.5), "offset_bytes must be 0, 1, ..., got 1.5"),
        (
            lambda: PageView((2, 3), jnp.int4).write_tokens(ROWS, IDS, IDS, np.zeros((2, 3), jnp.int4)),
            r"int4\[3\] is 12 bits",
        ),
    ],
)
def test_what_cannot_be_a_view_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (
            ROWS.astype(jnp.int8),
            r"needs a leaf uint8\[num_blocks, page_bytes\], got int8\[7, 427\]; allocate",
        ),
        (ROWS[0], r"got uint8\[427\]"),
        (ROWS[None], r"got uint8\[1, 7, 427\]"),
        (
            ROWS[:, :40],
            r"float32\[4, 2\] at byte 9 ends at byte 41, but a row of uint8\[7, 40\] has 40; make rows",
        ),
    ],
)
def test_a_leaf_the_view_does_not_fit_is_refused(leaf: np.ndarray, message: str) -> None:
    calls = (
        lambda: VIEW.read(leaf, IDS),
        lambda: VIEW.read_tokens(leaf, IDS),
        lambda: VIEW.write(leaf, IDS, np.zeros((2, 4, 2), np.float32)),
        lambda: VIEW.write_tokens(leaf, IDS, IDS, np.zeros((2, 2), np.float32)),
        lambda: write_together([VIEW], leaf, IDS, [np.zeros((2, 4, 2), np.float32)]),
    )
    for call in calls:
        with pytest.raises(CacheMismatchError, match=message):
            call()


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (np.zeros((2, 4, 2), jnp.bfloat16), r"bfloat16\[2, 4, 2\]"),
        (np.zeros((2, 4, 2)), r"float64\[2, 4, 2\]"),
        (np.zeros((2, 2, 4), np.float32), r"float32\[2, 2, 4\]"),
        (np.zeros((1, 4, 2), np.float32), r"float32\[1, 4, 2\]"),
    ],
)
def test_values_that_are_not_the_views_are_refused(values: Any, got: str) -> None:
    with pytest.raises(
        CacheMismatchError, match=rf"must be float32\[2, 4, 2\], got {got}; reshape or convert"
    ):
        VIEW.write(ROWS, IDS, values)
    with pytest.raises(CacheMismatchError, match=r"must be float32\[2, 2\], got"):
        VIEW.write_tokens(ROWS, IDS, IDS, values)


def test_only_neighbours_are_written_together_with_one_array_each() -> None:
    values = np.zeros((2, 4, 2), np.float32)
    with pytest.raises(
        ConfigError, match=r"at byte 42 does not begin where .* at byte 9 ends; write them one"
    ):
        write_together([VIEW, PageView((4, 2), jnp.float32, 42)], ROWS, IDS, [values, values])
    with pytest.raises(ConfigError, match="1 views cannot hold 2 arrays; give one for each"):
        write_together([VIEW], ROWS, IDS, [values, values])
    with pytest.raises(ConfigError, match="0 views cannot hold 0 arrays"):
        write_together([], ROWS, IDS, [])


def test_ids_and_slots_that_are_not_int32_or_not_one_each_are_refused() -> None:
    tokens = np.zeros((2, 2), np.float32)
    with pytest.raises(BlockIdError, match="block_ids must be int32, got uint32; convert with"):
        VIEW.read(ROWS, IDS.astype(jnp.uint32))
    with pytest.raises(BlockIdError, match="block_table must be int32, got float32"):
        VIEW.read_tokens(ROWS, tokens)
    with pytest.raises(BlockIdError, match="slots_in_block must be int32, got int16"):
        VIEW.write_tokens(ROWS, IDS, IDS.astype(jnp.int16), tokens)
    with pytest.raises(BlockIdError, match=r"slots_in_block has shape \(1,\), block_ids \(2,\)"):
        VIEW.write_tokens(ROWS, IDS, IDS[:1], tokens)


def test_a_view_of_64_bits_asks_for_64_bit_types() -> None:
    with pytest.raises(
        CacheMismatchError, match=r"float64\[2\] at byte 0 needs 64-bit types; set jax_enable_x64"
    ):
        PageView((2,), np.float64).read(ROWS, IDS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FullAttentionSpec(4, 2, 8, jnp.bfloat16, page_size_bytes=255), "stores 255 bytes .* take 256"),
        (FullAttentionSpec(1, 1, 3, jnp.int4), r"int4\[1, 1, 3\] is 12 bits"),
        (MambaSpec(1, ((2,),), (jnp.complex64,)), "cannot hold complex64"),
    ],
)
def test_a_page_that_views_cannot_describe_is_refused(spec: LayerSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer_views(spec)
