"""The host pool: sizes, slots, views and the ways it refuses to be used."""

from __future__ import annotations

import gc
import os
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jaxkv import host_pool
from jaxkv.errors import (
    ConfigError,
    NativeError,
    PoolClosedError,
    PoolFull,
    PoolInUseError,
    SlotError,
)
from jaxkv.host_pool import HostPool
from jaxkv.memory_limit import available_memory_bytes

MIB = 1 << 20


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("asked", "given"),
    [(1, 4096), (4096, 4096), (8191, 4096), (3 * MIB + 1, 3 * MIB), (4 * MIB - 1, 4 * MIB - 4096)],
)
def test_a_pool_is_the_whole_pages_asked_for_and_at_least_one(asked: int, given: int, shared: bool) -> None:
    with HostPool(asked, shared=shared) as pool:
        assert pool.capacity_bytes == given
        assert pool.free_bytes == given
        assert pool.used_bytes == 0


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("asked", [4096, 3 * MIB + 1, 8 * MIB, 8 * MIB + 4097])
def test_a_pool_maps_no_more_memory_than_it_was_given(asked: int, shared: bool) -> None:
    def mapped_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    def growth() -> int:
        before = mapped_bytes()
        with HostPool(asked, shared=shared):
            return mapped_bytes() - before

    growth()  # Starts the threads that fill arenas.
    assert min(growth() for _ in range(5)) == asked // 4096 * 4096


@pytest.mark.parametrize("asked", [4096, 3 * MIB + 1, 8 * MIB, 8 * MIB + 4097])
def test_a_shared_pool_is_one_mapping_that_holds_no_more_than_it_was_given(asked: int) -> None:
    with HostPool(asked, shared=True) as pool:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        (at,) = [at for at, line in enumerate(lines) if pool.handle.nonce in line]
        sizes = dict(line.split(":", 1) for line in lines[at + 1 : at + 10])
        assert int(sizes["Size"].split()[0]) == int(sizes["Rss"].split()[0]) == asked // 4096 * 4


@pytest.mark.parametrize("shared", [False, True])
def test_the_whole_pool_is_resident_from_the_start(shared: bool) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    with HostPool(64 * MIB, shared=shared):
        assert resident_bytes() - before > 60 * MIB
    assert resident_bytes() - before < 30 * MIB


@pytest.mark.parametrize("capacity", [0, -4096, 1.5, True, "64MiB", None, 2**41], ids=repr)
def test_a_capacity_that_is_no_sensible_number_of_bytes_is_an_error(capacity: object) -> None:
    with pytest.raises(ConfigError, match=str(capacity)):
        HostPool(capacity)  # type: ignore[arg-type]


def test_a_capacity_beyond_the_memory_that_is_left_names_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_pool, "available_memory_bytes", lambda: 8 * MIB)
    with pytest.raises(ConfigError, match=f"{8 * MIB + 1} bytes is more than the {8 * MIB} bytes"):
        HostPool(8 * MIB + 1)


