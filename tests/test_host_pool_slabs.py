"""Properties of the cut: how large slabs are for the slot sizes that were named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.errors import ConfigError
from jaxkv.slabs import choose_slab_bytes, slot_stride

SIZES = st.lists(st.integers(1, 40_000), min_size=1, max_size=4, unique=True)


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
    slab_bytes = choose_slab_bytes(capacity, [size])
    max_slots = capacity // slab_bytes * (slab_bytes // slot_stride(size))
    if slot_stride(size) >= 4096:
        assert max_slots == capacity // slot_stride(size)
    assert max_slots * slot_stride(size) >= capacity - capacity // 8 - slab_bytes


@given(size=st.integers(1, 1 << 20), num_slots=st.integers(1 << 14, 1 << 18))
def test_many_slots_of_one_size_share_slabs_whatever_their_number(size: int, num_slots: int) -> None:
    capacity = num_slots * slot_stride(size)
    slab_bytes = choose_slab_bytes(capacity, [size])
    slots_per_slab = slab_bytes // slot_stride(size)
    assert slots_per_slab >= 16
    in_a_page = 8  # An arena that ends within a page leaves that unused, too.
    assert capacity // slab_bytes * slots_per_slab >= num_slots - num_slots // 1024 - in_a_page


def test_a_slot_of_no_bytes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        slot_stride(0)
