"""Blocks offloaded and restored, byte for byte, over all layouts and backends that run here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_caches, layout_case, numpy_copy
from jaxkv.transfer import BlockTransfer

BACKENDS = ("cpu", "xla")
POOL_BYTES = 4 << 20


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(POOL_BYTES) as opened:
        yield opened


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_slot_holds_the_bytes_the_oracle_finds_in_the_block(
    case: LayoutCase, backend: str, pool: HostPool
) -> None:
    kv_caches, canonical, transfer = set_up(case, pool, backend=backend)
    host = numpy_copy(kv_caches)
    for group in groups_of(canonical):
        pages = canonical.groups[group]
        ids = some_blocks(pages.num_blocks)
        with transfer.reserve(group, len(ids)) as slots:
            result = transfer.offload(kv_caches, group, ids, slots).wait()
            assert result.error is None
            assert result.num_bytes == len(ids) * pages.block_bytes
            for block, slot in zip(ids, slots, strict=True):
                held = bytes(pool.view(slot))
                assert held[: pages.block_bytes] == case.oracle(host, group, int(block))
                assert held[pages.block_bytes :] == bytes(pages.record_bytes - pages.block_bytes)
    assert_same_caches(kv_caches, host)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_restored_blocks_equal_the_offloaded_ones_and_others_stay(
    case: LayoutCase, backend: str, pool: HostPool
) -> None:
    kv_caches, canonical, transfer = set_up(case, pool, backend=backend)
    source, target = numpy_copy(kv_caches), case.build(2)
    expected = numpy_copy(target)
    for group in groups_of(canonical):
        ids = some_blocks(canonical.groups[group].num_blocks)
        into = np.random.default_rng(3).permutation(ids)
        with transfer.reserve(group, len(ids)) as slots:
            transfer.offload(kv_caches, group, ids, slots)
            target, ticket = transfer.restore(target, group, into, slots)
            assert ticket.wait().error is None
        for block, place in zip(ids, into, strict=True):
            case.poke(expected, group, int(place), case.oracle(source, group, int(block)))
    assert_same_caches(target, expected)
