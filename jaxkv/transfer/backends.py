"""What moves blocks once everything about a transfer was checked; and how plain JAX does."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.host_pool import ADDRESS_UNIT_BYTES
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer import xla_ops
from jaxkv.transfer.checks import Entries, no_entries
from jaxkv.transfer.status import make_status
from jaxkv.transfer.ticket import Status

Leaves = Sequence[jax.Array]


class PageMover(ABC):
    """Moves what one device holds of the blocks of a group, to and from pinned slots. Checks nothing."""

    @abstractmethod
    def offload(self, leaves: Leaves, entries: Entries) -> Status:
        """Start copying blocks out of ``leaves``, which stay the caller's. Returns the status to come."""

    @abstractmethod
    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """Start copying blocks in. Consumes ``leaves``; returns the new ones and the status to come."""

    def prefetch(self, device: jax.Device, entries: Entries) -> Status | None:
        """Start bringing records to ``device`` ahead of a restore. ``None`` where that gains nothing."""
        return None

    def forget_prefetched(self, device: jax.Device, entries: Entries) -> None:
        """Restore these records from their slots, whatever was prefetched."""

    @abstractmethod
    def warm_up_offload(self, leaves: Leaves, num_entries: int) -> None:
        """Compile every program that offloads padded to ``num_entries`` may run."""

    @abstractmethod
    def warm_up_restore(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        """Compile every program that such restores may run. Consumes ``leaves``; returns the same bytes."""


class TransferBackend(ABC):
    """Makes movers between the leaves of devices and one pool."""

    restores_in_place: ClassVar[bool]
    """Whether a restore promises to return the buffers it was given."""
    orders_launches: ClassVar[bool]
    """Whether transfers that one thread starts read and write slots in that order."""

    @abstractmethod
    def require_reachable(self, device: jax.Device) -> None:
        """Raises ``CacheMismatchError`` for a device this backend does not serve."""

    @abstractmethod
    def mover(self, pages: GroupPages) -> PageMover:
        """A mover of ``pages``; it serves any device."""


@final
class XlaBackend(TransferBackend):
    """The page ops in plain JAX, and copies between their staging and the pool on the caller's thread."""

    restores_in_place = False
    orders_launches = True

    def __init__(self, pool: AnyPool) -> None:
        self._arena = pool.arena_bytes

    def require_reachable(self, device: jax.Device) -> None:
        """See ``TransferBackend``. JAX serves every device it has."""

    def mover(self, pages: GroupPages) -> PageMover:
        """See ``TransferBackend``."""
        return XlaMover(self._arena, pages)


@final
class XlaMover(PageMover):
    """Gather and scatter in plain JAX, and a copy of each record on the host."""

    def __init__(self, arena: Callable[[], npt.NDArray[np.uint8]], pages: GroupPages) -> None:
        self._arena = arena
        self._record_bytes = pages.record_bytes
        self._written = xla_ops.written_bytes(pages)
        self.read_program = jax.jit(lambda block_ids, *leaves: xla_ops.gather_pages(leaves, block_ids, pages))
        self.write_program = jax.jit(
            lambda staging, block_ids, *leaves: xla_ops.scatter_pages(staging, block_ids, leaves, pages),
            donate_argnums=range(2, 2 + len(pages.leaves)),
        )

    def offload(self, leaves: Leaves, entries: Entries) -> Status:
        """See ``PageMover``. The copy is done when this returns."""
        started = time.perf_counter()
        staging = np.asarray(self.read_program(entries.block_ids, *leaves))
        for entry, record in self._records(entries):
            record[self._written] = staging[entry][self._written]
        elapsed_us = int((time.perf_counter() - started) * 1e6)
        return make_status(moved=entries.num_blocks, elapsed_us=elapsed_us)

    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """See ``PageMover``."""
        staging = np.zeros((len(entries.block_ids), self._record_bytes), np.uint8)
        for entry, record in self._records(entries):
            staging[entry] = record
        written: Any
        written, status = self.write_program(staging, entries.block_ids, *leaves)
        return written, status

    def warm_up_offload(self, leaves: Leaves, num_entries: int) -> None:
        """See ``PageMover``."""
        self.offload(leaves, no_entries(num_entries))

    def warm_up_restore(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        """See ``PageMover``."""
        return self.restore(leaves, no_entries(num_entries))[0]

    def _records(self, entries: Entries) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The index and the place in the pool of every entry that is not skipped."""
        arena = self._arena()
        for entry in np.flatnonzero(entries.block_ids >= 0):
            start = int(entries.addresses[entry]) * ADDRESS_UNIT_BYTES
            yield int(entry), arena[start : start + self._record_bytes]
