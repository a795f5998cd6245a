"""Moves blocks by compiled handlers, in place, where JAX runs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import jax
import jax.numpy as jnp

from jaxkv.errors import CacheMismatchError
from jaxkv.host_pool import load_native
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer import ops
from jaxkv.transfer.backends import Leaves, PageMover, TransferBackend
from jaxkv.transfer.checks import Entries, no_entries
from jaxkv.transfer.targets import register_targets
from jaxkv.transfer.ticket import Status

DETACHED_BYTES = 256 << 10
"""Larger transfers leave the caller's thread. It is rid of 16 KiB in 40 us instead of 56, but they are there
after 97 instead of 66; of 960 KiB it is rid in 86 us, not 134, and of 36 MiB in 170, not 2,250."""


@final
class CpuBackend(TransferBackend):
    """One program per group and bucket: a custom call that copies all leaves, in place when it restores."""

    restores_in_place = True
    orders_launches = True

    def __init__(self, pool: AnyPool) -> None:
        register_targets()
        self._pool = pool

    def require_reachable(self, device: jax.Device) -> None:
        """See ``TransferBackend``."""
        if device.platform != "cpu":
            raise CacheMismatchError(f"a cache leaf is on {device}, not on the CPU; use backend='xla'")

    def mover(self, pages: GroupPages) -> PageMover:
        """See ``TransferBackend``."""
        return CpuMover(self._pool, pages)


@final
class CpuMover(PageMover):
    """Compiled handlers, called by read programs and write programs.

    Large transfers are detached: they run beside the caller on a thread of XLA, which lets no later program
    donate a leaf that is still being read, nor read one that is still being written.

    A warm-up brings leaves into large pages of memory, in which programs that donate them leave them. That
    takes 0.2 to 2 seconds a GiB.
    """

    def __init__(self, pool: AnyPool, pages: GroupPages) -> None:
        self._pool = pool
        self._pages = pages
        self._inline_blocks = DETACHED_BYTES // max(pages.block_bytes, 1)
        leaves = range(1, 1 + len(pages.leaves))
        self.inline_read = jax.jit(_named("jaxkv_offload", self._read))
        self.inline_write = jax.jit(_named("jaxkv_restore", self._write), donate_argnums=leaves)
        self.detached_read = jax.jit(_named("jaxkv_offload", _detached(self._read)))
        self.detached_write = jax.jit(_named("jaxkv_restore", _detached(self._write)), donate_argnums=leaves)

    def offload(self, leaves: Leaves, entries: Entries) -> Status:
        """See ``PageMover``. Once this returns, XLA lets no donation overtake the read."""
        status: jax.Array
        if entries.num_blocks <= self._inline_blocks:
            status = self.inline_read(entries.numbers, *leaves)
        else:
            status, _ = self.detached_read(entries.numbers, *leaves)
        return status

    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """See ``PageMover``."""
        if entries.num_blocks <= self._inline_blocks:
            status, written = self.inline_write(entries.numbers, *leaves)
        else:
            (status, written), _ = self.detached_write(entries.numbers, *leaves)
        return written, status

    def warm_up_offload(self, leaves: Leaves, num_entries: int) -> None:
        """See ``PageMover``."""
        _gather_into_large_pages(leaves)
        for entries in _both_ways(num_entries):
            self.offload(leaves, entries)

    def warm_up_restore(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        """See ``PageMover``."""
        written = list(leaves)
        for entries in _both_ways(num_entries):
            written, _ = self.restore(written, entries)
        return written

    def _read(self, numbers: jax.Array, *leaves: jax.Array) -> jax.Array:
        return ops.read_blocks(self._pool, numbers, leaves, self._pages)

    def _write(self, numbers: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return ops.write_blocks(self._pool, numbers, leaves, self._pages)


def _gather_into_large_pages(leaves: Leaves) -> None:
    """XLA allocates leaves in pages of 4 KiB, whose addresses the processor finds too slowly."""
    for leaf in leaves:
        leaf.block_until_ready()  # What was not written yet has no pages that could be gathered.
        load_native().gather_into_large_pages(leaf.unsafe_buffer_pointer(), leaf.on_device_size_in_bytes())


def _both_ways(num_entries: int) -> tuple[Entries, Entries]:
    """Nothing to move, passed off as the least and the most there may be, since any entry may be skipped."""
    numbers = no_entries(num_entries).numbers
    return Entries(numbers, 1), Entries(numbers, num_entries)


def _named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the name by which profiles show its program."""

    def program(numbers: jax.Array, *leaves: jax.Array) -> Any:
        return function(numbers, *leaves)

    program.__name__ = name
    return program


def _detached(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a thousand additions beside its results.

    XLA's CPU client runs a program on the caller's thread if it takes less than 1,000 operations, and it does
    not count what a custom call takes (``TfrtCpuClient``, ``cheap_computation_``).
    """

    def detached(numbers: jax.Array, *leaves: jax.Array) -> tuple[Any, jax.Array]:
        return function(numbers, *leaves), jnp.arange(1024, dtype=jnp.int32) + numbers[0]

    return detached
