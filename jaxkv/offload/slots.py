"""What a host backend asks of its pool. ``jaxkv.host_pool.HostPool`` is one; tests bring their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

Slot = Any
"""Room for one chunk in a pool. Only the pool and the transfer look inside."""


class SlotPool(Protocol):
    """Equal slabs, each cut into slots of one size at a time; an empty slab may serve another size."""

    @property
    def closed(self) -> bool:
        """Whether the pool can no longer be used."""

    @property
    def num_slabs(self) -> int:
        """Number of slabs."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slabs."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use."""

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Learn which slot sizes will be asked for. Raises ``ConfigError`` for one that does not fit."""

    def max_slots(self, slot_bytes: int) -> int:
        """Slots of this size that an empty pool holds."""

    def try_reserve(self, slot_bytes: int) -> Slot | None:
        """A free slot, or ``None``."""

    def free(self, slot: Slot) -> None:
        """Give one slot back."""

    def slab_of(self, slot: Slot) -> int:
        """Index of the slab a slot lies in."""
