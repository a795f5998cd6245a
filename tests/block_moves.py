"""Caches with a transfer, and the two checks of moved bytes that every backend has to pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing import LayoutCase, assert_same_bytes, assert_same_caches, layout_case, numpy_copy
from jaxkv.transfer import BlockTransfer


def set_up(case: LayoutCase, pool: HostPool, **options: Any) -> tuple[Any, CanonicalKVCaches, BlockTransfer]:
    kv_caches = case.build(1)
    canonical = canonicalize(kv_caches, case.config, case.hints)
    return kv_caches, canonical, BlockTransfer(canonical, pool, **options)


def groups_of(canonical: CanonicalKVCaches) -> list[GroupId]:
    return [GroupId(g) for g in range(len(canonical.groups))]


def some_blocks(num_blocks: int, seed: int = 0) -> np.ndarray:
    """About half of the blocks, in random order, the last one always among them."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(num_blocks - 1)[: num_blocks // 2]
    return np.append(chosen, num_blocks - 1).astype(np.int32)


def many_leaves(num_layers: int) -> tuple[dict[str, Any], CanonicalKVCaches]:
    names = tuple(f"layers.{i}" for i in range(num_layers))
    config = KVCacheConfig((KVCacheGroupSpec(names, FullAttentionSpec(4, 2, 8, jnp.float32), 16),))
    keys = jax.random.split(jax.random.key(0), num_layers)
    kv_caches = {name: jax.random.normal(k, (16, 4, 4, 8)) for name, k in zip(names, keys, strict=True)}
    return kv_caches, canonicalize(kv_caches, config)


def pointers(kv_caches: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree_util.tree_leaves(kv_caches)]


def check_all_groups(case: LayoutCase, pool: HostPool, **options: Any) -> None:
    """Blocks of every group go out of one cache and into others of a second: slots, moved blocks and all
    other bytes are those the oracle finds."""
    kv_caches, canonical, transfer = set_up(case, pool, **options)
    source, target = numpy_copy(kv_caches), case.build(2)
    before, expected = pointers(target), numpy_copy(target)
    for group in groups_of(canonical):
        pages = canonical.groups[group]
        ids = some_blocks(pages.num_blocks)
        into = np.random.default_rng(3).permutation(ids)
        with transfer.reserve(group, len(ids)) as slots:
            result = transfer.offload(kv_caches, group, ids, slots).wait()
            assert result.error is None
            assert result.num_bytes == len(ids) * pages.block_bytes
            for block, place, slot in zip(ids, into, slots, strict=True):
                record, held = case.oracle(source, group, int(block)), bytes(pool.view(slot))
                assert held[: pages.block_bytes] == record
                assert held[pages.block_bytes :] == bytes(pages.record_bytes - pages.block_bytes)
                case.poke(expected, group, int(place), record)
            target, ticket = transfer.restore(target, group, into, slots)
            assert ticket.wait().error is None
    if transfer.backend.restores_in_place:
        assert pointers(target) == before
        assert transfer.num_copied_leaves == 0
    assert_same_caches(kv_caches, source)
    assert_same_caches(target, expected)


def check_chunks(pool: HostPool, first_block: int, **options: Any) -> None:
    """Chunks of three blocks, filled from ``first_block`` on and with entries skipped, hold what was
    offloaded and otherwise what they held; a restore brings both back."""
    case = layout_case("packed_kv")
    kv_caches, canonical, transfer = set_up(case, pool, blocks_per_chunk=3, **options)
    group, pages = GroupId(0), canonical.groups[0]
    ids = [4, -1, 9, 0, 7]
    with transfer.reserve(group, 3) as slots:
        for slot in slots:
            pool.view(slot)[:] = b"\xee" * slot.num_bytes
        result = transfer.offload(kv_caches, group, ids, slots, first_block=first_block).wait()
        assert result.error is None
        assert result.num_bytes == 4 * pages.block_bytes
        held = b"".join(bytes(pool.view(slot)) for slot in slots)
        host = numpy_copy(kv_caches)
        expected = bytearray(b"\xee" * len(held))
        for j, block in enumerate(ids):
            if block >= 0:
                record = case.oracle(host, 0, block).ljust(pages.record_bytes, b"\0")
                start = (first_block + j) * pages.record_bytes
                expected[start : start + pages.record_bytes] = record
        assert_same_bytes(held, bytes(expected))

        target = case.build(2)
        wanted = numpy_copy(target)
        into = [1, 2, -1, 8, 3]
        # Where nothing was offloaded, the slot's own bytes are restored.
        for j, block in enumerate(into):
            if block >= 0:
                start = (first_block + j) * pages.record_bytes
                case.poke(wanted, 0, block, held[start : start + pages.block_bytes])
        target, ticket = transfer.restore(target, group, into, slots, first_block=first_block)
        assert ticket.wait().error is None
        assert_same_caches(target, wanted)
