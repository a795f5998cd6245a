"""Records that wait on the device: restores find them there, unless their slots have become others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from word_caches import GROUP, Caches, canonical_of, decode, make_caches, on_host

from jaxkv.errors import PoolInUseError
from jaxkv.host_pool import HostPool
from jaxkv.slots import Slots
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20
NUM_BLOCKS = 12

Scene = tuple[BlockTransfer, Slots, np.ndarray]


@pytest.fixture
def pool_of_prefetches() -> Iterator[HostPool]:
    """A pool that is closed with slots in use."""
    opened = HostPool(256 * MIB)
    yield opened
    with pytest.raises(PoolInUseError):
        opened.close()


def store(pool: HostPool, page_bytes: int = 64 * KIB, seed: int = 1) -> Scene:
    """Caches whose blocks are in slots, their words, and a transfer that has seen the device."""
    caches = make_caches(2, NUM_BLOCKS, page_bytes, seed)
    transfer = BlockTransfer(canonical_of(caches), pool)
    with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
        slots = lease.keep()
    assert transfer.offload(caches, GROUP, range(NUM_BLOCKS), slots).wait().error is None
    return transfer, slots, on_host(caches)


def restore(transfer: BlockTransfer, slots: Slots, page_bytes: int = 64 * KIB) -> Caches:
    others = make_caches(2, NUM_BLOCKS, page_bytes, seed=9)
    restored, ticket = transfer.restore(others, GROUP, range(len(slots)), slots)
    assert ticket.wait().error is None
    return dict(restored)


def scribble(pool: HostPool, slots: Slots) -> np.ndarray:
    """Other words in the slots, which no device knows of."""
    rng = np.random.default_rng(5)
    words = rng.integers(0, 2**32, (len(slots), slots.num_bytes // 4), np.uint32)
    for slot, row in zip(slots, words, strict=True):
        pool.view(slot)[:] = row.tobytes()
    return words


def test_a_restore_finds_what_the_slots_held_when_they_were_prefetched(
    path: str, pool_of_prefetches: HostPool
) -> None:
    transfer, slots, words = store(pool_of_prefetches)
    ticket = transfer.prefetch(GROUP, slots)
    assert ticket.wait().error is None
    scribble(pool_of_prefetches, slots)
    assert_same_bytes(on_host(restore(transfer, slots)), words)


def test_what_was_restored_is_not_on_the_device_any_more(path: str, pool_of_prefetches: HostPool) -> None:
    transfer, slots, words = store(pool_of_prefetches)
    transfer.prefetch(GROUP, slots)
    assert_same_bytes(on_host(restore(transfer, slots)), words)
    written = scribble(pool_of_prefetches, slots)
    assert_same_bytes(on_host(restore(transfer, slots)), written)


def test_a_part_of_what_was_prefetched_may_be_restored_first(path: str, pool_of_prefetches: HostPool) -> None:
    transfer, slots, words = store(pool_of_prefetches)
    transfer.prefetch(GROUP, slots).wait()
    scribble(pool_of_prefetches, slots)
    for part in (slice(3, 7), slice(0, 3), slice(7, NUM_BLOCKS)):
        assert_same_bytes(on_host(restore(transfer, slots[part]))[: len(slots[part])], words[part])


def test_slots_that_were_freed_and_given_out_again_are_read_from_the_pool(
    path: str, pool_of_prefetches: HostPool
) -> None:
    transfer, slots, _ = store(pool_of_prefetches)
    transfer.prefetch(GROUP, slots).wait()
    transfer.release(slots)
    with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
        again = lease.keep()
    assert sorted(again.offsets.tolist()) == sorted(slots.offsets.tolist())
    written = scribble(pool_of_prefetches, again)
    assert_same_bytes(on_host(restore(transfer, again)), written)


def test_slots_that_were_offloaded_to_meanwhile_are_read_from_the_pool(
    path: str, pool_of_prefetches: HostPool
) -> None:
    transfer, slots, _ = store(pool_of_prefetches)
    transfer.prefetch(GROUP, slots)
    newer = make_caches(2, NUM_BLOCKS, 64 * KIB, seed=4)
    transfer.offload(newer, GROUP, range(NUM_BLOCKS), slots)
    assert_same_bytes(on_host(restore(transfer, slots)), on_host(newer))


@pytest.mark.parametrize("page_bytes", [MIB, 5 * MIB])
def test_more_than_there_is_room_for_is_restored_whole(
    page_bytes: int, path: str, pool_of_prefetches: HostPool
) -> None:
    transfer, slots, words = store(pool_of_prefetches, page_bytes)
    for _ in range(3):
        assert transfer.prefetch(GROUP, slots).wait().error is None
        assert_same_bytes(on_host(restore(transfer, slots, page_bytes)), words)


def test_prefetches_that_nobody_restores_make_room_for_later_ones(
    path: str, pool_of_prefetches: HostPool
) -> None:
    transfer, slots, words = store(pool_of_prefetches, 4 * MIB)
    for first in (0, 4, 8):
        transfer.prefetch(GROUP, slots[first : first + 4])
    scribble(pool_of_prefetches, slots[8:])
    assert_same_bytes(on_host(restore(transfer, slots[8:], 4 * MIB))[:4], words[8:])
    assert_same_bytes(on_host(restore(transfer, slots[:8], 4 * MIB))[:8], words[:8])


def test_a_pool_closed_after_a_prefetch_takes_nothing_along(path: str) -> None:
    for seed in (1, 2):
        with HostPool(4 * MIB) as pool:
            transfer, slots, words = store(pool, seed=seed)
            assert_same_bytes(on_host(restore(transfer, slots)), words)
            transfer.prefetch(GROUP, slots)
            transfer.release(slots)


def test_offloads_and_steps_go_on_beside_prefetches(path: str, pool_of_prefetches: HostPool) -> None:
    transfer, slots, words = store(pool_of_prefetches)
    caches = make_caches(2, NUM_BLOCKS, 64 * KIB, seed=6)
    with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
        out = lease.keep()
    for _ in range(5):
        transfer.prefetch(GROUP, slots)
        caches = decode(caches)
        expected = on_host(caches)
        transfer.offload(caches, GROUP, range(NUM_BLOCKS), out)
        assert_same_bytes(on_host(restore(transfer, slots)), words)
        assert_same_bytes(on_host(restore(transfer, out)), expected)
