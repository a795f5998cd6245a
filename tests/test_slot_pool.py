"""The compiled bookkeeping of slots against a plain Python model: who gets which slot, and for how long."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxkv._native import SlotPool
from jaxkv.errors import ConfigError
from jaxkv.slabs import slot_stride

PAGE = 4096
CAPACITY = 24 * PAGE + 100
SIZES = (1, 600, 2000, 4095, 4096, 5000, 12288, 20000)
SLABS = (512, 4096, 12288, 20480, CAPACITY)

Ref = tuple[int, int]
"""Offset and epoch."""


class Model:
    """Slabs as lists of free offsets; slots in use and pins as dictionaries."""

    def __init__(self, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self.idle = list(range(CAPACITY // slab_bytes))[::-1]
        self.strides: dict[int, int] = {}
        self.free_offsets: dict[int, list[int]] = {}
        self.with_room: list[int] = []
        self.live: dict[Ref, int] = {}
        self.held: dict[int, int] = {}
        self.pins: Counter[Ref] = Counter()

    def num_free(self, size: int) -> int:
        stride = slot_stride(size)
        in_use = sum(len(self.free_offsets[s]) for s in self.with_room if self.strides[s] == stride)
        return in_use + len(self.idle) * (self.slab_bytes // stride)

    def next_offset(self, size: int) -> int:
        stride = slot_stride(size)
        if not any(self.strides[slab] == stride for slab in self.with_room):
            slab = self.idle.pop()
            count = self.slab_bytes // stride
            self.strides[slab] = stride
            self.free_offsets[slab] = [slab * self.slab_bytes + i * stride for i in range(count)][::-1]
            self.with_room.append(slab)
        slab = next(slab for slab in self.with_room if self.strides[slab] == stride)
        offset = self.free_offsets[slab].pop()
        if not self.free_offsets[slab]:
            self.with_room.remove(slab)
        self.held[offset] = stride
        return offset

    def free(self, ref: Ref) -> None:
        del self.live[ref]
        if not self.pins[ref]:
            self.give_back(ref[0])

    def unpin(self, ref: Ref) -> None:
        self.pins[ref] -= 1
        if not self.pins[ref] and ref not in self.live:
            self.give_back(ref[0])

    def give_back(self, offset: int) -> None:
        slab = offset // self.slab_bytes
        del self.held[offset]
        self.free_offsets[slab].append(offset)
        if slab not in self.with_room:
            self.with_room.append(slab)
        if not any(other // self.slab_bytes == slab for other in self.held):
            self.with_room.remove(slab)
            del self.strides[slab], self.free_offsets[slab]
            self.idle.append(slab)


def columns(refs: list[Ref]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(refs, np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


class SlotPoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(CAPACITY, CAPACITY)
        self.model = Model(CAPACITY)
        self.ever: list[Ref] = []
        self.pinned: list[list[Ref]] = []

    @rule(slab_bytes=st.sampled_from(SLABS))
    def cut(self, slab_bytes: int) -> None:
        may = not self.model.held
        assert self.pool.cut(slab_bytes) == may
        if may:
            self.model = Model(slab_bytes)

    @rule(size=st.sampled_from(SIZES), count=st.integers(0, 6))
    def reserve_many(self, size: int, count: int) -> None:
        reserved = self.pool.reserve_many(size, count)
        assert (reserved is not None) == (count <= self.model.num_free(size))
        if reserved is not None:
            self.check_new(size, list(zip(*(column.tolist() for column in reserved), strict=True)))

    @rule(size=st.sampled_from(SIZES))
    def reserve(self, size: int) -> None:
        slot = self.pool.reserve(size)
        assert (slot is not None) == (self.model.num_free(size) > 0)
        if slot is not None:
            self.check_new(size, [slot])

    def check_new(self, size: int, refs: list[Ref]) -> None:
        for ref in refs:
            assert ref[0] == self.model.next_offset(size)
            assert ref[1] > max((epoch for _, epoch in self.ever), default=0)
            self.ever.append(ref)
            self.model.live[ref] = size

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), recent=st.integers(1, 8))
    def free(self, data: st.DataObject, recent: int) -> None:
        refs = data.draw(st.lists(st.sampled_from(self.ever[-recent:]), max_size=4))
        may = all(ref in self.model.live for ref in refs) and len(set(refs)) == len(refs)
        assert self.pool.free(*columns(refs)) == may
        for ref in refs if may else ():
            self.model.free(ref)

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), recent=st.integers(1, 8))
    def pin(self, data: st.DataObject, recent: int) -> None:
        refs = data.draw(st.lists(st.sampled_from(self.ever[-recent:]), max_size=4))
        may = all(ref in self.model.live for ref in refs)
        assert self.pool.pin(*columns(refs)) == may
        if may:
            self.model.pins.update(refs)
            self.pinned.append(refs)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        refs = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.pool.unpin(*columns(refs))
        for ref in refs:
            self.model.unpin(ref)

    @precondition(lambda self: self.ever)
    @rule(data=st.data(), size=st.sampled_from(SIZES))
    def ask(self, data: st.DataObject, size: int) -> None:
        refs = data.draw(st.lists(st.sampled_from(self.ever), max_size=4))
        sizes = [self.model.live.get(ref, size) for ref in refs]
        wrong = [at for at, ref in enumerate(refs) if ref not in self.model.live]
        stale = self.pool.first_not_live(*columns(refs), np.array(sizes, np.int64))
        assert stale == (wrong[0] if wrong else None)
        resized = [at for at, ref in enumerate(refs) if self.model.live.get(ref) != size]
        stale = self.pool.first_not_live(*columns(refs), np.full(len(refs), size))
        assert stale == (resized[0] if resized else None)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.slab_bytes == self.model.slab_bytes
        assert self.pool.used_bytes == sum(self.model.held.values())
        assert self.pool.num_live == len(self.model.live)
        assert [self.pool.num_free(size) for size in SIZES] == [self.model.num_free(size) for size in SIZES]
        offsets, epochs, sizes = (column.tolist() for column in self.pool.list_live())
        assert dict(zip(zip(offsets, epochs, strict=True), sizes, strict=True)) == self.model.live
        assert offsets == sorted(offsets)

    @invariant()
    def slots_lie_apart_and_inside_one_slab(self) -> None:
        ranges = sorted((offset, offset + stride) for offset, stride in self.model.held.items())
        assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
        for start, stop in ranges:
            assert self.pool.slab_of(start) == self.pool.slab_of(stop - 1) < self.pool.num_slabs


TestSlotPoolMachine = SlotPoolMachine.TestCase
TestSlotPoolMachine.settings = settings(stateful_step_count=60)


def test_many_slabs_of_one_slot_are_all_given_out_and_come_back() -> None:
    pool = SlotPool(10_000 * PAGE, PAGE)
    reserved = pool.reserve_many(PAGE, 10_000)
    assert reserved is not None
    offsets, epochs = reserved
    assert offsets.tolist() == list(range(0, 10_000 * PAGE, PAGE))
    assert (np.diff(epochs) == 1).all()
    assert pool.reserve(1) is None
    assert pool.free(offsets, epochs)
    assert pool.num_free(512) == 80_000


@pytest.mark.parametrize("slab_bytes", [0, -4096, 8192])
def test_slabs_that_do_not_fit_the_pool_are_an_error_and_leave_it_as_it_was(slab_bytes: int) -> None:
    with pytest.raises(ConfigError, match=f"slabs of {slab_bytes} bytes do not fit 4096 bytes"):
        SlotPool(PAGE, slab_bytes)
    pool = SlotPool(PAGE, 512)
    with pytest.raises(ConfigError, match=f"slabs of {slab_bytes} bytes do not fit 4096 bytes"):
        pool.cut(slab_bytes)
    assert pool.slab_bytes == 512


@pytest.mark.parametrize("slot_bytes", [0, -1, 2**63 - 1])
def test_a_slot_size_that_cannot_be_is_an_error(slot_bytes: int) -> None:
    pool = SlotPool(PAGE, PAGE)
    for ask in (pool.reserve, pool.num_free, pool.slots_per_slab, lambda size: pool.reserve_many(size, 1)):
        with pytest.raises(ConfigError, match=f"at least 1, got {slot_bytes}"):
            ask(slot_bytes)


def test_arrays_of_different_lengths_are_refused_and_change_nothing() -> None:
    pool = SlotPool(PAGE, PAGE)
    reserved = pool.reserve_many(512, 3)
    assert reserved is not None
    offsets, epochs = reserved
    for ask in (pool.free, pool.pin, pool.unpin):
        with pytest.raises(ValueError, match="an offset and an epoch"):
            ask(offsets, epochs[:2])
    with pytest.raises(ValueError, match="a number of bytes"):
        pool.first_not_live(offsets, epochs, np.array([512]))
    assert pool.num_live == 3


def test_an_unpin_without_a_pin_is_an_error_that_names_the_place() -> None:
    pool = SlotPool(4 * PAGE, PAGE)
    reserved = pool.reserve_many(PAGE, 2)
    assert reserved is not None
    with pytest.raises(RuntimeError, match="the slot at 0 is not pinned"):
        pool.unpin(*reserved)


def test_threads_never_share_a_slot_and_every_epoch_is_new() -> None:
    pool = SlotPool(64 * PAGE, 4 * PAGE)
    owner = np.zeros(64 * 8, np.int64)
    clashes: list[int] = []
    epochs_of: list[list[int]] = [[] for _ in range(4)]

    def work(mark: int) -> None:
        for round_ in range(300):
            size = (512, PAGE)[(mark + round_) % 2]
            reserved = pool.reserve_many(size, 4)
            if reserved is None:
                continue
            offsets, epochs = reserved
            units = [slice(offset // 512, (offset + size) // 512) for offset in offsets.tolist()]
            for unit in units:
                owner[unit] = mark
            epochs_of[mark].extend(epochs.tolist())
            if any((owner[unit] != mark).any() for unit in units):
                clashes.append(mark)
            assert pool.pin(offsets, epochs)
            assert pool.free(offsets, epochs)
            pool.unpin(offsets, epochs)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    epochs = [epoch for some in epochs_of for epoch in some]
    assert not clashes
    assert len(set(epochs)) == len(epochs) > 0
    assert (pool.used_bytes, pool.num_live, pool.num_free(PAGE)) == (0, 0, 64)
