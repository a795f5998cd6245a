"""What a host backend asks of its pool. ``jaxkv.host_pool.HostPool`` is one; tests bring their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from jaxkv._native import SlotPool as NativeSlotPool


class SlotPool(Protocol):
    """Equal slabs, each cut into slots of one size at a time; an empty slab may serve another size."""

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all slabs."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots in use."""

    @property
    def closed(self) -> bool:
        """Whether the pool can no longer be used."""

    @property
    def slot_pool(self) -> NativeSlotPool:
        """Which slots are in use, for compiled code that reserves and frees by itself."""

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Learn which slot sizes will be asked for. Raises ``ConfigError`` for one that does not fit."""
