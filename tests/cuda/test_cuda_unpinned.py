"""Pools that the system would not pin: transfers go through a little pinned memory, pool ops move nothing."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from block_moves import check_all_groups, check_chunks, set_up
from word_caches import GROUP, DecodeLoop, canonical_of, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.testing import LAYOUT_CASES, LayoutCase, assert_same_bytes, layout_case
from jaxkv.transfer import BlockTransfer, ops
from jaxkv.transfer.cuda_device import load_cuda
from jaxkv.transfer.status import StatusEntry

pytestmark = pytest.mark.cuda

OTHER_ID = 10**6
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def pool() -> Iterator[HostPool]:
    """A pool whose memory is pinned already under another number, and cannot be pinned twice."""
    with HostPool(128 * MIB) as opened:
        assert load_cuda().pin_pool(0, OTHER_ID, 1, opened.arena_bytes()) is None
        try:
            yield opened
        finally:
            load_cuda().unpin_pool(OTHER_ID, 1)


@pytest.mark.parametrize("case", LAYOUT_CASES, ids=str)
def test_slots_and_restored_blocks_hold_the_bytes_the_oracle_finds_and_others_stay(
    case: LayoutCase, pool: HostPool
) -> None:
    check_all_groups(case, pool, backend="cuda")


@pytest.mark.parametrize("first_block", [0, 2])
def test_chunks_of_several_blocks_are_filled_from_any_start_and_skip_minus_one(
    first_block: int, pool: HostPool
) -> None:
    check_chunks(pool, first_block, backend="cuda")


def test_it_is_said_once(pool: HostPool, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        set_up(layout_case("packed_kv"), pool, backend="cuda")
    assert caplog.text.count("could not be pinned") == 1
    assert "ulimit -l" in caplog.text


def test_a_decode_loop_offloads_more_than_the_pinned_memory_holds_and_keeps_its_order(pool: HostPool) -> None:
    loop = DecodeLoop(pool, num_blocks=32, num_offloaded=24, lag=2)
    loop.run(num_steps=4, num_leaves=4, page_bytes=256 * KIB)
    loop.check()


def test_a_long_decode_loop_keeps_its_order(pool: HostPool) -> None:
    loop = DecodeLoop(pool, num_blocks=32, num_offloaded=6, lag=3)
    loop.run(num_steps=100, num_leaves=4, page_bytes=32 * KIB)
    loop.check()


def test_pool_ops_in_a_program_say_that_the_pool_is_not_pinned_and_touch_nothing(pool: HostPool) -> None:
    caches = make_caches(2, 8, 4 * KIB)
    words, canonical = on_host(caches), canonical_of(caches)
    BlockTransfer(canonical, pool)
    pages, leaves = canonical.groups[0], canonical.group_leaves(caches, GROUP)
    ids, at = np.arange(4, dtype=np.int32), np.arange(0, 64, 16, dtype=np.int32)

    @jax.jit
    def out(token: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        token, status, _ = ops.offload(pool, token, leaves, ids, at, pages)
        return status

    assert out(pool.token(), leaves)[StatusEntry.NOT_PINNED] == 4
    assert not pool.arena_bytes().any()
    back = jax.jit(lambda token, leaves: ops.restore(pool, token, leaves, ids, at, pages), donate_argnums=1)
    _, status, leaves = back(pool.token(), leaves)
    assert status[StatusEntry.NOT_PINNED] == 4
    assert_same_bytes(on_host(dict(zip(caches, leaves, strict=True))), words)
