"""Leaves on the CPU lie in large pages of memory once a transfer was warmed up."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool, load_native
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.transfer import BlockTransfer

LARGE_PAGE_BYTES = 2 << 20
SHAPE = (2560, 2, 16, 4, 32)
LEAF_BYTES = 40 << 20  # More than malloc takes from what was freed before.
IN_LARGE_PAGES = LEAF_BYTES - LARGE_PAGE_BYTES  # Leaves begin and end within one.


def _kernel_gathers() -> bool:
    memory = mmap.mmap(-1, 4 * LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = np.frombuffer(memory, np.uint8)
    held[:] = 1
    return load_native().gather_into_large_pages(held.ctypes.data, len(held)) > 0


pytestmark = pytest.mark.skipif(not _kernel_gathers(), reason="this kernel gathers no large pages")


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(16 << 20) as opened:
        yield opened


def _large_page_bytes(leaf: jax.Array) -> int:
    """What of the mapping that ``leaf`` lies in is in large pages."""
    middle = leaf.unsafe_buffer_pointer() + LEAF_BYTES // 2
    is_ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_ours = int(found[1], 16) <= middle < int(found[2], 16)
        elif is_ours and (found := re.match(r"AnonHugePages: +(\d+) kB", line)):
            return int(found[1]) << 10
    raise AssertionError("the leaf lies in no mapping")


def _make_caches() -> tuple[dict[str, jax.Array], CanonicalKVCaches]:
    leaf = jax.jit(lambda: jnp.arange(np.prod(SHAPE), dtype=jnp.float32).reshape(SHAPE))()
    assert leaf.nbytes == LEAF_BYTES
    caches = {"layer.0": leaf}
    spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=32, dtype=np.dtype(np.float32))
    config = KVCacheConfig(groups=(KVCacheGroupSpec(("layer.0",), spec, SHAPE[0]),))
    return caches, canonicalize(caches, config)


def test_a_warm_up_brings_leaves_into_large_pages_with_what_they_hold(pool: HostPool) -> None:
    caches, canonical = _make_caches()
    transfer = BlockTransfer(canonical, pool)
    for _ in range(10):  # The kernel may refuse while it is busy with a page.
        caches = transfer.warm_up(caches, 1)
        if _large_page_bytes(caches["layer.0"]) >= IN_LARGE_PAGES:
            break
    assert _large_page_bytes(caches["layer.0"]) >= IN_LARGE_PAGES
    expected = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    np.testing.assert_array_equal(np.asarray(caches["layer.0"]), expected)
