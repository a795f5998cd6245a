"""Uses the shared host pool of another process. Reads and writes its slots; reserves and frees none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, final

import numpy as np
import numpy.typing as npt

from jaxkv.errors import ConfigError, PoolClosedError, PoolError, PoolForkedError, SlotError
from jaxkv.host_pool import ADDRESS_UNIT_BYTES, HostPool, load_native
from jaxkv.pool_handle import PoolHandle
from jaxkv.slabs import slot_stride
from jaxkv.slots import Int64s, Slot, slot_columns

if TYPE_CHECKING:
    from jaxkv._native import Arena


@final
class AttachedPool:
    """The memory of a ``HostPool(..., shared=True)`` of another process, found by its ``handle``.

    A ``BlockTransfer`` takes it like a ``HostPool``. The owner alone reserves and frees: have it send its
    ``Slot`` objects over (they pickle). **A slot the owner has freed is not found out here**: its bytes may
    already be another's. So whoever frees slots, the scheduler beside the owner, first waits until every
    process has reported that its job is over.

    The memory stays while this process uses it, whether the owner closes the pool, ends or is killed; only
    attaching needs the owner alive. It counts as the owner's: attaching takes address space and page tables.
    Use it as a context manager. All methods may be called from several threads, none after ``fork``.

    Raises ``PoolClosedError`` where the handle's pool is no longer there (or never was: both processes must
    be of one host and pid namespace) and ``ConfigError`` where the system refuses, as it does for a pool of
    another user.
    """

    def __init__(self, handle: PoolHandle) -> None:
        if not isinstance(handle, PoolHandle):
            raise ConfigError(f"attach with the owner's pool.handle, a PoolHandle, not with {handle!r}")
        self._arena: Arena = load_native().Arena.attach(
            handle.pid, handle.fd, handle.capacity_bytes, handle.nonce
        )
        self._process = os.getpid()
        self._at_close: list[Callable[[], object]] = []

    # -- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the memory, as soon as no transfer and no view uses it. The owner's pool stays open."""
        self._require_own_process()
        self._arena.close()
        callbacks, self._at_close = self._at_close, []
        for callback in callbacks:
            callback()

    @property
    def closed(self) -> bool:
        """Whether this pool can no longer be used. What the owner does to its own does not show here."""
        return self._arena.closed

    # -- size ---------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.num_bytes

    @property
    def huge_pages(self) -> bool:
        """Whether the kernel took the advice to use huge pages here; the owner's decides what there is."""
        return self._arena.huge_pages

    # -- slots --------------------------------------------------------------------------------------------

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Raises ``ConfigError`` for a slot size (bytes) larger than the pool. The owner cuts the slabs."""
        self._require_usable()
        for slot_bytes in slot_sizes:
            if slot_stride(slot_bytes) > self.capacity_bytes:
                raise ConfigError(
                    f"the shared pool of {self.capacity_bytes} bytes cannot hold one slot of {slot_bytes} "
                    "bytes; open a larger one in the owner"
                )

    def reserve_slots(self, slot_bytes: int, num_slots: int) -> NoReturn:
        """Raises ``PoolError``: the owner reserves."""
        raise PoolError(
            f"an attached pool cannot reserve {num_slots} slots of {slot_bytes} bytes; "
            "reserve them in the process that opened the pool, and send its slots here"
        )

    def free_slots(self, slots: Sequence[Slot]) -> NoReturn:
        """Raises ``PoolError``: the owner frees."""
        raise PoolError(
            f"an attached pool cannot free {list(slots)}; free them in the process that opened the pool, "
            "once all processes are done with them"
        )

    def address(self, slot: Slot) -> int:
        """Where a slot starts, in units of 512 bytes. Raises ``SlotError``."""
        return int(self.pin((slot,))[0])

    def view(self, slot: Slot) -> memoryview:
        """The bytes of a slot, writable: what the owner's view of it shows. Raises ``SlotError``."""
        self._require_usable()
        self._require_inside((slot,))
        return self._arena.view(slot.offset, slot.num_bytes).data

    # -- for transfers ------------------------------------------------------------------------------------

    @property
    def pool_id(self) -> int:
        """As ``HostPool.pool_id``: a number of this process, not the owner's."""
        return self._arena.pool_id

    def token(self) -> npt.NDArray[np.int32]:
        """As ``HostPool.token``, shape ``(1,)``."""
        return np.array([self._arena.generation], np.int32)

    def at_close(self, callback: Callable[[], object]) -> None:
        """As ``HostPool.at_close``."""
        self._require_usable()
        self._at_close.append(callback)

    def arena_bytes(self) -> npt.NDArray[np.uint8]:
        """All bytes of the arena. Keeps the memory."""
        self._require_usable()
        return self._arena.view(0, self._arena.num_bytes)

    def pin(self, slots: Sequence[Slot]) -> Int64s:
        """The addresses of ``slots``, in units of 512 bytes. Raises ``SlotError`` for one outside the pool.

        Any range that starts at a whole unit will do, also one inside a slot of the owner. Nothing holds the
        owner back from freeing them.
        """
        self._require_usable()
        return self._require_inside(slots) // ADDRESS_UNIT_BYTES

    def unpin(self, slots: Sequence[Slot]) -> None:
        """Nothing to undo: ``pin`` holds nothing. Allowed on a closed pool."""

    # -- checks -------------------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        self._require_own_process()
        if self._arena.closed:
            raise PoolClosedError("this attached pool was closed; attach again with the owner's handle")

    def _require_own_process(self) -> None:
        if os.getpid() != self._process:
            raise PoolForkedError(
                f"process {self._process} attached to this pool, not its child {os.getpid()}; "
                "attach in the child, after fork"
            )

    def _require_inside(self, slots: Sequence[Slot]) -> Int64s:
        """The offsets of ``slots``."""
        offsets, _, num_bytes = slot_columns(slots)
        inside = (num_bytes >= 1) & (offsets >= 0) & (offsets <= self.capacity_bytes - num_bytes)
        wrong = np.flatnonzero(~inside | (offsets % ADDRESS_UNIT_BYTES != 0))
        if wrong.size:
            raise SlotError(
                f"{slots[int(wrong[0])]} is not a range of whole {ADDRESS_UNIT_BYTES}-byte units in this "
                f"pool of {self.capacity_bytes} bytes; use slots that its owner reserved"
            )
        return offsets


AnyPool = HostPool | AttachedPool
"""What a ``BlockTransfer`` copies to and from."""
