"""Moves blocks by compiled handlers, in place, where JAX runs on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp

from jaxkv.errors import CacheMismatchError
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer import ops
from jaxkv.transfer.backends import Leaves, PageMover, TransferBackend
from jaxkv.transfer.checks import Entries, no_entries
from jaxkv.transfer.targets import register_targets
from jaxkv.transfer.ticket import Status

DETACHED_BYTES = 256 << 10
"""Transfers of at least this many bytes leave the caller's thread. Below, the way there and back costs more
than the copy."""


@final
class CpuBackend(TransferBackend):
    """One program per group and bucket: a custom call that copies all leaves, in place when it restores."""

    restores_in_place = True

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
    """

    def __init__(self, pool: AnyPool, pages: GroupPages) -> None:
        self._pool = pool
        self._pages = pages
        self._token = pool.token()
        self._block_bytes = max(pages.block_bytes, 1)
        leaves = range(3, 3 + len(pages.leaves))
        self.read_programs = [jax.jit(partial(self._read, detached=flag)) for flag in (False, True)]
        self.write_programs = [
            jax.jit(partial(self._write, detached=flag), donate_argnums=leaves) for flag in (False, True)
        ]

    def offload(self, leaves: Leaves, entries: Entries) -> Status:
        """See ``PageMover``. Once this returns, XLA lets no donation overtake the read."""
        program = self.read_programs[self._is_detached(entries.num_blocks)]
        status: jax.Array
        status, *_ = program(self._token, entries.block_ids, entries.addresses, *leaves)
        return status

    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], Status]:
        """See ``PageMover``."""
        program = self.write_programs[self._is_detached(entries.num_blocks)]
        status, written, *_ = program(self._token, entries.block_ids, entries.addresses, *leaves)
        return written, status

    def warm_up(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        """See ``PageMover``."""
        nothing = no_entries(num_entries)
        operands = self._token, nothing.block_ids, nothing.addresses
        written = list(leaves)
        # Of the entries any number may be skipped, so one length may run both ways.
        for detached in {self._is_detached(1), self._is_detached(num_entries)}:
            self.read_programs[detached](*operands, *written)
            _, written, *_ = self.write_programs[detached](*operands, *written)
        return written

    def _is_detached(self, num_blocks: int) -> bool:
        return num_blocks * self._block_bytes >= DETACHED_BYTES

    def _read(
        self, token: jax.Array, block_ids: jax.Array, addresses: jax.Array, *leaves: jax.Array, detached: bool
    ) -> tuple[Any, ...]:
        status = ops.read_blocks(self._pool, token, leaves, block_ids, addresses, self._pages)
        return (status, _reason_to_detach(block_ids)) if detached else (status,)

    def _write(
        self, token: jax.Array, block_ids: jax.Array, addresses: jax.Array, *leaves: jax.Array, detached: bool
    ) -> tuple[Any, ...]:
        _, status, written = ops.restore(self._pool, token, leaves, block_ids, addresses, self._pages)
        return (status, written, _reason_to_detach(block_ids)) if detached else (status, written)


def _reason_to_detach(block_ids: jax.Array) -> jax.Array:
    """A product of two matrices of 8 x 8.

    XLA's CPU client runs a program on the caller's thread if it takes less than 1,000 floating point
    operations, and it does not count what a custom call takes (``TfrtCpuClient``, ``cheap_computation_``).
    """
    row = block_ids[:8].astype(jnp.float32)
    matrix = row[:, None] * row[None, :]
    return matrix @ matrix
