"""Which transfers of a pool have not ended: keeps their slots pinned, and orders them where XLA does not."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import final
from weakref import WeakKeyDictionary, ref

import numpy as np

from jaxkv.keys import GroupId
from jaxkv.shared_pool import AnyPool
from jaxkv.slots import Slots
from jaxkv.transfer.prefetched import PrefetchedSlots
from jaxkv.transfer.ticket import Move, Ticket


@final
@dataclass(frozen=True, slots=True)
class SlotUse:
    """Pinned slots of a transfer, and what launches its programs: a thread, or whatever owns one."""

    slots: Slots
    launched_by: object
    writes_pool: bool

    def must_follow(self, other: SlotUse) -> bool:
        """Whether XLA would not keep an order that matters: slots that one writes are the other's too.

        XLA keeps to the order in which one thread launched its programs, and sees none between threads.
        """
        if self.launched_by is other.launched_by or not (self.writes_pool or other.writes_pool):
            return False
        return bool(np.isin(self.slots.epochs, other.slots.epochs).any())


@final
class TransfersUnderWay:
    """Those of one pool, whichever ``BlockTransfer`` started them: it may be gone before they end.

    All methods may be called from several threads.
    """

    def __init__(self, pool: AnyPool) -> None:
        self._pool = ref(pool)
        self._lock = threading.Lock()
        self._uses: dict[Ticket, SlotUse] = {}
        self.prefetched = PrefetchedSlots()

    def settle(self) -> None:
        """Unpin slots whose transfers have ended. Waits for nothing."""
        if not self._uses:
            return
        with self._lock:
            tickets = list(self._uses)
        for ticket in tickets:
            if ticket.done():
                ticket.wait()

    def wait_for_turn(self, use: SlotUse) -> None:
        """Let transfers end that ``use`` must follow."""
        if not self._uses:
            return
        with self._lock:
            others = list(self._uses.items())
        for ticket, other in others:
            if use.must_follow(other):
                ticket.wait()

    def start(self, group: GroupId, use: SlotUse, moves: Sequence[Move]) -> Ticket:
        """The ticket of a transfer whose programs were launched and whose slots are pinned until it ends."""
        ticket = Ticket(group, moves, partial(self._end, use.slots))
        if ticket.done():
            ticket.wait()
            return ticket
        with self._lock:
            self._uses[ticket] = use
        return ticket

    def _end(self, slots: Slots, ticket: Ticket) -> None:
        pool = self._pool()
        if pool is not None:
            pool.unpin(slots)
        with self._lock:
            self._uses.pop(ticket, None)


_of_pools: WeakKeyDictionary[AnyPool, TransfersUnderWay] = WeakKeyDictionary()
_lock = threading.Lock()


def transfers_under_way(pool: AnyPool) -> TransfersUnderWay:
    """Those of ``pool``, the same object for all who ask."""
    with _lock:
        return _of_pools.setdefault(pool, TransfersUnderWay(pool))
