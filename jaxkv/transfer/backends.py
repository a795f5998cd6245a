"""The ways to move blocks once everything about a transfer was checked: compiled handlers, or plain JAX."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, final

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.canonical import GroupPages
from jaxkv.errors import CacheMismatchError
from jaxkv.host_pool import ADDRESS_UNIT_BYTES, HostPool
from jaxkv.keys import GroupId
from jaxkv.transfer import ops, xla_ops
from jaxkv.transfer.checks import Entries
from jaxkv.transfer.status import make_status
from jaxkv.transfer.targets import register_targets
from jaxkv.transfer.ticket import Status

Leaves = Sequence[jax.Array]


class TransferBackend(ABC):
    """Moves blocks between leaves of one group and pinned slots of one pool. Checks nothing."""

    restores_in_place: ClassVar[bool]
    """Whether a restore promises to return the buffers it was given."""

    @abstractmethod
    def require_reachable(self, device: jax.Device) -> None:
        """Raises ``CacheMismatchError`` for a device this backend does not serve."""

    @abstractmethod
    def offload(self, group: GroupId, leaves: Leaves, entries: Entries) -> Status:
        """Start copying blocks out of ``leaves``, which stay the caller's. Returns the status to come."""

    @abstractmethod
    def restore(self, group: GroupId, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """Start copying blocks in. Consumes ``leaves``; returns the new ones and the status to come."""


@final
class CpuBackend(TransferBackend):
    """One program per group and bucket: a custom call that copies all leaves, in place when it restores."""

    restores_in_place = True

    def __init__(self, pool: HostPool, groups: Sequence[GroupPages]) -> None:
        register_targets()
        self._pool = pool
        self._token = pool.token()
        self.read_programs = [self._make_read_program(pages) for pages in groups]
        self.write_programs = [self._make_write_program(pages) for pages in groups]

    def require_reachable(self, device: jax.Device) -> None:
        """See ``TransferBackend``."""
        if device.platform != "cpu":
            raise CacheMismatchError(f"a cache leaf is on {device}, not on the CPU; use backend='xla'")

    def offload(self, group: GroupId, leaves: Leaves, entries: Entries) -> Status:
        """See ``TransferBackend``. Once this returns, XLA lets no donation overtake the read."""
        status: jax.Array = self.read_programs[group](
            self._token, entries.block_ids, entries.addresses, *leaves
        )
        return status

    def restore(self, group: GroupId, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """See ``TransferBackend``."""
        status, *written = self.write_programs[group](
            self._token, entries.block_ids, entries.addresses, *leaves
        )
        return written, status

    def _make_read_program(self, pages: GroupPages) -> Callable[..., Any]:
        def read(
            token: jax.Array, block_ids: jax.Array, addresses: jax.Array, *leaves: jax.Array
        ) -> jax.Array:
            return ops.read_blocks(self._pool, token, leaves, block_ids, addresses, pages)

        return jax.jit(read)

    def _make_write_program(self, pages: GroupPages) -> Callable[..., Any]:
        def write(
            token: jax.Array, block_ids: jax.Array, addresses: jax.Array, *leaves: jax.Array
        ) -> tuple[jax.Array, ...]:
            _, status, written = ops.restore(self._pool, token, leaves, block_ids, addresses, pages)
            return (status, *written)

        return jax.jit(write, donate_argnums=range(3, 3 + len(pages.leaves)))


@final
class XlaBackend(TransferBackend):
    """The page ops in plain JAX, and copies between their staging and the pool on the caller's thread."""

    restores_in_place = False

    def __init__(self, pool: HostPool, groups: Sequence[GroupPages]) -> None:
        self._arena = pool.arena_bytes
        self._record_bytes = [pages.record_bytes for pages in groups]
        self.read_programs = [_make_gather_program(pages) for pages in groups]
        self.write_programs = [_make_scatter_program(pages) for pages in groups]

    def require_reachable(self, device: jax.Device) -> None:
        """See ``TransferBackend``. JAX serves every device it has."""

    def offload(self, group: GroupId, leaves: Leaves, entries: Entries) -> Status:
        """See ``TransferBackend``. The copy is done when this returns."""
        started = time.perf_counter()
        staging = np.asarray(self.read_programs[group](entries.block_ids, *leaves))
        for entry, record in self._records(group, entries):
            record[:] = staging[entry]
        elapsed_us = int((time.perf_counter() - started) * 1e6)
        return make_status(moved=entries.num_blocks, elapsed_us=elapsed_us)

    def restore(self, group: GroupId, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """See ``TransferBackend``."""
        staging = np.zeros((len(entries.block_ids), self._record_bytes[group]), np.uint8)
        for entry, record in self._records(group, entries):
            staging[entry] = record
        written, status = self.write_programs[group](staging, entries.block_ids, *leaves)
        return written, status

    def _records(self, group: GroupId, entries: Entries) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The index and the place in the pool of every entry that is not skipped."""
        arena = self._arena()
        for entry in np.flatnonzero(entries.block_ids >= 0):
            start = int(entries.addresses[entry]) * ADDRESS_UNIT_BYTES
            yield int(entry), arena[start : start + self._record_bytes[group]]


def _make_gather_program(pages: GroupPages) -> Callable[..., Any]:
    def gather(block_ids: jax.Array, *leaves: jax.Array) -> jax.Array:
        return xla_ops.gather_pages(leaves, block_ids, pages)

    return jax.jit(gather)


def _make_scatter_program(pages: GroupPages) -> Callable[..., Any]:
    def scatter(
        staging: jax.Array, block_ids: jax.Array, *leaves: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        return xla_ops.scatter_pages(staging, block_ids, leaves, pages)

    return jax.jit(scatter, donate_argnums=range(2, 2 + len(pages.leaves)))
