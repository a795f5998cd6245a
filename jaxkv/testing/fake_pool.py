"""A host pool without memory: the real division into slabs and slots, and nothing behind them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import final

from jaxkv.errors import SlotError
from jaxkv.slabs import SlabAllocator, choose_slab_bytes


@final
@dataclass(frozen=True, slots=True)
class FakeSlot:
    """A slot; ``epoch`` tells it from every other slot at the same place."""

    offset: int
    num_bytes: int
    epoch: int


@final
class FakePool:
    """Satisfies ``jaxkv.offload.slots.SlotPool``; ``slab_bytes`` fixes the cut."""

    def __init__(self, capacity_bytes: int, slab_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.closed = False
        self.live: set[FakeSlot] = set()
        self._slab_bytes = slab_bytes
        self._slabs = SlabAllocator(capacity_bytes, slab_bytes or capacity_bytes)
        self._epochs = count(1)

    @property
    def used_bytes(self) -> int:
        """Bytes of slots in use, alignment included."""
        return self._slabs.used_bytes

    @property
    def num_slabs(self) -> int:
        """Number of slabs."""
        return self._slabs.num_slabs

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Choose the cut for these slot sizes."""
        if self._slab_bytes is None:
            self._slabs = SlabAllocator(
                self.capacity_bytes, choose_slab_bytes(self.capacity_bytes, set(slot_sizes))
            )

    def max_slots(self, slot_bytes: int) -> int:
        """Slots of this size in an empty pool."""
        return self._slabs.max_slots(slot_bytes)

    def try_reserve(self, slot_bytes: int) -> FakeSlot | None:
        """A free slot, or ``None``."""
        offset = self._slabs.allocate(slot_bytes)
        if offset is None:
            return None
        slot = FakeSlot(offset, slot_bytes, next(self._epochs))
        self.live.add(slot)
        return slot

    def free(self, slot: FakeSlot) -> None:
        """Give one slot back; ``SlotError`` if it is not in use."""
        if slot not in self.live:
            raise SlotError(f"{slot} is not in use")
        self.live.remove(slot)
        self._slabs.free(slot.offset)

    def slab_of(self, slot: FakeSlot) -> int:
        """The slab a slot lies in."""
        return self._slabs.slab_of(slot.offset)
