"""Properties of the slab allocator, checked against a plain list of what is in use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.errors import ConfigError
from jaxkv.slabs import SlabAllocator, choose_slab_bytes, slot_stride

SIZES = st.lists(st.integers(1, 40_000), min_size=1, max_size=4, unique=True)
ACTIONS = st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=150)


@given(slot_bytes=st.integers(1, 10**9))
def test_a_stride_holds_the_slot_and_keeps_the_alignment(slot_bytes: int) -> None:
    unit = 4096 if slot_bytes >= 4096 else 512
    stride = slot_stride(slot_bytes)
    assert stride % unit == 0
    assert 0 <= stride - slot_bytes < unit


@given(sizes=SIZES, capacity_pages=st.integers(1, 400))
def test_slabs_hold_every_size_and_fit_the_arena(sizes: list[int], capacity_pages: int) -> None:
    capacity = capacity_pages * 4096
    largest = max(map(slot_stride, sizes))
    if largest > capacity:
        with pytest.raises(ConfigError, match=f"{capacity} bytes cannot hold one slot of {largest} bytes"):
            choose_slab_bytes(capacity, sizes)
        return
    slab_bytes = choose_slab_bytes(capacity, sizes)
    assert largest <= slab_bytes <= capacity
    assert capacity // slab_bytes >= min(capacity // max(largest, 4096), 8)
    if largest >= 4096:
        assert slab_bytes % 4096 == 0


@given(size=st.integers(1, 40_000), capacity_pages=st.integers(100, 400))
def test_one_slot_size_alone_wastes_less_than_one_slot_in_sixteen(size: int, capacity_pages: int) -> None:
    capacity = capacity_pages * 4096
    slabs = SlabAllocator(capacity, choose_slab_bytes(capacity, [size]))
    if slot_stride(size) >= 4096:
        assert slabs.max_slots(size) == capacity // slot_stride(size)
    assert slabs.max_slots(size) * slot_stride(size) >= capacity - capacity // 8 - slabs.slab_bytes


@given(sizes=SIZES, actions=ACTIONS, capacity_pages=st.integers(10, 60))
def test_slots_in_use_never_overlap_and_all_bytes_come_back(
    sizes: list[int], actions: list[tuple[bool, int]], capacity_pages: int
) -> None:
    capacity = capacity_pages * 4096
    slabs = SlabAllocator(capacity, choose_slab_bytes(capacity, sizes))
    in_use: dict[int, int] = {}
    for allocates, pick in actions:
        if allocates:
            size = sizes[pick % len(sizes)]
            expected = slabs.num_free(size)
            offset = slabs.allocate(size)
            assert (offset is None) == (expected == 0)
            if offset is None:
                continue
            stride = slot_stride(size)
            assert slabs.num_free(size) == expected - 1
            assert offset % (4096 if size >= 4096 else 512) == 0
            assert offset + stride <= capacity
            assert slabs.slab_of(offset) == slabs.slab_of(offset + stride - 1)
            assert all(offset + stride <= other or other + taken <= offset for other, taken in in_use.items())
            in_use[offset] = stride
        elif in_use:
            offset = sorted(in_use)[pick % len(in_use)]
            slabs.free(offset)
            del in_use[offset]
        assert slabs.used_bytes == sum(in_use.values())
    for offset in in_use:
        slabs.free(offset)
    assert slabs.used_bytes == 0
    assert all(slabs.num_free(size) == slabs.max_slots(size) for size in sizes)


@given(sizes=SIZES, capacity_pages=st.integers(30, 60))
def test_a_slab_serves_one_size_at_a_time(sizes: list[int], capacity_pages: int) -> None:
    capacity = capacity_pages * 4096
    slabs = SlabAllocator(capacity, choose_slab_bytes(capacity, sizes))
    strides: dict[int, int] = {}
    for turn in range(200):
        size = sizes[turn % len(sizes)]
        offset = slabs.allocate(size)
        if offset is not None:
            assert strides.setdefault(slabs.slab_of(offset), slot_stride(size)) == slot_stride(size)


@pytest.mark.parametrize("slab_bytes", [0, -4096, 8192])
def test_slabs_that_do_not_fit_the_arena_are_an_error(slab_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"slabs of {slab_bytes} bytes do not fit 4096 bytes"):
        SlabAllocator(4096, slab_bytes)


def test_a_slot_of_no_bytes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        slot_stride(0)
