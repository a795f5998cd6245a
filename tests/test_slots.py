"""`Slots`: a sequence of slots that is two arrays."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from jaxkv.errors import SlotError
from jaxkv.host_pool import HostPool, Slot, Slots
from jaxkv.slots import slot_columns

SLOTS = [Slot(0, 700, 5), Slot(1024, 700, 9), Slot(512, 700, 2), Slot(8192, 700, 7)]


def make_slots() -> Slots:
    return Slots(np.array([0, 1024, 512, 8192]), np.array([5, 9, 2, 7]), 700)


def test_slots_are_the_sequence_of_what_they_name() -> None:
    slots = make_slots()
    assert list(slots) == SLOTS
    assert list(reversed(slots)) == SLOTS[::-1]
    assert len(slots) == 4
    assert (slots[0], slots[-1], slots[np.int64(2)]) == (SLOTS[0], SLOTS[3], SLOTS[2])
    assert SLOTS[2] in slots
    assert slots.index(SLOTS[3]) == 3
    assert Slot(0, 700, 4) not in slots
    assert all(type(value) is int for value in (slots[1].offset, slots[1].epoch))
    with pytest.raises(IndexError):
        slots[4]
    first, *others = slots
    assert [first, *others] == SLOTS


@pytest.mark.parametrize("part", [slice(1, 3), slice(None, None, -1), slice(0, 4, 2), slice(5, 9)], ids=str)
def test_a_slice_of_slots_is_slots(part: slice) -> None:
    slots = make_slots()[part]
    assert isinstance(slots, Slots)
    assert list(slots) == SLOTS[part]
    assert slots.offsets.flags.c_contiguous
    assert slots.num_bytes == 700


def test_slots_are_equal_where_they_name_the_same_slots_in_the_same_order() -> None:
    slots = make_slots()
    assert slots == make_slots()
    assert hash(slots) == hash(make_slots())
    assert slots == Slots.of(SLOTS, 700)
    for other in (
        slots[::-1],
        slots[:3],
        Slots(slots.offsets, slots.epochs, 701),
        Slots(slots.offsets + 512, slots.epochs, 700),
        Slots(slots.offsets, slots.epochs + 1, 700),
    ):
        assert slots != other
    assert slots != SLOTS


def test_slots_survive_pickle_and_copies() -> None:
    slots = make_slots()
    for again in (pickle.loads(pickle.dumps(slots)), copy.copy(slots), copy.deepcopy(slots)):
        assert again == slots
        assert not again.offsets.flags.writeable


def test_slots_cannot_be_changed_and_leave_the_arrays_they_are_made_of_writable() -> None:
    offsets = np.array([0, 512])
    slots = Slots(offsets, np.array([1, 2]), 512)
    with pytest.raises(ValueError, match="read-only"):
        slots.offsets[0] = 512
    with pytest.raises(ValueError, match="read-only"):
        slots[:1].epochs[0] = 512
    offsets[0] = 1024


def test_slots_without_an_offset_and_an_epoch_each_are_an_error() -> None:
    for offsets, epochs in (([0, 512], [1]), ([[0]], [[1]])):
        with pytest.raises(SlotError, match="an offset and an epoch each"):
            Slots(np.array(offsets), np.array(epochs), 512)


def test_slots_of_several_sizes_are_an_error_that_names_the_first() -> None:
    assert len(Slots.of([], 512)) == 0
    mixed = [*SLOTS, Slot(4096, 512, 1), Slot(4096, 100, 1)]
    with pytest.raises(SlotError, match=r"Slot\(offset=4096, num_bytes=512, epoch=1\) does not hold 700"):
        Slots.of(mixed, 700)
    with pytest.raises(SlotError, match="does not hold 512"):
        Slots.of(make_slots(), 512)


def test_columns_of_plain_slots_keep_their_sizes_and_bound_what_no_slot_can_be() -> None:
    columns = slot_columns([Slot(2**70, 1, 5), Slot(512, 600, -(2**64))])
    assert [column.tolist() for column in columns] == [[2**63 - 1, 512], [5, -(2**63)], [1, 600]]
    assert [column.tolist() for column in slot_columns(())] == [[], [], []]
    assert [column.tolist() for column in slot_columns(make_slots()[:2])] == [[0, 1024], [5, 9], [700, 700]]


def test_a_pool_takes_slots_and_plain_slots_of_several_sizes_alike() -> None:
    with HostPool(1 << 20) as pool:
        pool.fit_slabs((700, 5000))
        slots = pool.reserve_slots(700, 6)
        assert isinstance(slots, Slots)
        (other,) = pool.reserve_slots(5000, 1)
        mixed = [*slots[:2], other]
        assert pool.pin(slots).tolist() == [slot.offset // 512 for slot in slots]
        assert pool.pin(mixed).tolist() == [pool.address(slot) for slot in mixed]
        pool.free_slots([*slots, other])
        assert pool.used_bytes == 6 * 1024 + 8192
        pool.unpin(slots)
        assert pool.used_bytes == 2 * 1024 + 8192
        pool.unpin(mixed)
        assert pool.used_bytes == 0


def test_a_pool_tells_the_stale_slot_of_many() -> None:
    with HostPool(1 << 20) as pool:
        slots = pool.reserve_slots(700, 6)
        pool.free(slots[3])
        wrong_size = Slots(slots.offsets, slots.epochs, 701)
        for use in (pool.pin, pool.free_slots):
            with pytest.raises(SlotError, match=f"epoch={slots[3].epoch}\\) is not in use"):
                use(slots)
            with pytest.raises(SlotError, match=r"num_bytes=701, .* is not in use"):
                use(wrong_size)
            with pytest.raises(SlotError, match=r"offset=1180591620717411303424, .* is not in use"):
                use([slots[0], Slot(2**70, 700, 1)])
        with pytest.raises(SlotError, match="named twice"):
            pool.free_slots(Slots(slots.offsets[[0, 0]], slots.epochs[[0, 0]], 700))
        assert pool.used_bytes == 5 * 1024
        pool.free_slots(slots[:3])
        pool.free_slots(slots[4:])
