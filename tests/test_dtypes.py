"""Every dtype that JAX stores, in layouts of every kind: offloaded, restored, and the same bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.errors import CacheMismatchError
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.spec import FullAttentionSpec, dtype_bits
from jaxkv.testing import LayoutCase, PageSlice, assert_same_bytes, assert_same_caches, numpy_copy
from jaxkv.testing.arrays import as_bytes
from jaxkv.testing.case_parts import CaseGroup, leaf, make_case
from jaxkv.transfer import BlockTransfer

WIDE = ("float64", "int64", "uint64", "complex128")
"""Types that JAX makes only where 64 bits are enabled."""
COMPLEX = ("complex64", "complex128")
SIX_BITS = ("float6_e2m3fn", "float6_e3m2fn")
"""Types that jaxlib stores from 0.12 on."""
PLAIN = (
    *("bool", "int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32"),
    *("int64", "uint64", "float4_e2m1fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("bfloat16", "float16", "float32", "float64"),
)


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


def every_kind_of_layout(dtype: np.dtype[Any]) -> LayoutCase:
    """Block axis first, heads first, and rows of whole requests; runs of 4 elements or more."""
    num_blocks, tokens, heads, size = 6, 2, 3, 8
    rows = leaf(
        (2, 2, 3 * tokens, heads, size),
        dtype,
        PageSlice(2, entries=tokens, row_axis=1),
        LayoutHint((1, 2), kernel_blocks_per_block=tokens),
    )
    layers = {
        "first": leaf((num_blocks, tokens, 2 * heads, size), dtype, hint=LayoutHint(0)),
        "head_major": leaf((heads, num_blocks, tokens, 2, size), dtype, PageSlice(1)),
        "rows": rows,
    }
    return make_case(dtype.name, CaseGroup(FullAttentionSpec(tokens, heads, size, dtype), num_blocks, layers))


def set_up(name: str, pool: HostPool, backend: str) -> tuple[LayoutCase, Any, Any, BlockTransfer]:
    """The case, two caches of it, and a transfer."""
    dtype = np.dtype(getattr(jnp, name))
    case = every_kind_of_layout(dtype)
    with jax.enable_x64(name in WIDE):
        try:
            kv_caches, target = case.build(1), case.build(2)
        except jax.errors.JaxRuntimeError:
            pytest.skip(f"this jaxlib does not store {name}")
    assert {cache.dtype for cache in jax.tree.leaves(kv_caches)} == {dtype}
    canonical = canonicalize(kv_caches, case.config, case.hints)
    return case, kv_caches, target, BlockTransfer(canonical, pool, backend=backend)


@pytest.mark.parametrize(
    ("backend", "name"),
    [("cpu", name) for name in (*PLAIN, *COMPLEX, *SIX_BITS)] + [("xla", name) for name in PLAIN],
)
def test_every_dtype_comes_back_bit_for_bit(name: str, backend: str, pool: HostPool) -> None:
    case, kv_caches, target, transfer = set_up(name, pool, backend)
    source, expected = numpy_copy(kv_caches), numpy_copy(target)
    blocks, into = [4, 0, 3, 5], [1, 5, 2, 0]
    pages = transfer.canonical.groups[0]
    with transfer.reserve(GroupId(0), len(blocks)) as slots:
        assert transfer.offload(kv_caches, GroupId(0), blocks, slots).wait().error is None
        for block, place, slot in zip(blocks, into, slots, strict=True):
            record = case.oracle(source, 0, block)
            assert bytes(pool.view(slot))[: pages.block_bytes] == record
            case.poke(expected, 0, place, record)
        target, ticket = transfer.restore(target, GroupId(0), into, slots)
        assert ticket.wait().error is None
    assert_same_caches(kv_caches, source)
    assert_same_caches(target, expected)


@pytest.mark.parametrize("name", [*COMPLEX, *SIX_BITS])
def test_what_xla_cannot_read_as_bytes_is_refused_by_its_backend_alone(name: str, pool: HostPool) -> None:
    _, kv_caches, _, transfer = set_up(name, pool, "xla")
    before = numpy_copy(kv_caches)
    with transfer.reserve(GroupId(0), 1) as slots:
        with pytest.raises(CacheMismatchError, match=f"cannot read {name} as bytes; use backend='cpu'"):
            transfer.offload(kv_caches, GroupId(0), [0], slots)
        with pytest.raises(CacheMismatchError, match=f"cannot read {name} as bytes; use backend='cpu'"):
            transfer.restore(kv_caches, GroupId(0), [0], slots)
    assert_same_caches(kv_caches, before)


@pytest.mark.parametrize("name", [*PLAIN, *COMPLEX, *SIX_BITS])
def test_the_bytes_of_the_oracle_are_those_in_memory(name: str, pool: HostPool) -> None:
    _, kv_caches, _, _ = set_up(name, pool, "cpu")
    for cache in jax.tree.leaves(kv_caches):
        expected = as_bytes(cache)
        assert len(expected) == cache.size * dtype_bits(cache.dtype) // 8
        assert_same_bytes(ctypes.string_at(cache.unsafe_buffer_pointer(), len(expected)), expected)
