"""Every layout on every path of the CUDA engine, byte for byte."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from block_moves import check_all_groups, check_chunks, many_leaves, pointers, set_up
from word_caches import GROUP, canonical_of, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.testing import (
    LAYOUT_CASES,
    LayoutCase,
    assert_same_bytes,
    assert_same_caches,
    layout_case,
    numpy_copy,
)
from jaxkv.transfer import BlockTransfer

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_slots_and_restored_blocks_hold_the_bytes_the_oracle_finds_and_others_stay(
    case: LayoutCase, path: str, pool: HostPool
) -> None:
    check_all_groups(case, pool, backend="cuda")


@pytest.mark.parametrize("first_block", [0, 1, 2, 4])
def test_chunks_of_several_blocks_are_filled_from_any_start_and_skip_minus_one(
    first_block: int, path: str, pool: HostPool
) -> None:
    check_chunks(pool, first_block, backend="cuda")


def test_auto_chooses_cuda(pool: HostPool) -> None:
    _, _, transfer = set_up(layout_case("packed_kv"), pool)
    assert type(transfer.backend).__name__ == "CudaBackend"


@pytest.mark.parametrize("num_layers", [1, 60])
def test_restore_writes_in_place_and_consumes_the_old_arrays(
    num_layers: int, path: str, pool: HostPool
) -> None:
    kv_caches, canonical = many_leaves(num_layers)
    transfer = BlockTransfer(canonical, pool, backend="cuda")
    before = pointers(kv_caches)
    with transfer.reserve(GROUP, 2) as slots:
        transfer.offload(kv_caches, GROUP, [3, 5], slots)
        assert pointers(kv_caches) == before
        restored, ticket = transfer.restore(kv_caches, GROUP, [1, 2], slots)
        assert ticket.wait().error is None
    assert pointers(restored) == before
    assert all(leaf.is_deleted() for leaf in kv_caches.values())
    assert transfer.num_copied_leaves == 0


def test_any_number_of_blocks_is_one_program(pool: HostPool) -> None:
    kv_caches, _, transfer = set_up(layout_case("packed_kv"), pool)
    kv_caches = transfer.warm_up(kv_caches, max_blocks=10)
    mover: Any = transfer.movers[0].mover
    for seed in range(5):
        ids = np.random.default_rng(seed).permutation(11)[: 2 * seed + 2]
        with transfer.reserve(GROUP, len(ids)) as slots:
            transfer.offload(kv_caches, GROUP, ids, slots)
            kv_caches, ticket = transfer.restore(kv_caches, GROUP, ids, slots)
            assert ticket.wait().error is None
    assert mover.read_program._cache_size() == 1
    assert mover.write_program._cache_size() == 1


@pytest.mark.parametrize("committed", [False, True])
def test_a_step_is_compiled_once_for_caches_that_were_restored(pool: HostPool, *, committed: bool) -> None:
    caches = make_caches(2, 16, 4096)
    if committed:
        caches = jax.device_put(caches, jax.devices()[0])
    transfer = BlockTransfer(canonical_of(caches), pool)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    caches = step(caches)
    with transfer.reserve(GROUP, 4) as slots:
        transfer.offload(caches, GROUP, range(4), slots)
        caches, ticket = transfer.restore(caches, GROUP, range(4, 8), slots)
        assert ticket.wait().error is None
    caches = step(dict(caches))
    assert {leaf.committed for leaf in caches.values()} == {committed}
    assert step._cache_size() == 1


def test_transfers_go_the_way_they_are_told(path: str, engine: Any, pool: HostPool) -> None:
    before = engine.way_counts
    check_all_groups(layout_case("packed_kv"), pool, backend="cuda")
    gone = [after - count for after, count in zip(engine.way_counts, before, strict=True)]
    way = ["direct", "engine", "kernel"].index(path)
    assert gone[way] > 0
    assert sum(gone) == gone[way]


def test_warm_up_changes_no_byte(path: str, pool: HostPool) -> None:
    kv_caches, _, transfer = set_up(layout_case("hybrid"), pool)
    expected = numpy_copy(kv_caches)
    assert_same_caches(transfer.warm_up(kv_caches, max_blocks=9), expected)


def test_layers_restored_one_by_one_hold_the_same_bytes(path: str, pool: HostPool) -> None:
    check_all_groups(layout_case("hybrid"), pool, backend="cuda", layerwise=True)


def test_plain_jax_moves_the_same_bytes_on_a_gpu(pool: HostPool) -> None:
    check_all_groups(layout_case("head_major"), pool, backend="xla")


@pytest.mark.parametrize("num_blocks", [1, 31, 32, 33, 257, 1000])
def test_any_number_of_blocks_moves(num_blocks: int, path: str, pool: HostPool) -> None:
    """Also more than a warp or a slot of staging memory takes, with records of the smallest size."""
    caches = make_caches(1, 1200, 384)
    transfer, words = BlockTransfer(canonical_of(caches), pool), on_host(caches)
    ids = np.random.default_rng(0).permutation(1200)[:num_blocks]
    into = (ids + 1) % 1200
    with transfer.reserve(GROUP, num_blocks) as slots:
        assert transfer.offload(caches, GROUP, ids, slots).wait().error is None
        for block, slot in zip(ids, slots, strict=True):
            assert bytes(pool.view(slot))[:384] == words[block].tobytes()
        restored, ticket = transfer.restore(caches, GROUP, into, slots)
        assert ticket.wait().error is None
    words[into] = words[ids]
    assert_same_bytes(on_host(dict(restored)), words)
