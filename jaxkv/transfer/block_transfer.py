"""Moves blocks of a model's caches to slots of a host pool and back. Knows ids and bytes, no requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self, final, overload

import jax
import numpy as np
from numpy.typing import ArrayLike

from jaxkv.canonical import CanonicalKVCaches, GroupPages
from jaxkv.errors import CacheMismatchError, ConfigError, NativeError
from jaxkv.host_pool import HostPool, Slot
from jaxkv.keys import GroupId
from jaxkv.transfer.backends import CpuBackend, TransferBackend, XlaBackend
from jaxkv.transfer.checks import (
    Entries,
    bucket_size,
    check_block_ids,
    check_first_block,
    check_no_repeats,
    check_slots,
    check_slots_differ,
    make_entries,
    only_device,
)
from jaxkv.transfer.status import make_status
from jaxkv.transfer.ticket import Status, Ticket

KVCaches = Mapping[str, Any]

_log = logging.getLogger(__name__)


@final
class SlotLease(Sequence[Slot]):
    """Slots that are freed when the ``with`` block ends, unless ``keep`` was called."""

    def __init__(self, transfer: BlockTransfer, slots: Sequence[Slot]) -> None:
        self._transfer = transfer
        self._slots = tuple(slots)
        self._kept = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._kept and not self._transfer.pool.closed:
            self._transfer.release(self._slots)

    def keep(self) -> tuple[Slot, ...]:
        """Hand the slots over; ``BlockTransfer.release`` frees them."""
        self._kept = True
        return self._slots

    @overload
    def __getitem__(self, index: int) -> Slot: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Slot, ...]: ...
    def __getitem__(self, index: int | slice) -> Slot | tuple[Slot, ...]:
        return self._slots[index]

    def __len__(self) -> int:
        return len(self._slots)


@final
class BlockTransfer:
    """Copies blocks between the caches ``canonical`` describes and slots of ``pool``.

    A slot holds a chunk: ``blocks_per_chunk`` block records, one after another. ``backend`` is ``"cpu"``
    (compiled handlers, in place), ``"xla"`` (plain JAX, any platform) or ``"auto"``: the first of these that
    fits the default platform. Transfers may be started from several threads. Whatever is refused raises
    before anything is dispatched and leaves the caches usable.

    Raises ``ConfigError`` for options that cannot work and ``NativeError`` for a backend this build
    does not have.
    """

    def __init__(
        self,
        canonical: CanonicalKVCaches,
        pool: HostPool,
        blocks_per_chunk: int = 1,
        backend: str = "auto",
    ) -> None:
        if not isinstance(blocks_per_chunk, int | np.integer) or blocks_per_chunk < 1:
            raise ConfigError(
                f"blocks_per_chunk must be a whole number of at least 1, got {blocks_per_chunk!r}"
            )
        self.canonical = canonical
        self.pool = pool
        self.blocks_per_chunk = blocks_per_chunk
        self.backend = make_backend(backend, pool, canonical)
        self._lock = threading.Lock()
        self._under_way: set[Ticket] = set()
        self._num_copied_leaves = 0
        pool.fit_slabs(self.chunk_bytes(GroupId(g)) for g in range(len(canonical.groups)))

    def chunk_bytes(self, group: GroupId) -> int:
        """Bytes of one slot of ``group``."""
        return self.blocks_per_chunk * self._pages(group).record_bytes

    @property
    def num_copied_leaves(self) -> int:
        """Leaves that restores could not write in place so far: 0 unless something else holds on to them."""
        return self._num_copied_leaves

    def reserve(self, group: GroupId, num_chunks: int) -> SlotLease:
        """Slots for ``num_chunks`` chunks of ``group``. Raises ``PoolFull``, and then keeps nothing."""
        self.settle()
        return SlotLease(self, self.pool.reserve_slots(self.chunk_bytes(group), num_chunks))

    def release(self, slots: Sequence[Slot]) -> None:
        """Free kept slots. Waits for nothing: a slot in a running transfer frees when that ends."""
        self.settle()
        self.pool.free_slots(slots)

    def offload(
        self,
        kv_caches: KVCaches,
        group: GroupId,
        block_ids: ArrayLike,
        slots: Sequence[Slot],
        first_block: int = 0,
    ) -> Ticket:
        """Copy what blocks of ``group`` hold now to ``slots``, whatever is computed from the caches later.

        ``block_ids[j]`` (-1 skips) is block ``first_block + j`` counted from the start of the first chunk.
        The caches stay the caller's; they may be donated as soon as this returns.

        Raises ``BlockIdError``, ``SlotError``, ``CacheMismatchError``,
        ``DeletedCacheError``, ``PoolClosedError`` or ``PoolForkedError``.
        """
        slots = tuple(slots)
        leaves = self._leaves(kv_caches, group)
        check_slots_differ(slots)
        with self._pinned(group, block_ids, slots, first_block) as entries:
            status = self.backend.offload(group, leaves, entries) if entries.num_blocks else make_status()
        return self._start(group, entries, slots, status)

    def prefetch(self, group: GroupId, slots: Sequence[Slot]) -> Ticket:
        """Start moving slots towards the device, ahead of ``restore``; nothing to do on the host platform."""
        slots = tuple(slots)
        with self._pinned(group, (), slots, 0) as entries:
            pass  # On the host platform the slots are where they will be read.
        return self._start(group, entries, slots, make_status())

    def restore(
        self,
        kv_caches: KVCaches,
        group: GroupId,
        block_ids: ArrayLike,
        slots: Sequence[Slot],
        first_block: int = 0,
    ) -> tuple[KVCaches, Ticket]:
        """Copy chunks back into blocks of ``group``, in place. Go on with the caches returned.

        Arguments and errors as for ``offload``; a block named twice is a ``BlockIdError``. The
        leaves of the group are consumed. Where something else holds one (a NumPy view does), XLA copies it
        whole first; then ``num_copied_leaves`` counts and the first time is logged.
        """
        slots = tuple(slots)
        leaves = self._leaves(kv_caches, group)
        status: Status = make_status()
        with self._pinned(group, block_ids, slots, first_block) as entries:
            check_no_repeats(entries.block_ids)
            if entries.num_blocks:
                kv_caches, status = self._write(kv_caches, group, leaves, entries)
        return kv_caches, self._start(group, entries, slots, status)

    def warm_up(self, kv_caches: KVCaches, max_blocks: int) -> KVCaches:
        """Compile every program that transfers of up to ``max_blocks`` blocks need. Moves nothing.

        Consumes ``kv_caches`` and returns those to go on with, unchanged.
        """
        for group in map(GroupId, range(len(self.canonical.groups))):
            count = 1
            while count <= bucket_size(max_blocks):
                entries = make_entries(np.full(count, -1, np.int32), (0,) * count, self._pages(group), 1, 0)
                leaves = self._leaves(kv_caches, group)
                self.backend.offload(group, leaves, entries)
                kv_caches, _ = self._write(kv_caches, group, leaves, entries)
                count = bucket_size(count) + 1
        return kv_caches

    def settle(self) -> None:
        """Let go of slots whose transfers have ended. Waits for nothing."""
        with self._lock:
            under_way = list(self._under_way)
        for ticket in under_way:
            if ticket.done():
                ticket.wait()

    def _pages(self, group: GroupId) -> GroupPages:
        groups = self.canonical.groups
        if not 0 <= group < len(groups):
            raise ConfigError(f"there is no group {group}; the caches have groups 0 to {len(groups) - 1}")
        return groups[group]

    def _leaves(self, kv_caches: KVCaches, group: GroupId) -> list[jax.Array]:
        self._pages(group)
        leaves = self.canonical.group_leaves(kv_caches, group)
        self.backend.require_reachable(only_device(leaves))
        return leaves

    @contextmanager
    def _pinned(
        self, group: GroupId, block_ids: ArrayLike, slots: Sequence[Slot], first_block: int
    ) -> Iterator[Entries]:
        """Checks ids and slots, pins the slots and makes the arrays of one program. An error unpins them."""
        pages = self._pages(group)
        ids = check_block_ids(block_ids, pages.num_blocks)
        check_first_block(first_block)
        check_slots(slots, self.chunk_bytes(group), first_block + len(ids), self.blocks_per_chunk)
        self.settle()
        addresses = self.pool.pin(slots)
        try:
            yield make_entries(ids, addresses, pages, self.blocks_per_chunk, first_block)
        except BaseException:
            self.pool.unpin(slots)
            raise

    def _write(
        self, kv_caches: KVCaches, group: GroupId, leaves: Sequence[jax.Array], entries: Entries
    ) -> tuple[KVCaches, Status]:
        try:
            written, status = self.backend.restore(group, leaves, entries)
        except jax.errors.JaxRuntimeError:
            _require_distinct_buffers(leaves)
            raise
        if self.backend.restores_in_place:
            self._count_copies(leaves)
        return self.canonical.replace(kv_caches, group, written), status

    def _start(self, group: GroupId, entries: Entries, slots: Sequence[Slot], status: Status) -> Ticket:
        block_bytes = self._pages(group).block_bytes
        ticket = Ticket(status, group, entries.block_ids, block_bytes, partial(self._end, slots))
        with self._lock:
            self._under_way.add(ticket)
        if ticket.done():
            ticket.wait()
        return ticket

    def _end(self, slots: Sequence[Slot], ticket: Ticket) -> None:
        self.pool.unpin(slots)
        with self._lock:
            self._under_way.discard(ticket)

    def _count_copies(self, donated: Sequence[jax.Array]) -> None:
        # XLA deletes what it reuses; what it had to copy stays alive.
        copied = sum(not leaf.is_deleted() for leaf in donated)
        if not copied:
            return
        with self._lock:
            first = self._num_copied_leaves == 0
            self._num_copied_leaves += copied
        if first:
            # Not a warning: where warnings are errors it would cost the caller the restored caches.
            _log.warning(
                "a restore copied %d whole cache leaves, because something else still uses them "
                "(a NumPy or DLPack view does); drop it before restoring",
                copied,
            )


def make_backend(name: str, pool: HostPool, canonical: CanonicalKVCaches) -> TransferBackend:
    """The backend of that name. ``"auto"`` is ``"cpu"`` where JAX runs on the CPU, else ``"xla"``."""
    if name == "auto":
        name = "cpu" if jax.default_backend() == "cpu" else "xla"
    match name:
        case "cpu":
            return CpuBackend(pool, canonical.groups)
        case "xla":
            return XlaBackend(pool, canonical.groups)
        case "cuda":
            raise NativeError("this build of jaxkv has no CUDA backend; use backend='xla' on a GPU")
        case _:
            raise ConfigError(f"unknown backend {name!r}; use 'auto', 'cpu', 'xla' or 'cuda'")


def _require_distinct_buffers(leaves: Sequence[jax.Array]) -> None:
    """Says why XLA refused to donate: two arrays may be one buffer, which it never gives away twice."""
    pointers = {leaf.unsafe_buffer_pointer() for leaf in leaves if not leaf.is_deleted()}
    if len(pointers) != len(leaves):
        raise CacheMismatchError(
            "two cache leaves share one buffer, but were separate when the caches were registered; "
            "give each leaf an array of its own"
        )
