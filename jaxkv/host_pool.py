"""Owns host memory for offloaded chunks: one arena, cut into slots. Knows bytes, no blocks and no keys."""

from __future__ import annotations

import importlib
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Self, final

import numpy as np
import numpy.typing as npt

from jaxkv.errors import (
    ConfigError,
    NativeError,
    PoolClosedError,
    PoolError,
    PoolForkedError,
    PoolFull,
    PoolInUseError,
    SlotError,
)
from jaxkv.memory_limit import available_memory_bytes
from jaxkv.pool_handle import PoolHandle
from jaxkv.slabs import PAGE_BYTES, SLOT_UNIT_BYTES, choose_slab_bytes, slot_stride
from jaxkv.slots import Int64s, Slot, Slots, slot_columns

if TYPE_CHECKING:
    from jaxkv._native import Arena, SlotPool

__all__ = ["ADDRESS_UNIT_BYTES", "MAX_CAPACITY_BYTES", "HostPool", "Slot", "Slots", "load_native"]

ADDRESS_UNIT_BYTES = SLOT_UNIT_BYTES
"""Addresses inside a pool count units of this many bytes, so that 32 bits reach 1 TiB."""
MAX_CAPACITY_BYTES = ADDRESS_UNIT_BYTES * 2**31


@cache
def load_native() -> ModuleType:
    """The compiled extension. Raises ``NativeError`` if it is not there or does not load."""
    try:
        return importlib.import_module("jaxkv._native")
    except ImportError as error:
        raise NativeError(
            f"jaxkv's compiled extension does not load ({error}); install jaxkv with "
            "'pip install .' for this Python, with jaxlib 0.10 or newer"
        ) from error


