"""Which slots count as prefetched: those reservations that were, once, and none of the same places later."""

import numpy as np
import numpy.typing as npt

from jaxkv.transfer.prefetched import PrefetchedSlots

HERE, ELSEWHERE = "here", "elsewhere"


def epochs(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


def test_where_nothing_was_ever_prefetched_nothing_stale_can_be_found() -> None:
    assert PrefetchedSlots().take(epochs(1, 2), HERE)


def test_slots_count_as_prefetched_until_they_are_taken() -> None:
    slots = PrefetchedSlots()
    slots.add(epochs(1, 2, 3), HERE)
    assert slots.take(epochs(2, 1), HERE)
    assert not slots.take(epochs(2), HERE)
    assert slots.take(epochs(3), HERE)
    assert not slots.take(epochs(3), HERE)


def test_one_slot_that_was_not_prefetched_is_enough() -> None:
    slots = PrefetchedSlots()
    slots.add(epochs(1), HERE)
    assert not slots.take(epochs(1, 7), HERE)
    assert not slots.take(epochs(1), HERE)


def test_of_very_many_the_oldest_are_forgotten() -> None:
    slots = PrefetchedSlots()
    slots.add(np.arange(70_000, dtype=np.int64), HERE)
    assert not slots.take(epochs(70_000 - (1 << 16) - 1), HERE)
    assert slots.take(epochs(70_000 - (1 << 16)), HERE)
    assert slots.take(epochs(69_999), HERE)


def test_slots_count_only_where_they_wait() -> None:
    slots = PrefetchedSlots()
    slots.add(epochs(1, 2), ELSEWHERE)
    slots.add(epochs(2), HERE)
    assert not slots.take(epochs(1), HERE)
    assert slots.take(epochs(2), HERE)


def test_slots_that_are_written_anew_count_no_longer() -> None:
    slots = PrefetchedSlots()
    slots.add(epochs(1, 2), HERE)
    slots.forget(epochs(1))
    assert not slots.take(epochs(1), HERE)
    assert slots.take(epochs(2), HERE)
