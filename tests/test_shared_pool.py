"""A host pool shared by several processes: the same bytes in each, one owner, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from other_process import (
    GROUP,
    MIB,
    OtherProcess,
    attach_and_keep,
    close_last,
    make_transfer,
    offload_attached,
    open_shared,
    read_slots,
    restore_attached,
    write_slots,
)

from jaxkv import host_pool
from jaxkv.errors import ConfigError, PoolClosedError
from jaxkv.host_pool import HostPool
from jaxkv.pool_handle import PoolHandle
from jaxkv.shared_pool import AttachedPool
from jaxkv.testing import assert_same_caches, numpy_copy


@pytest.fixture(scope="module")
def other() -> Iterator[OtherProcess]:
    process = OtherProcess()
    yield process
    process.end()


@pytest.fixture
def owner() -> Iterator[HostPool]:
    with HostPool(MIB, shared=True) as pool:
        yield pool


def files_of(process: Path) -> Iterator[str]:
    """What a process maps and has open. Both come and go while they are looked at."""
    with suppress(OSError):
        yield (process / "maps").read_text()
    with suppress(OSError):
        for fd in os.listdir(process / "fd"):
            with suppress(OSError):
                yield os.readlink(process / "fd" / fd)


def users_of(handle: PoolHandle) -> set[int]:
    """The processes that map the pool or have it open, as the kernel tells."""
    return {
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if any(handle.nonce in name for name in files_of(process))
    }


def test_a_handle_and_slots_survive_pickle_and_json(owner: HostPool) -> None:
    slots = owner.reserve_slots(600, 2)
    handle, again = pickle.loads(pickle.dumps((owner.handle, slots)))
    assert (handle, again) == (owner.handle, slots)
    assert PoolHandle(**json.loads(json.dumps(dataclasses.asdict(handle)))) == owner.handle
    owner.free_slots(again)
    assert owner.used_bytes == 0


def test_two_processes_read_each_others_bytes_in_the_same_slots(owner: HostPool, other: OtherProcess) -> None:
    slots = owner.reserve_slots(5000, 8)
    values = [np.random.default_rng(i).bytes(5000) for i in range(16)]
    for slot, value in zip(slots[:4], values, strict=False):
        owner.view(slot)[:] = value
    other.run(attach_and_keep, owner.handle)
    other.run(write_slots, slots[4:], values[4:8])
    assert other.run(read_slots, slots) == values[:8]
    assert [bytes(owner.view(slot)) for slot in slots] == values[:8]
    other.run(write_slots, slots, values[8:])
    assert [bytes(owner.view(slot)) for slot in slots] == values[8:]
    other.run(close_last)
    owner.free_slots(slots)


def test_a_killed_owner_leaves_the_bytes_to_the_attached_and_nothing_after_them() -> None:
    process = OtherProcess()
    handle, slots = process.run(open_shared, 3)
    attached = AttachedPool(handle)
    assert users_of(handle) == {process.pid, os.getpid()}
    process.kill()
    assert users_of(handle) == {os.getpid()}
    assert [bytes(attached.view(slot)) for slot in slots] == [bytes([i]) * 4096 for i in (1, 2, 3)]
    attached.view(slots[0])[:] = b"\x09" * 4096
    assert attached.view(slots[0])[4095] == 9
    with pytest.raises(PoolClosedError, match=f"process {handle.pid} no longer has the host pool"):
        AttachedPool(handle)
    attached.close()
    assert users_of(handle) == set()
    assert not [*Path("/dev/shm").glob("*jaxkv*")]


def test_a_killed_attached_process_leaves_the_owner_as_it_was(owner: HostPool) -> None:
    process = OtherProcess()
    slots = owner.reserve_slots(4096, 2)
    process.run(attach_and_keep, owner.handle)
    process.run(write_slots, slots, [b"a" * 4096, b"b" * 4096])
    process.kill()
    assert users_of(owner.handle) == {os.getpid()}
    assert [bytes(owner.view(slot)) for slot in slots] == [b"a" * 4096, b"b" * 4096]
    owner.free_slots(slots)
    assert owner.used_bytes == 0
    with AttachedPool(owner.handle) as again:
        assert again.capacity_bytes == owner.capacity_bytes


def test_closing_the_owner_takes_no_memory_from_the_attached_and_lets_nobody_in() -> None:
    owner = HostPool(MIB, shared=True)
    handle = owner.handle
    (slot,) = owner.reserve_slots(4096, 1)
    with AttachedPool(handle) as attached:
        owner.view(slot)[:] = b"x" * 4096
        owner.free(slot)
        owner.close()
        with pytest.raises(PoolClosedError, match="open a new shared pool and send its handle"):
            AttachedPool(handle)
        with pytest.raises(PoolClosedError, match="open a new one"):
            _ = owner.handle
        view = attached.view(slot)
    assert bytes(view) == b"x" * 4096
    assert users_of(handle) == {os.getpid()}
    del view
    assert users_of(handle) == set()


def test_attaching_is_to_the_same_memory_and_takes_none_of_its_own(
    owner: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_pool, "available_memory_bytes", lambda: 0)
    with pytest.raises(ConfigError, match="more than the 0 bytes"):
        HostPool(MIB, shared=True)
    with AttachedPool(owner.handle) as attached:
        assert attached.capacity_bytes == owner.capacity_bytes
        assert attached.pool_id != owner.pool_id
        owner.arena_bytes()[:] = 7
        assert (attached.arena_bytes() == 7).all()


@pytest.mark.parametrize("mib", [1, 8])
def test_huge_pages_are_claimed_only_where_shared_memory_gets_them(mib: int) -> None:
    file = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    choice = file.read_text().split("[")[1].split("]")[0] if file.exists() else "never"
    with HostPool(mib * MIB, shared=True) as owner, AttachedPool(owner.handle) as attached:
        expected = mib > 1 and choice not in {"never", "deny"}
        assert (owner.huge_pages, attached.huge_pages) == (expected, expected)


def test_neither_side_can_be_used_in_a_forked_child_but_the_child_can_attach() -> None:
    script = """
        import os
        from jaxkv.errors import PoolForkedError
        from jaxkv.host_pool import HostPool
        from jaxkv.shared_pool import AttachedPool

        pool = HostPool(1 << 16, shared=True)
        handle = pool.handle
        attached = AttachedPool(handle)
        (slot,) = pool.reserve_slots(4096, 1)
        child = os.fork()
        if child == 0:
            uses = (
                lambda: pool.view(slot), lambda: pool.free(slot), lambda: pool.handle, pool.close,
                lambda: attached.view(slot), lambda: attached.pin([slot]), attached.close,
                lambda: attached._arena.view(0, 1),
            )
            refused = 0
            for use in uses:
                try:
                    use()
                except PoolForkedError as error:
                    refused += "after fork" in str(error)
            with AttachedPool(handle) as own:
                own.view(slot)[:] = b"c" * 4096
            os._exit(0 if refused == len(uses) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert bytes(pool.view(slot)) == bytes(attached.view(slot)) == b"c" * 4096
        attached.close()
        pool.free(slot)
        pool.close()
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(script)], check=True, timeout=300)


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize("name", ["packed_kv"])
def test_blocks_offloaded_in_one_process_are_restored_in_another_byte_for_byte(
    name: str, backend: str, owner: HostPool, other: OtherProcess
) -> None:
    ids, into = [3, 0, 5], [1, 5, 2]
    case, kv_caches, transfer = make_transfer(name, 2, owner, backend)
    source, expected = numpy_copy(case.build(1)), numpy_copy(kv_caches)
    for block, place in zip(ids, into, strict=True):
        case.poke(expected, GROUP, place, case.oracle(source, GROUP, block))
    with transfer.reserve(GROUP, len(ids)) as slots:
        assert other.run(offload_attached, owner.handle, name, backend, ids, slots[:]) is None
        for block, slot in zip(ids, slots, strict=True):
            page = case.oracle(source, GROUP, block)
            assert bytes(owner.view(slot)[: len(page)]) == page
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, into, slots)
        assert ticket.wait().error is None
        assert_same_caches(kv_caches, expected)
    with transfer.reserve(GROUP, len(ids)) as slots:
        assert transfer.offload(case.build(1), GROUP, ids, slots).wait().error is None
        assert_same_caches(other.run(restore_attached, owner.handle, name, backend, into, slots[:]), expected)
