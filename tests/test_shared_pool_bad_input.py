"""What shared pools and their handles refuse, with which message, and that refusing costs nobody anything."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from other_process import (
    GROUP,
    MIB,
    OtherProcess,
    attach_and_keep,
    attach_as_nobody,
    attach_under_limit,
    close_last,
    make_transfer,
    open_without_file_size,
)

from jaxkv.errors import ConfigError, PoolClosedError, PoolError, SlotError
from jaxkv.host_pool import HostPool
from jaxkv.shared_pool import AttachedPool
from jaxkv.slots import Slot
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


def test_a_pool_that_is_not_shared_has_no_handle() -> None:
    with HostPool(MIB) as pool, pytest.raises(PoolError, match="shared=True"):
        _ = pool.handle


@pytest.mark.parametrize("wrong", [None, "1:2:3", (1, 2, 3)], ids=repr)
def test_what_is_no_handle_is_an_error(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"owner's pool\.handle"):
        AttachedPool(wrong)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pid", 0),
        ("pid", 2**31),
        ("pid", "1"),
        ("fd", -1),
        ("fd", True),
        ("capacity_bytes", 0),
        ("capacity_bytes", 4096.0),
        ("nonce", "0" * 31),
        ("nonce", "0" * 32 + "\n"),
        ("nonce", "../" * 8),
        ("nonce", None),
    ],
)
def test_a_handle_with_values_no_pool_has_is_an_error(owner: HostPool, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"cannot have {field}="):
        dataclasses.replace(owner.handle, **{field: value})


def test_a_handle_of_a_pool_that_is_gone_is_refused_though_its_number_names_another(owner: HostPool) -> None:
    with HostPool(MIB, shared=True) as gone:
        stale = gone.handle
    with HostPool(MIB, shared=True) as successor:
        assert successor.handle.fd == stale.fd
        with pytest.raises(PoolClosedError, match="something else open where the host pool"):
            AttachedPool(stale)
    with pytest.raises(PoolClosedError, match="something else open"):
        AttachedPool(dataclasses.replace(owner.handle, nonce="0" * 32))


def test_a_handle_never_opens_another_kind_of_file(owner: HostPool, tmp_path: Path) -> None:
    plain = tmp_path / f"jaxkv-{owner.handle.nonce}"
    plain.write_bytes(bytes(MIB))
    os.mkfifo(tmp_path / "fifo")
    for path in (plain, tmp_path / "fifo", Path("/dev/null"), tmp_path):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(PoolClosedError, match="something else open"):
            AttachedPool(dataclasses.replace(owner.handle, fd=fd))
        os.close(fd)
    with pytest.raises(PoolClosedError, match="no longer has the host pool"):
        AttachedPool(dataclasses.replace(owner.handle, pid=2**31 - 1))


def test_a_handle_with_another_capacity_names_both(owner: HostPool) -> None:
    for capacity in (MIB - 4096, MIB + 4096, 1):
        with pytest.raises(ConfigError, match=rf"pool has {capacity} bytes, but it has {MIB};"):
            AttachedPool(dataclasses.replace(owner.handle, capacity_bytes=capacity))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused_and_told_why(owner: HostPool, other: OtherProcess) -> None:
    message = other.run(attach_as_nobody, owner.handle)
    assert message.startswith("ConfigError: the system refused")
    assert "Permission denied" in message
    assert "the same user" in message


def test_what_the_system_refuses_is_an_error_with_its_reason(other: OtherProcess) -> None:
    with HostPool(64 * MIB, shared=True) as owner:
        message = other.run(attach_under_limit, resource.RLIMIT_AS, 16 * MIB, owner.handle)
        assert message.startswith("ConfigError: the system refused")
        assert "Cannot allocate memory" in message
        message = other.run(attach_under_limit, resource.RLIMIT_NOFILE, None, owner.handle)
        assert "ConfigError: the system refused to open" in message
        assert "Too many open files" in message
        assert other.run(attach_and_keep, owner.handle) is None
        other.run(close_last)
    message = other.run(open_without_file_size)
    assert "ConfigError: the system refused 1048576 bytes" in message
    assert "File too large" in message


def test_a_shared_pool_the_system_cannot_give_is_an_error(owner: HostPool) -> None:
    with pytest.raises(ConfigError, match="the system refused"):
        type(owner._arena).create_shared(2**60, "0" * 32)


def test_an_attached_pool_reserves_and_frees_nothing(owner: HostPool) -> None:
    case, _, _ = make_transfer("packed_kv", 1, owner, "cpu")
    slots = owner.reserve_slots(4096, 1)
    with AttachedPool(owner.handle) as attached:
        _, _, transfer = make_transfer(case.name, 1, attached, "cpu")
        for refused in (
            lambda: attached.reserve_slots(4096, 1),
            lambda: transfer.reserve(GROUP, 1),
            lambda: attached.free_slots(slots),
            lambda: transfer.release(slots),
        ):
            with pytest.raises(PoolError, match="in the process that opened the pool"):
                refused()
    assert owner.used_bytes == 4096
    owner.free_slots(slots)


def test_any_range_of_whole_units_inside_the_arena_is_a_slot(owner: HostPool) -> None:
    with AttachedPool(owner.handle) as attached:
        ranges = [(0, MIB), (0, 1), (512, 512), (MIB - 512, 512), (MIB - 512, 3)]
        slots = [Slot(offset, num_bytes, 1) for offset, num_bytes in ranges]
        assert attached.pin(slots).tolist() == [offset // 512 for offset, _ in ranges]
        assert [attached.address(slot) for slot in slots] == attached.pin(slots).tolist()
        assert [len(attached.view(slot)) for slot in slots] == [num_bytes for _, num_bytes in ranges]
        for offset, num_bytes in [
            (0, MIB + 1),
            (MIB, 1),
            (-512, 512),
            (1, 512),
            (512, 0),
            (0, -1),
            (2**70, 1),
        ]:
            wrong = Slot(offset, num_bytes, 1)
            with pytest.raises(
                SlotError, match=f"{re.escape(str(wrong))} is not .* in this pool of {MIB} bytes"
            ):
                attached.pin([slots[0], wrong])
            with pytest.raises(SlotError, match="slots that its owner reserved"):
                attached.view(wrong)


def test_a_slot_size_larger_than_the_pool_is_an_error_that_names_both(owner: HostPool) -> None:
    with AttachedPool(owner.handle) as attached:
        attached.fit_slabs((1, 512, MIB))
        with pytest.raises(ConfigError, match=f"pool of {MIB} bytes cannot hold one slot of {MIB + 1} bytes"):
            attached.fit_slabs((512, MIB + 1))


def test_a_closed_attached_pool_refuses_everything_and_the_owner_goes_on(owner: HostPool) -> None:
    (slot,) = owner.reserve_slots(4096, 1)
    attached = AttachedPool(owner.handle)
    attached.pin([slot])
    assert not attached.closed
    attached.close()
    attached.close()
    assert attached.closed
    for use in (
        lambda: attached.view(slot),
        lambda: attached.pin([slot]),
        lambda: attached.fit_slabs((4096,)),
        attached.arena_bytes,
    ):
        with pytest.raises(PoolClosedError, match="attach again"):
            use()
    attached.unpin([slot])
    owner.view(slot)[:] = b"y" * 4096
    owner.free(slot)


def test_a_transfer_of_a_closed_attached_pool_is_refused_and_leaves_the_caches(owner: HostPool) -> None:
    _, kv_caches, own = make_transfer("packed_kv", 1, owner, "cpu")
    attached = AttachedPool(owner.handle)
    _, _, transfer = make_transfer("packed_kv", 1, attached, "cpu")
    before = numpy_copy(kv_caches)
    with own.reserve(GROUP, 1) as slots:
        attached.close()
        with pytest.raises(PoolClosedError, match="attach again"):
            transfer.restore(kv_caches, GROUP, [0], slots)
    assert_same_caches(kv_caches, before)
