"""Which slots of a pool were prefetched as they are now, and where to. Knows reservations, no bytes."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import final

from jaxkv.slots import Int64s

_MOST_KNOWN = 1 << 16


@final
class PrefetchedSlots:
    """Reservations, by epoch, and where their bytes wait: what a device holds of an address may be of a
    reservation before, of records of another size, or older than what another device has written.

    Of very many the oldest are forgotten. All methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._known: dict[int, Hashable] = {}
        self._any = False
        self._lock = threading.Lock()

    def add(self, epochs: Int64s, place: Hashable) -> None:
        """These wait at ``place`` from now on."""
        with self._lock:
            self._any = True
            self._known |= dict.fromkeys(epochs.tolist(), place)
            for epoch in list(self._known)[: max(len(self._known) - _MOST_KNOWN, 0)]:
                del self._known[epoch]

    def take(self, epochs: Int64s, place: Hashable) -> bool:
        """Whether what waits at ``place``, if anything, is what these reservations hold. They no longer count
        as prefetched."""
        if not self._any:
            return True
        with self._lock:
            places = [self._known.pop(epoch, self) for epoch in epochs.tolist()]
        return all(known == place for known in places)

    def forget(self, epochs: Int64s) -> None:
        """These are written anew."""
        self.take(epochs, self)
