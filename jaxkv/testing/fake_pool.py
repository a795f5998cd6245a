"""A host pool without memory: the real division into slabs and slots, and nothing behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, final

from jaxkv.errors import SlotError
from jaxkv.host_pool import load_native
from jaxkv.slabs import choose_slab_bytes
from jaxkv.slots import Slot, slot_columns

if TYPE_CHECKING:
    from jaxkv._native import SlotPool


@final
class FakePool:
    """Satisfies ``jaxkv.offload.slots.SlotPool``; ``slab_bytes`` fixes the cut."""

    def __init__(self, capacity_bytes: int, slab_bytes: int | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.closed = False
        self.slot_pool: SlotPool = load_native().SlotPool(capacity_bytes, slab_bytes or capacity_bytes)
        self._is_cut = slab_bytes is not None

    @property
    def live(self) -> set[Slot]:
        """The slots in use."""
        columns = (column.tolist() for column in self.slot_pool.list_live())
        return {Slot(offset, size, epoch) for offset, epoch, size in zip(*columns, strict=True)}

    @property
    def used_bytes(self) -> int:
        """Bytes of slots in use, alignment included."""
        return self.slot_pool.used_bytes

    @property
    def num_slabs(self) -> int:
        """Number of slabs."""
        return self.slot_pool.num_slabs

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Choose the cut for these slot sizes, before any slot is in use."""
        if not self._is_cut:
            fits = self.slot_pool.cut(choose_slab_bytes(self.capacity_bytes, set(slot_sizes)))
            assert fits, "slots are in use, so the slabs stay as they are"

    def max_slots(self, slot_bytes: int) -> int:
        """Slots of this size in an empty pool."""
        return self.slot_pool.num_slabs * self.slot_pool.slots_per_slab(slot_bytes)

    def try_reserve(self, slot_bytes: int) -> Slot | None:
        """A free slot, or ``None``."""
        reserved = self.slot_pool.reserve(slot_bytes)
        return None if reserved is None else Slot(reserved[0], slot_bytes, reserved[1])

    def free(self, slot: Slot) -> None:
        """Give one slot back; ``SlotError`` if it is not in use."""
        offsets, epochs, _ = slot_columns((slot,))
        if not self.slot_pool.free(offsets, epochs):
            raise SlotError(f"{slot} is not in use")

    def slab_of(self, slot: Slot) -> int:
        """The slab a slot lies in."""
        return self.slot_pool.slab_of(slot.offset)
