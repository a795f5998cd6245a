"""Restores find what their slots hold, whichever device was sent a prefetch of what they held before.

CPU devices stand for others: a mover here keeps what was prefetched by device and address, as engines do, and
restores from that what it has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.slots import Slots
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.transfer import BlockTransfer, block_transfer
from jaxkv.transfer.backends import Leaves, PageMover, TransferBackend, XlaMover
from jaxkv.transfer.checks import Entries
from jaxkv.transfer.status import make_status
from jaxkv.transfer.ticket import Status

GROUP = GroupId(0)
NUM_BLOCKS = 4
SHAPE = (NUM_BLOCKS, 2, 8, 2, 16)

Waiting = dict[jax.Device, dict[int, bytes]]


class StagingBackend(TransferBackend):
    restores_in_place = False
    orders_launches = False

    def __init__(self, pool: AnyPool, waiting: Waiting) -> None:
        self._pool = pool
        self._waiting = waiting

    def require_reachable(self, device: jax.Device) -> None:
        pass

    def mover(self, pages: GroupPages) -> PageMover:
        return StagingMover(self._pool, pages, self._waiting)


class StagingMover(PageMover):
    def __init__(self, pool: AnyPool, pages: GroupPages, waiting: Waiting) -> None:
        self._mover = XlaMover(pool.arena_bytes, pages)
        self._arena = pool.arena_bytes
        self._record_bytes = pages.record_bytes
        self._waiting = waiting

    def prefetch(self, device: jax.Device, entries: Entries) -> Status:
        for address, record in self._records(entries):
            self._waiting[device][address] = record.tobytes()
        return make_status(moved=entries.num_blocks)

    def forget_prefetched(self, device: jax.Device, entries: Entries) -> None:
        for address, _ in self._records(entries):
            self._waiting[device].pop(address, None)

    def offload(self, leaves: Leaves, entries: Entries) -> Status:
        (device,) = leaves[0].devices()
        self.forget_prefetched(device, entries)
        return self._mover.offload(leaves, entries)

    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        (device,) = leaves[0].devices()
        held = {address: record.copy() for address, record in self._records(entries)}
        for address, record in self._records(entries):
            record[:] = np.frombuffer(self._waiting[device].pop(address, record.tobytes()), np.uint8)
        written, status = self._mover.restore(leaves, entries)
        status = np.asarray(status)
        for address, record in self._records(entries):
            record[:] = held[address]
        return written, status

    def warm_up_offload(self, leaves: Leaves, num_entries: int) -> None:
        raise NotImplementedError

    def warm_up_restore(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        raise NotImplementedError

    def _records(self, entries: Entries) -> Iterator[tuple[int, np.ndarray]]:
        for address in entries.addresses[entries.block_ids >= 0].tolist():
            yield address, self._arena()[512 * address : 512 * address + self._record_bytes]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostPool]:
    waiting: Waiting = defaultdict(dict)
    monkeypatch.setattr(block_transfer, "make_backend", lambda _, pool: StagingBackend(pool, waiting))
    with HostPool(1 << 20) as opened:
        yield opened


def caches_of(value: int, device: Any = None) -> dict[str, jax.Array]:
    return {"layer": jax.device_put(jnp.full(SHAPE, value, jnp.uint32), device or jax.devices()[0])}


def transfer_of(caches: dict[str, jax.Array], pool: HostPool) -> BlockTransfer:
    spec = FullAttentionSpec(SHAPE[2], SHAPE[3], SHAPE[4], jnp.uint32)
    return BlockTransfer(canonicalize(caches, KVCacheConfig((KVCacheGroupSpec(("layer",), spec, 4),))), pool)


def store(transfer: BlockTransfer, value: int, slots: Slots, device: Any = None) -> None:
    caches = caches_of(value, device)
    assert transfer.offload(caches, GROUP, range(NUM_BLOCKS), slots).wait().error is None


def fill(pool: HostPool, slots: Slots, value: int) -> None:
    """What no transfer has written, as after reading a file."""
    for slot in slots:
        np.frombuffer(pool.view(slot), np.uint32)[:] = value


def restored(transfer: BlockTransfer, slots: Slots, device: Any = None) -> set[int]:
    caches, ticket = transfer.restore(caches_of(0, device), GROUP, range(NUM_BLOCKS), slots)
    assert ticket.wait().error is None
    return set(np.unique(np.asarray(caches["layer"])).tolist())


def leave_prefetched(pool: HostPool, value: int, device: Any = None) -> None:
    """Slots are prefetched and freed again."""
    transfer = transfer_of(caches_of(0, device), pool)
    with transfer.reserve(GROUP, NUM_BLOCKS) as slots:
        store(transfer, value, slots.keep(), device)
        transfer.prefetch(GROUP, slots)
        transfer.release(slots)


def test_a_transfer_whose_first_is_a_restore_finds_what_its_slots_hold(pool: HostPool) -> None:
    leave_prefetched(pool, 1)
    transfer = transfer_of(caches_of(0), pool)
    with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
        slots = lease[:]
        fill(pool, slots, 2)
        assert restored(transfer, slots) == {2}


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
class TestSeveralDevices:
    def test_caches_that_moved_find_what_their_slots_hold(self, pool: HostPool) -> None:
        leave_prefetched(pool, 1, jax.devices()[1])
        transfer = transfer_of(caches_of(0), pool)
        with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
            slots = lease[:]
            store(transfer, 2, slots)
            assert restored(transfer, slots, jax.devices()[1]) == {2}

    def test_slots_prefetched_to_one_device_are_what_they_hold_on_another(self, pool: HostPool) -> None:
        leave_prefetched(pool, 1, jax.devices()[1])
        first = transfer_of(caches_of(0), pool)
        second = transfer_of(caches_of(0, jax.devices()[1]), pool)
        with first.reserve(GROUP, NUM_BLOCKS) as lease:
            slots = lease[:]
            store(first, 2, slots)
            first.prefetch(GROUP, slots)
            assert restored(second, slots, jax.devices()[1]) == {2}

    def test_what_another_device_has_written_since_is_restored(self, pool: HostPool) -> None:
        first = transfer_of(caches_of(0), pool)
        second = transfer_of(caches_of(0, jax.devices()[1]), pool)
        with first.reserve(GROUP, NUM_BLOCKS) as lease:
            slots = lease[:]
            store(first, 1, slots)
            first.prefetch(GROUP, slots)
            store(second, 2, slots, jax.devices()[1])
            assert restored(first, slots) == {2}

    def test_a_mesh_finds_what_its_slots_hold(self, pool: HostPool) -> None:
        leave_prefetched(pool, 1)
        mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",))
        everywhere = NamedSharding(mesh, PartitionSpec(None, None, None, "tensor"))
        transfer = transfer_of(caches_of(0, everywhere), pool)
        with transfer.reserve(GROUP, NUM_BLOCKS) as lease:
            slots = lease[:]
            fill(pool, slots, 2)
            assert restored(transfer, slots, everywhere) == {2}
