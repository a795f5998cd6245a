"""Which slots of a pool were prefetched as they are now. Knows reservations, no bytes."""

from __future__ import annotations

import threading
from typing import final

from jaxkv.slots import Int64s

_MOST_KNOWN = 1 << 16


@final
class PrefetchedSlots:
    """Reservations, by epoch, whose bytes were prefetched: what a device holds of a place in a pool may be of
    a reservation before.

    Of very many the oldest are forgotten. All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._known: dict[int, None] = {}
        self._any = False
        self._lock = threading.Lock()

    def add(self, epochs: Int64s) -> None:
        """These are prefetched from now on."""
        with self._lock:
            self._any = True
            self._known |= dict.fromkeys(epochs.tolist())
            for epoch in list(self._known)[: max(len(self._known) - _MOST_KNOWN, 0)]:
                del self._known[epoch]

    def take(self, epochs: Int64s) -> bool:
        """Whether what was prefetched of these places, if anything, is of these reservations. They no longer
        count as prefetched."""
        if not self._any:
            return True
        with self._lock:
            taken = [self._known.pop(epoch, self) is None for epoch in epochs.tolist()]
        return all(taken)