@final
class HostPool:
    """``capacity_bytes`` of host memory: as many whole 4 KiB pages as fit, and one if not even that does.

    All of it is resident once the pool exists, on huge pages where the system has them. Use it as a context
    manager; leaving it with slots in use closes it and raises ``PoolInUseError``. All methods may be
    called from several threads.

    With ``shared=True`` other processes of this host and user can use its slots too: send them ``handle``,
    with which each opens a ``jaxkv.shared_pool.AttachedPool``, and slots. Reserving and freeing stay here.
    The memory has no name in any directory, so nothing is left of it once the last process has ended.
    Views that a forked child inherits are this memory too, where those of a private pool are copies.

    Raises ``ConfigError`` for a capacity that is not a positive number of bytes, that is over 1 TiB, or
    that is more than this machine or its control group has left.
    """

    def __init__(self, capacity_bytes: int, *, shared: bool = False) -> None:
        _require_capacity(capacity_bytes)
        native = load_native()
        arena_bytes = max(capacity_bytes // PAGE_BYTES, 1) * PAGE_BYTES
        self._handle: PoolHandle | None = None
        self._arena: Arena
        if shared:
            self._arena, self._handle = _make_shared(arena_bytes)
        else:
            self._arena = native.Arena(arena_bytes)
        self._creator = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._at_close: list[Callable[[], object]] = []
        self._slot_sizes: frozenset[int] = frozenset()
        self._slots: SlotPool = native.SlotPool(arena_bytes, arena_bytes)

    # -- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_quietly()

    def close(self) -> None:
        """Give the memory back, as soon as no transfer and no view uses it. A second call does nothing.

        Raises ``PoolInUseError`` if slots are still reserved; the pool is closed even so.
        """
        in_use = self._close_quietly()
        if in_use:
            raise PoolInUseError(
                f"the host pool was closed with {in_use} slots in use; free them first. "
                "Its memory goes back when nothing uses it any more"
            )

    @property
    def closed(self) -> bool:
        """Whether the pool can no longer be used."""
        return self._closed

    @property
    def handle(self) -> PoolHandle:
        """What other processes attach with, until this pool is closed or this process ends.

        Raises ``PoolError`` for a pool that is not shared.
        """
        with self._usable():
            if self._handle is None:
                raise PoolError(
                    "this pool is not shared, so it has no handle; open HostPool(..., shared=True)"
                )
            return self._handle

    def _close_quietly(self) -> int:
        self._require_own_process()
        with self._lock:
            in_use = 0 if self._closed else self._slots.num_live
            self._closed = True
        self._arena.close()
        callbacks, self._at_close = self._at_close, []
        for callback in callbacks:
            callback()
        return in_use

    # -- size ---------------------------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.num_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of slots in use, alignment included."""
        with self._usable():
            return self._slots.used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes of the arena outside slots in use."""
        return self.capacity_bytes - self.used_bytes

    @property
    def huge_pages(self) -> bool:
        """Whether the kernel took the advice to use huge pages."""
        return self._arena.huge_pages

    @property
    def num_slabs(self) -> int:
        """Equal parts the arena is cut into; settled once slots are in use."""
        with self._usable():
            return self._slots.num_slabs

    # -- slots --------------------------------------------------------------------------------------------

    def fit_slabs(self, slot_sizes: Iterable[int]) -> None:
        """Tell the pool which slot sizes (bytes) will be asked for, so that it cuts slabs that waste little.

        Sizes add up over calls. While slots are in use the cut stays as it is; then a size larger than a slab
        is a ``ConfigError``, as is one larger than the pool.
        """
        with self._usable():
            self._fit(frozenset(slot_sizes))

    def max_slots(self, slot_bytes: int) -> int:
        """Slots of ``slot_bytes`` the pool holds when nothing else is in it."""
        with self._usable():
            self._fit(frozenset((slot_bytes,)))
            return self._slots.num_slabs * self._slots.slots_per_slab(int(slot_bytes))

    def try_reserve(self, slot_bytes: int) -> Slot | None:
        """A slot of ``slot_bytes``, or ``None`` while there is none.

        It starts at a multiple of 4096 bytes, or of 512 if it is smaller than that.
        """
        with self._usable():
            self._fit(frozenset((slot_bytes,)))
            reserved = self._slots.reserve(int(slot_bytes))
        return None if reserved is None else Slot(reserved[0], int(slot_bytes), reserved[1])

    def reserve_slots(self, slot_bytes: int, num_slots: int) -> Slots:
        """``num_slots`` slots of ``slot_bytes``. Raises ``PoolFull``, and then keeps nothing."""
        if not isinstance(num_slots, int | np.integer) or num_slots < 0:
            raise ConfigError(f"cannot reserve {num_slots!r} slots; ask for a whole number, 0 or more")
        with self._usable():
            self._fit(frozenset((slot_bytes,)))
            num_free = self._slots.num_free(int(slot_bytes))
            enough = num_slots <= num_free
            reserved = self._slots.reserve_many(int(slot_bytes), int(num_slots)) if enough else None
        if reserved is None:
            raise PoolFull(
                f"the host pool has {num_free} free slots of {slot_bytes} bytes, {num_slots} were asked "
                f"for; free slots or give the pool more than {self.capacity_bytes} bytes"
            )
        return Slots(*reserved, int(slot_bytes))

    def free(self, slot: Slot) -> None:
        """Give a slot back. Its bytes stay untouched while a view or a transfer still uses them."""
        self.free_slots((slot,))

    def free_slots(self, slots: Sequence[Slot]) -> None:
        """As ``free`` for several slots. If one is not in use, or named twice, none is given back."""
        with self._usable():
            offsets, epochs = self._require_live(slots)
            if not self._slots.free(offsets, epochs):
                self._require_live(slots)
                raise SlotError("a slot is named twice among those to be freed; free each slot once")

    def slab_of(self, slot: Slot) -> int:
        """The slab of a slot. Other slot sizes get its bytes once all slots of the slab are free."""
        with self._usable():
            self._require_live((slot,))
            return self._slots.slab_of(slot.offset)

    def address(self, slot: Slot) -> int:
        """Where a slot starts, in units of 512 bytes."""
        with self._usable():
            self._require_live((slot,))
            return slot.offset // ADDRESS_UNIT_BYTES

    def view(self, slot: Slot) -> memoryview:
        """The bytes of a slot, writable. They stay this slot's while the view lives, even if it is freed."""
        with self._usable():
            self._require_live((slot,))
            array = self._arena.view(slot.offset, slot.num_bytes)
            offsets, epochs = self._pin((slot,))
            end = weakref.finalize(array, _unpin, self._slots, self._creator, offsets, epochs)
            end.atexit = False
            return array.data

    # -- for transfers ------------------------------------------------------------------------------------

    @property
    def pool_id(self) -> int:
        """The number compiled programs know this pool by; used again by another pool after this one."""
        return self._arena.pool_id

    @property
    def slot_pool(self) -> SlotPool:
        """Which slots are in use, for compiled code that reserves and frees by itself."""
        return self._slots

    def token(self) -> npt.NDArray[np.int32]:
        """A first token for pool ops, shape ``(1,)``. It names the pool's generation: an op that is given the
        token of a closed pool moves nothing."""
        return np.array([self._arena.generation], np.int32)

    def at_close(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called when the pool is closed, by what holds on to its memory until then."""
        with self._usable():
            self._at_close.append(callback)

    def arena_bytes(self) -> npt.NDArray[np.uint8]:
        """All bytes of the arena, for a backend that copies on the host. Keeps the memory, pins no slot."""
        with self._usable():
            return self._arena.view(0, self._arena.num_bytes)

    def pin(self, slots: Sequence[Slot]) -> Int64s:
        """Keep the bytes of ``slots`` theirs until ``unpin``, and return their addresses (512-byte units).

        Raises ``SlotError`` and pins nothing if one of them is not a slot in use.
        """
        with self._usable():
            if isinstance(slots, Slots):
                addresses = self._slots.pin_of_size(slots.offsets, slots.epochs, slots.num_bytes)
                if addresses is not None:
                    return addresses
            offsets, _ = self._pin(slots)
        return offsets // ADDRESS_UNIT_BYTES

    def unpin(self, slots: Sequence[Slot]) -> None:
        """End what ``pin`` began. Allowed on a closed pool."""
        if isinstance(slots, Slots):
            offsets, epochs = slots.offsets, slots.epochs
        else:
            offsets, epochs, _ = slot_columns(slots)
        _unpin(self._slots, self._creator, offsets, epochs)

    # -- inside the lock ----------------------------------------------------------------------------------

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Holds the lock of this pool, if it is open and of this process."""
        self._require_own_process()
        with self._lock:
            if self._closed:
                raise PoolClosedError("the host pool was closed; open a new one")
            yield

    def _require_own_process(self) -> None:
        if os.getpid() != self._creator:
            raise PoolForkedError(
                f"this host pool belongs to process {self._creator}, not to its child {os.getpid()}; "
                "open a pool of your own after fork, or attach to this one if it is shared"
            )

    def _fit(self, slot_sizes: frozenset[int]) -> None:
        if slot_sizes <= self._slot_sizes:
            return
        wanted = self._slot_sizes | slot_sizes
        if self._slots.used_bytes == 0:
            slab_bytes = choose_slab_bytes(self.capacity_bytes, wanted)
            if self._slots.cut(slab_bytes):
                self._slot_sizes = wanted
                return
        if max(map(slot_stride, slot_sizes)) > self._slots.slab_bytes:
            raise ConfigError(
                f"slots of {max(slot_sizes)} bytes do not fit the pool's slabs of {self._slots.slab_bytes} "
                "bytes; name all slot sizes with fit_slabs() before the first slot is reserved"
            )
        self._slot_sizes = wanted

    def _require_live(self, slots: Sequence[Slot]) -> tuple[Int64s, Int64s]:
        """Offsets and epochs of ``slots``, if all are in use and of the size they say; else ``SlotError``."""
        offsets, epochs, num_bytes = slot_columns(slots)
        stale = self._slots.first_not_live(offsets, epochs, num_bytes)
        if stale is not None:
            raise SlotError(
                f"{slots[stale]} is not in use in this pool: it was freed, or is a slot of another pool"
            )
        return offsets, epochs

    def _pin(self, slots: Sequence[Slot]) -> tuple[Int64s, Int64s]:
        offsets, epochs = self._require_live(slots)
        if not self._slots.pin(offsets, epochs):
            self._require_live(slots)  # Compiled code frees without our lock, here between these two.
        return offsets, epochs


def _unpin(slots: SlotPool, creator: int, offsets: Int64s, epochs: Int64s) -> None:
    """What the garbage collector may call at any time, in any thread, when a view ends.

    In a forked child it does nothing: the lock of its copy may be held by a thread that is not there.
    """
    if os.getpid() == creator:
        slots.unpin(offsets, epochs)


def _make_shared(capacity_bytes: int) -> tuple[Arena, PoolHandle]:
    nonce = secrets.token_hex(16)
    arena: Arena = load_native().Arena.create_shared(capacity_bytes, nonce)
    fd = arena.shared_fd
    assert fd is not None
    return arena, PoolHandle(os.getpid(), fd, arena.num_bytes, nonce)


def _require_capacity(capacity_bytes: int) -> None:
    if isinstance(capacity_bytes, bool) or not isinstance(capacity_bytes, int) or capacity_bytes < 1:
        raise ConfigError(f"a host pool needs a positive whole number of bytes, got {capacity_bytes!r}")
    if capacity_bytes > MAX_CAPACITY_BYTES:
        raise ConfigError(
            f"a host pool holds at most {MAX_CAPACITY_BYTES} bytes, got {capacity_bytes}; use several pools"
        )
    available = available_memory_bytes()
    if capacity_bytes > available:
        raise ConfigError(
            f"a host pool of {capacity_bytes} bytes is more than the {available} bytes of memory this "
            "process can still get; give it less than that, or free memory first"
        )