def write_file(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_memory_left_is_the_least_of_all_control_groups(tmp_path: Path) -> None:
    physical = available_memory_bytes(tmp_path)
    write_file(tmp_path, "proc/self/cgroup", "4:cpu:/x\n3:memory:/a/b\n0::/c\n")
    assert available_memory_bytes(tmp_path) == physical
    write_file(tmp_path, "sys/fs/cgroup/c/memory.max", "max\n")
    write_file(tmp_path, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    assert available_memory_bytes(tmp_path) == physical
    write_file(tmp_path, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "5000000\n")
    assert available_memory_bytes(tmp_path) == 5000000
    write_file(tmp_path, "sys/fs/cgroup/memory.max", "4000000\n")
    assert available_memory_bytes(tmp_path) == 4000000


def test_what_is_in_use_counts_against_the_memory_left_and_file_pages_do_not(tmp_path: Path) -> None:
    write_file(tmp_path, "proc/meminfo", "MemTotal: 9999 kB\nMemAvailable: 9000 kB\nSwapFree: 7 kB\n")
    assert available_memory_bytes(tmp_path) == 9007 * 1024
    write_file(tmp_path, "proc/self/cgroup", "3:memory:/a\n0::/c\n")
    write_file(tmp_path, "sys/fs/cgroup/c/memory.max", "5000000\n")
    write_file(tmp_path, "sys/fs/cgroup/c/memory.current", "2000000\n")
    assert available_memory_bytes(tmp_path) == 3000000
    write_file(tmp_path, "sys/fs/cgroup/c/memory.stat", "anon 1\ninactive_file 300000\nactive_file 40000\n")
    assert available_memory_bytes(tmp_path) == 3340000
    write_file(tmp_path, "sys/fs/cgroup/memory/a/memory.limit_in_bytes", "3000000\n")
    write_file(tmp_path, "sys/fs/cgroup/memory/a/memory.usage_in_bytes", "500000\n")
    write_file(tmp_path, "sys/fs/cgroup/memory/a/memory.stat", "active_file 9\ntotal_active_file 100000\n")
    assert available_memory_bytes(tmp_path) == 2600000
    write_file(tmp_path, "sys/fs/cgroup/memory/a/memory.usage_in_bytes", "90000000\n")
    assert available_memory_bytes(tmp_path) == 0


@pytest.mark.parametrize("num_slots", [-1, 1.5, "2", None], ids=repr)
def test_a_number_of_slots_that_is_none_is_an_error(num_slots: object) -> None:
    with HostPool(MIB) as pool, pytest.raises(ConfigError, match=f"cannot reserve {num_slots!r} slots"):
        pool.reserve_slots(512, num_slots)  # type: ignore[arg-type]


@pytest.mark.parametrize("slot_bytes", [0, -512, 512.0, "512"], ids=repr)
def test_a_slot_size_that_is_none_is_an_error(slot_bytes: object) -> None:
    with HostPool(MIB) as pool, pytest.raises(ConfigError, match=f"at least 1, got {slot_bytes!r}"):
        pool.try_reserve(slot_bytes)  # type: ignore[arg-type]


def test_a_reservation_of_absurdly_many_slots_is_refused_at_once() -> None:
    with HostPool(MIB) as pool, pytest.raises(PoolFull, match=f"{2**60} were asked for"):
        pool.reserve_slots(4096, 2**60)


def test_slots_freed_together_are_freed_all_or_not_at_all() -> None:
    with HostPool(MIB) as pool:
        first, second, stale = pool.reserve_slots(4096, 3)
        pool.free(stale)
        for wrong, message in (((first, stale, second), "was freed"), ((first, first), "named twice")):
            with pytest.raises(SlotError, match=message):
                pool.free_slots(wrong)
            assert pool.used_bytes == 8192
        pool.free_slots((first, second))
        assert pool.used_bytes == 0


@pytest.mark.parametrize(("slot_bytes", "alignment"), [(1, 512), (600, 512), (4095, 512), (4097, 4096)])
def test_slots_are_aligned_disjoint_and_inside_the_pool(slot_bytes: int, alignment: int) -> None:
    with HostPool(MIB) as pool:
        slots = pool.reserve_slots(slot_bytes, 20)
        ranges = sorted((slot.offset, slot.offset + slot.num_bytes) for slot in slots)
        assert all(start % alignment == 0 for start, _ in ranges)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        assert ranges[-1][1] <= pool.capacity_bytes
        assert [pool.address(slot) * 512 for slot in slots] == [slot.offset for slot in slots]
        for slot in slots:
            pool.free(slot)


def test_a_full_pool_keeps_nothing_of_a_reservation_it_refuses() -> None:
    with HostPool(MIB) as pool:
        held = list(pool.reserve_slots(64 << 10, 10))
        with pytest.raises(PoolFull, match="6 free slots of 65536 bytes, 7 were asked for"):
            pool.reserve_slots(64 << 10, 7)
        held += pool.reserve_slots(64 << 10, 6)
        assert pool.try_reserve(64 << 10) is None
        assert pool.free_bytes == 0
        for slot in held:
            pool.free(slot)
        assert pool.free_bytes == MIB


def test_sizes_take_slabs_from_each_other_once_these_are_empty() -> None:
    with HostPool(64 << 10) as pool:
        pool.fit_slabs((16 << 10, 600))
        assert pool.num_slabs == 4
        assert pool.max_slots(16 << 10) == 4
        large = list(pool.reserve_slots(16 << 10, 3))
        small = pool.reserve_slots(600, 16)
        assert {pool.slab_of(slot) for slot in small}.isdisjoint(pool.slab_of(slot) for slot in large)
        assert pool.try_reserve(600) is None
        pool.free(large.pop())
        extra = pool.reserve_slots(600, 1)
        for slot in (*large, *small, *extra):
            pool.free(slot)


def test_a_slot_larger_than_the_pool_is_an_error_that_names_both() -> None:
    with HostPool(8192) as pool, pytest.raises(ConfigError, match="8192 bytes cannot hold one slot of 12288"):
        pool.reserve_slots(8193, 1)


def test_a_size_that_no_longer_fits_the_slabs_in_use_says_what_to_do() -> None:
    with HostPool(MIB) as pool:
        (slot,) = pool.reserve_slots(512, 1)
        with pytest.raises(ConfigError, match=r"fit_slabs\(\) before the first slot"):
            pool.try_reserve(512 << 10)
        pool.free(slot)
        (large,) = pool.reserve_slots(512 << 10, 1)
        pool.free(large)


def test_a_freed_slot_is_an_error_even_after_its_place_was_given_to_another() -> None:
    with HostPool(4096) as pool:
        (old,) = pool.reserve_slots(4096, 1)
        pool.free(old)
        for use in (pool.free, pool.view, pool.address, pool.slab_of):
            with pytest.raises(SlotError, match="was freed"):
                use(old)
        (new,) = pool.reserve_slots(4096, 1)
        assert new.offset == old.offset
        with pytest.raises(SlotError, match="was freed"):
            pool.view(old)
        pool.free(new)


def test_a_slot_of_another_pool_is_an_error() -> None:
    with HostPool(4096) as pool, HostPool(4096) as other:
        (slot,) = pool.reserve_slots(4096, 1)
        (same_place,) = other.reserve_slots(4096, 1)
        with pytest.raises(SlotError, match="a slot of another pool"):
            other.free(slot)
        pool.free(slot)
        other.free(same_place)


def test_a_view_is_the_slots_memory_and_has_its_exact_size() -> None:
    with HostPool(MIB) as pool:
        slot, other = pool.reserve_slots(5000, 2)
        view = pool.view(slot)
        assert (len(view), view.readonly, view.format) == (5000, False, "B")
        view[:] = bytes(range(250)) * 20
        assert bytes(pool.view(slot)) == bytes(range(250)) * 20
        assert not any(pool.view(other))
        pool.free(slot)
        pool.free(other)


def test_a_freed_slot_is_not_given_away_while_it_is_viewed() -> None:
    with HostPool(8192) as pool:
        first, second = pool.reserve_slots(4096, 2)
        array = np.frombuffer(pool.view(first), np.uint8)
        pool.free(first)
        assert pool.try_reserve(4096) is None
        assert pool.used_bytes == 8192
        del array
        gc.collect()
        again = pool.try_reserve(4096)
        assert again is not None
        assert again.offset == first.offset
        pool.free(again)
        pool.free(second)


def test_a_view_may_end_in_the_garbage_collector_while_the_pool_is_locked() -> None:
    with HostPool(4096) as pool:
        slot = pool.reserve_slots(4096, 1)[0]
        cycle: list[object] = [pool.view(slot)]
        cycle.append(cycle)
        pool.free(slot)
        del cycle
        used_bytes: list[int] = []

        def collect() -> None:
            with pool._lock:
                gc.collect()
                used_bytes.append(pool.slot_pool.used_bytes)

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert used_bytes == [0]


def test_a_view_outlives_its_pool() -> None:
    pool = HostPool(4096)
    (slot,) = pool.reserve_slots(4096, 1)
    view = pool.view(slot)
    view[:4] = b"kept"
    pool.free(slot)
    pool.close()
    assert bytes(view[:4]) == b"kept"
    view[4:8] = b"safe"


def test_leaving_a_pool_with_slots_in_use_is_an_error_but_closes_it() -> None:
    with pytest.raises(PoolInUseError, match="closed with 2 slots in use"), HostPool(MIB) as pool:
        pool.reserve_slots(512, 2)
    assert pool.closed
    pool.close()


def test_an_error_inside_the_with_block_is_not_hidden_by_slots_in_use() -> None:
    pool = HostPool(MIB)

    def fail() -> None:
        with pool:
            pool.reserve_slots(512, 1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert pool.closed


def test_a_closed_pool_refuses_everything() -> None:
    pool = HostPool(MIB)
    (slot,) = pool.reserve_slots(512, 1)
    pool.free(slot)
    pool.close()
    for use in (
        lambda: pool.reserve_slots(512, 1),
        lambda: pool.try_reserve(512),
        lambda: pool.free(slot),
        lambda: pool.view(slot),
        lambda: pool.pin([slot]),
        lambda: pool.used_bytes,
        lambda: pool.max_slots(512),
        pool.arena_bytes,
    ):
        with pytest.raises(PoolClosedError, match="open a new one"):
            use()


def test_the_native_view_checks_its_range_and_the_arena_itself() -> None:
    with HostPool(8192) as pool:
        arena = pool._arena
        for offset, length in ((-1, 1), (0, 8193), (8192, 1), (2**62, 2**62), (0, -1)):
            with pytest.raises(IndexError):
                arena.view(offset, length)
    with pytest.raises(PoolClosedError):
        arena.view(0, 1)
    with pytest.raises(ConfigError):
        type(arena)(-1)


def test_a_refused_allocation_is_an_error_and_not_a_crash() -> None:
    with HostPool(4096) as pool, pytest.raises(ConfigError, match="the system refused"):
        type(pool._arena)(2**60)


def test_a_missing_extension_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxkv._native", None)
    monkeypatch.delattr("jaxkv._native", raising=False)
    host_pool.load_native.cache_clear()
    with pytest.raises(NativeError, match=r"pip install \."):
        HostPool(4096)
