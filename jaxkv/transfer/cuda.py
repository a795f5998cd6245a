"""Moves blocks on CUDA devices: programs begin transfers, copies of the engine end them beside the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import jax
import numpy as np
import numpy.typing as npt
from numpy.typing import DTypeLike

from jaxkv.errors import CacheMismatchError, NativeError
from jaxkv.records import GroupPages
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer import ops
from jaxkv.transfer.backends import Leaves, PageMover, TransferBackend
from jaxkv.transfer.checks import Entries, no_entries
from jaxkv.transfer.cuda_device import CudaDevice, cuda_device, has_cuda, load_cuda
from jaxkv.transfer.targets import prepare_pool


@final
class CudaBackend(TransferBackend):
    """One program per group and direction, which hands its blocks to the engine of its device."""

    restores_in_place = True
    orders_launches = False

    def __init__(self, pool: AnyPool) -> None:
        load_cuda()
        if not has_cuda():
            built, driver = load_cuda().versions()
            there = f"a driver for CUDA {driver // 1000}" if driver else "no CUDA driver"
            raise NativeError(
                f"jaxkv was built with CUDA {built // 1000}, and this machine has {there}; build jaxkv with "
                "a CUDA that the driver knows, or use backend='auto'"
            )
        prepare_pool(pool)
        self._pool = pool

    def require_reachable(self, device: jax.Device) -> None:
        """See ``TransferBackend``."""
        if device.platform != "gpu":
            raise CacheMismatchError(f"a cache leaf is on {device}, not on a GPU; use backend='cpu' there")

    def mover(self, pages: GroupPages) -> PageMover:
        """See ``TransferBackend``."""
        return CudaMover(self._pool, pages)


@final
class CudaMover(PageMover):
    """Programs that begin transfers on the stream of the model, which leaves are read and written on."""

    def __init__(self, pool: AnyPool, pages: GroupPages) -> None:
        self._pool = pool
        self._record_bytes = pages.record_bytes

        def jaxkv_offload(tag: jax.Array, *leaves: jax.Array) -> jax.Array:
            return ops.read_blocks(pool, tag, leaves, pages)

        def jaxkv_restore(tag: jax.Array, *leaves: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            return ops.write_blocks(pool, tag, leaves, pages)

        self.read_program = jax.jit(jaxkv_offload)
        self.write_program = jax.jit(jaxkv_restore, donate_argnums=range(1, 1 + len(pages.leaves)))

    def offload(self, leaves: Leaves, entries: Entries) -> CudaTransfer:
        """See ``PageMover``. What is computed from the leaves later waits on the device, if it must."""
        _, transfer = self._begin(leaves, entries, lambda tag: ((), self.read_program(tag, *leaves)))
        return transfer

    def restore(self, leaves: Leaves, entries: Entries) -> tuple[list[jax.Array], CudaTransfer]:
        """See ``PageMover``."""

        def launch(tag: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            status, written = self.write_program(tag, *leaves)
            return written, status

        return self._begin(leaves, entries, launch)

    def prefetch(self, device: jax.Device, entries: Entries) -> CudaTransfer:
        """See ``PageMover``. The copies begin at once, beside whatever the device does."""
        on = cuda_device(device)
        on.fit(self._record_bytes)
        with _opened(on, entries) as tag:
            on.engine.prefetch(tag.unsafe_buffer_pointer(), self._pool.pool_id, self._record_bytes)
            return CudaTransfer(on, tag.unsafe_buffer_pointer(), entries.call_number, tag)

    def forget_prefetched(self, device: jax.Device, entries: Entries) -> None:
        """See ``PageMover``."""
        wanted = entries.addresses[entries.block_ids >= 0]
        cuda_device(device).engine.forget_prefetched(int(entries.numbers[0]), wanted)

    def warm_up_offload(self, leaves: Leaves, num_entries: int) -> None:
        """See ``PageMover``."""
        np.asarray(self.offload(leaves, no_entries(num_entries)))

    def warm_up_restore(self, leaves: Leaves, num_entries: int) -> list[jax.Array]:
        """See ``PageMover``."""
        written, transfer = self.restore(leaves, no_entries(num_entries))
        np.asarray(transfer)
        return written

    def _begin(
        self, leaves: Leaves, entries: Entries, launch: Callable[[jax.Array], tuple[Any, jax.Array]]
    ) -> tuple[Any, CudaTransfer]:
        (device,) = leaves[0].devices()
        on = cuda_device(device)
        on.fit(self._record_bytes)
        # Caches that are committed to no device would go to JAX's default one, where nobody knows the tag.
        with jax.default_device(device), _opened(on, entries) as tag:
            result, status = launch(tag)
            return result, CudaTransfer(on, tag.unsafe_buffer_pointer(), entries.call_number, status)


@contextmanager
def _opened(on: CudaDevice, entries: Entries) -> Iterator[jax.Array]:
    """The tag of a transfer that is launched within. An interrupt, unlike an error, may come after that."""
    tag = on.open(entries.numbers)
    try:
        yield tag
    except Exception:
        on.engine.close(tag.unsafe_buffer_pointer())
        raise
    except BaseException:
        on.engine.abandon(tag.unsafe_buffer_pointer())
        raise


@final
class CudaTransfer:
    """The status to come of a transfer: its program has to run, and then its copies to end.

    ``np.asarray`` waits for it. Raises ``NativeError`` where CUDA failed, and what XLA raises where the
    program did.
    """

    def __init__(self, on: CudaDevice, tag: int, call_number: int, launched: jax.Array) -> None:
        self._on = on
        self._tag = tag
        self._call_number = call_number
        self._launched = launched
        self._lock = threading.Lock()
        self._outcome: tuple[list[int], str] | None = None

    def __del__(self) -> None:
        if self._outcome is None:
            self._on.disclaim(self._tag, self._call_number, self._launched)

    def is_ready(self) -> bool:
        """Whether the copies have ended."""
        if self._outcome is not None:
            return True
        launched: Any = self._launched  # jax.Array does not declare is_ready
        return bool(launched.is_ready()) and self._on.engine.has_ended(self._tag)

    def cancel(self) -> None:
        """Let it not begin, if it has not."""
        self._on.engine.cancel(self._call_number)
        if self._outcome is not None:
            self._on.engine.forget(self._call_number)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[np.int32]:
        with self._lock:
            if self._outcome is None:
                try:
                    self._launched.block_until_ready()
                except Exception:
                    self._close()
                    raise
                self._close()
            assert self._outcome is not None
            status, error = self._outcome
        if error:
            raise NativeError(error)
        return np.array(status, np.int32 if dtype is None else dtype)

    def _close(self) -> None:
        """Only once the program has ended, not when a wait for it was interrupted: it finds what to move by
        the tag, which the next transfer is given."""
        self._outcome = self._on.engine.close(self._tag)
        self._on.engine.forget(self._call_number)
