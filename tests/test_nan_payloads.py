"""No float ever touches cache bytes: what arithmetic would change comes back as it was.

Signalling NaNs turn quiet, NaNs lose their payload, subnormals become zero and zero loses its sign as soon as
a value goes through a conversion or a sum. The bit patterns here are literal, so no value of the test does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from jaxkv.testing import assert_same_bytes
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import BlockTransfer, ops, xla_ops

# Two quiet NaNs with payloads, two signalling ones, negative zero, the least and the largest subnormal, an
# infinity. Types without some of these repeat others.
BITS: dict[str, tuple[type[np.unsignedinteger[Any]], list[int]]] = {
    "float32": (
        np.uint32,
        [0x7FC12345, 0xFFFFFFFF, 0x7F812345, 0xFF800001, 0x80000000, 0x00000001, 0x807FFFFF, 0xFF800000],
    ),
    "bfloat16": (np.uint16, [0x7FC5, 0xFFFF, 0x7F85, 0xFF81, 0x8000, 0x0001, 0x807F, 0xFF80]),
    "float16": (np.uint16, [0x7E05, 0xFFFF, 0x7D05, 0xFC01, 0x8000, 0x0001, 0x83FF, 0xFC00]),
    "float8_e5m2": (np.uint8, [0x7E, 0xFF, 0x7D, 0xFD, 0x80, 0x01, 0x83, 0xFC]),
    "float8_e4m3fn": (np.uint8, [0x7F, 0xFF, 0x7F, 0xFF, 0x80, 0x01, 0x87, 0xFE]),
    "float8_e4m3": (np.uint8, [0x7D, 0xFF, 0x79, 0xF9, 0x80, 0x01, 0x87, 0xF8]),
    "float8_e3m4": (np.uint8, [0x78, 0xFF, 0x71, 0xF1, 0x80, 0x01, 0x8F, 0xF0]),
    "float8_e4m3fnuz": (np.uint8, [0x80, 0x80, 0x80, 0x80, 0x80, 0x01, 0x87, 0xFF]),
    "float8_e8m0fnu": (np.uint8, [0xFF, 0xFF, 0xFF, 0xFF, 0x00, 0x01, 0x7F, 0xFE]),
    "float64": (
        np.uint64,
        [
            *(0x7FF8123456789ABC, 2**64 - 1, 0x7FF0123456789ABC, 0xFFF0000000000001),
            *(0x8000000000000000, 1, 0x800FFFFFFFFFFFFF, 0xFFF0000000000000),
        ],
    ),
}
NUM_BLOCKS = 4
GROUP = GroupId(0)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "xla"])
OPS = pytest.mark.parametrize("ops_of", [ops, xla_ops], ids=["cpu", "xla"])


@pytest.fixture(autouse=True)
def with_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def block_bits(block: int) -> list[np.ndarray]:
    """What block ``block`` holds of each dtype: the patterns, turned so that no two blocks are equal."""
    return [np.roll(np.array(patterns, kind), block) for kind, patterns in BITS.values()]


def record_of(block: int) -> bytes:
    return b"".join(bits.tobytes() for bits in block_bits(block))


def caches_of(blocks: list[int]) -> dict[str, Any]:
    """One layer with a leaf of each dtype; block ``i`` holds the bits of ``blocks[i]``."""
    leaves = [np.stack(bits) for bits in zip(*map(block_bits, blocks), strict=True)]
    return {
        "a": tuple(jnp.array(bits.view(name), copy=True) for bits, name in zip(leaves, BITS, strict=True))
    }


def set_up() -> tuple[dict[str, Any], CanonicalKVCaches]:
    kv_caches = caches_of(list(range(NUM_BLOCKS)))
    spec = MambaSpec(8, ((8,),) * len(BITS), tuple(BITS))
    return kv_caches, canonicalize(kv_caches, KVCacheConfig((KVCacheGroupSpec(("a",), spec, NUM_BLOCKS),)))


def assert_bits(kv_caches: dict[str, Any], blocks: list[int]) -> None:
    """Each block holds just the bits of the one named."""
    for leaf, name, *expected in zip(kv_caches["a"], BITS, *map(block_bits, blocks), strict=True):
        assert leaf.dtype.name == name
        assert_same_bytes(leaf, np.stack(expected), name)


def test_these_bits_are_what_they_are_called() -> None:
    for (kind, patterns), name in zip(BITS.values(), BITS, strict=True):
        with np.errstate(invalid="ignore"):
            values = np.array(patterns, kind).view(name).astype(np.float64)
        assert np.isnan(values[:4]).all(), name
        if name not in ("float8_e8m0fnu", "float8_e4m3fnuz"):
            assert values[4] == 0, name
            assert np.signbit(values[4]), name
        assert np.isfinite(values[5:7]).all(), name


@BACKENDS
def test_no_float_touches_cache_bytes_when_blocks_are_offloaded_and_restored(backend: str) -> None:
    kv_caches, canonical = set_up()
    order = [2, 0, 3]
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool, backend=backend)
        with transfer.reserve(GROUP, len(order)) as slots:
            assert transfer.offload(kv_caches, GROUP, order, slots).wait().error is None
            for block, slot in zip(order, slots, strict=True):
                assert bytes(pool.view(slot))[: canonical.groups[0].block_bytes] == record_of(block)
            restored, ticket = transfer.restore(kv_caches, GROUP, [0, 1, 2], slots)
            assert ticket.wait().error is None
    assert_bits(dict(restored), [*order, 3])


@OPS
def test_no_float_touches_cache_bytes_when_pages_are_gathered_and_scattered(ops_of: Any) -> None:
    kv_caches, canonical = set_up()
    pages = canonical.groups[0]

    @jax.jit
    def move(leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        staging = ops_of.gather_pages(leaves, jnp.array([3, 1], jnp.int32), pages)
        return staging, ops_of.scatter_pages(staging, jnp.array([0, 2], jnp.int32), leaves, pages)[0]

    staging, written = move(canonical.group_leaves(kv_caches, GROUP))
    for record, block in zip(as_bytes(staging).reshape(2, -1), [3, 1], strict=True):
        assert_same_bytes(record[: pages.block_bytes], record_of(block))
    assert_bits(canonical.replace(kv_caches, GROUP, written), [3, 1, 1, 3])
