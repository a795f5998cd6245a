"""The CUDA devices of this process, each with an engine that moves blocks, and the pools pinned for them."""

from __future__ import annotations

import importlib
import logging
import os
import threading
import weakref
from collections import deque
from dataclasses import astuple
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, final
from weakref import WeakSet

import jax
import numpy as np
import numpy.typing as npt

from jaxkv.errors import NativeError
from jaxkv.shared_pool import AnyPool
from jaxkv.transfer.cuda_paths import PATHS_VERSION, PROBE_BYTES, CudaPaths, find_paths, sample_link

if TYPE_CHECKING:
    from jaxkv._cuda import Engine

STAGING_BYTES = 128 << 20
"""Memory of a device that transfers pass through, for each direction."""

_log = logging.getLogger(__name__)
_devices: dict[jax.Device, CudaDevice] = {}
_pinned: WeakSet[AnyPool] = WeakSet()
_lock = threading.Lock()


@cache
def load_cuda() -> ModuleType:
    """The CUDA extension. Raises ``NativeError`` if it was not built or does not load."""
    try:
        return importlib.import_module("jaxkv._cuda")
    except ImportError as error:
        raise NativeError(
            f"jaxkv's CUDA extension does not load ({error}); install jaxkv where nvcc is on PATH, with "
            "'pip install . --config-settings=cmake.define.JAXKV_CUDA=on' to be told why it is not built, "
            "or use backend='xla'"
        ) from error


def has_cuda() -> bool:
    """Whether the extension loads and this machine has a CUDA driver that knows as late a major version."""
    try:
        built, driver = load_cuda().versions()
    except NativeError:
        return False
    return bool(driver // 1000 >= built // 1000)


@final
class CudaDevice:
    """The engine of one device, and the tags by which it knows the transfers that programs begin.

    A tag is an array on the device that is never read. A program is given one, and the engine finds by its
    address what the transfer moves: ids and addresses need no copy to the device, and any number of blocks is
    one program.
    """

    def __init__(self, device: jax.Device) -> None:
        self.device = device
        self.engine: Engine = load_cuda().Engine(device.local_hardware_id, STAGING_BYTES)
        self.paths, self.paths_found = self._find_paths()
        self.engine.paths = astuple(self.paths)
        self._tags: dict[int, jax.Array] = {}
        self._unclaimed: deque[tuple[int, int, Any]] = deque()
        self._fits = 0
        self._lock = threading.Lock()

    def _find_paths(self) -> tuple[CudaPaths, str]:
        ordinal = self.device.local_hardware_id
        built, driver = load_cuda().versions()
        key = f"{self.device.device_kind}, CUDA {built}, driver {driver}, measured as of {PATHS_VERSION}"
        try:
            return find_paths(key, lambda: sample_link(load_cuda().CopyProbe(ordinal, PROBE_BYTES).time_us))
        except NativeError as error:
            return CudaPaths(*self.engine.paths), f"by default, since nothing could be measured: {error}"

    def fit(self, record_bytes: int) -> None:
        """Make staging memory for records of this size, where there is none yet."""
        with self._lock:
            if record_bytes <= self._fits:
                return
            self.engine.fit(record_bytes)
            self._fits = record_bytes
            refusal = self.engine.staging_refusal
        if refusal:
            _log.warning(
                "no staging memory on %s, so transfers keep the model waiting: %s", self.device, refusal
            )

    def open(self, numbers: npt.NDArray[np.int32]) -> jax.Array:
        """The tag of a new transfer of ``numbers``, which are those of ``Entries``."""
        self._close_unclaimed()
        while (address := self.engine.open(numbers)) is None:
            # Not committed to the device, or what programs return would be, although the caches were not.
            with jax.default_device(self.device):
                tag = jax.device_put(np.zeros(1, np.int32))
            self._tags[tag.unsafe_buffer_pointer()] = tag.block_until_ready()
            self.engine.add_tag(tag.unsafe_buffer_pointer())
        return self._tags[address]

    def disclaim(self, tag: int, call_number: int, launched: jax.Array) -> None:
        """Have a transfer closed that nobody will wait for, sometime after it has ended: until then it keeps
        its pool. May be called by the garbage collector: takes no lock."""
        self._unclaimed.append((tag, call_number, launched))

    def _close_unclaimed(self) -> None:
        if not self._unclaimed:
            return
        with self._lock:
            for _ in range(len(self._unclaimed)):
                tag, call_number, launched = self._unclaimed.popleft()
                if launched.is_ready() and self.engine.has_ended(tag):
                    self.engine.close(tag)
                    self.engine.forget(call_number)
                else:
                    self.disclaim(tag, call_number, launched)


def cuda_device(device: jax.Device) -> CudaDevice:
    """The engine of ``device``, the same for all who ask. Raises ``NativeError`` if CUDA refuses."""
    with _lock:
        if device not in _devices:
            _devices[device] = CudaDevice(device)
        return _devices[device]


def pin_pool(pool: AnyPool) -> None:
    """Let devices reach the memory of ``pool`` until it is closed. A second call does nothing.

    Where the system refuses, transfers go through a little pinned memory, and pool ops inside a user's own
    programs move nothing.
    """
    with _lock:
        if pool in _pinned:
            return
        ordinal = jax.local_devices(backend="cuda")[0].local_hardware_id
        generation = int(pool.token()[0])
        refusal = load_cuda().pin_pool(ordinal, pool.pool_id, generation, pool.arena_bytes())
        unpin = weakref.finalize(pool, _unpin, os.getpid(), pool.pool_id, generation)
        unpin.atexit = False
        pool.at_close(unpin)
        _pinned.add(pool)
    if refusal:
        _log.warning(
            "the host pool of %d bytes could not be pinned, so transfers take longer: %s; raise the limit of "
            "locked memory (ulimit -l) or give the pool less",
            pool.capacity_bytes,
            refusal,
        )


def _unpin(process: int, pool_id: int, generation: int) -> None:
    """What the garbage collector may call at any time, in any thread.

    A forked child has no pinned memory, and its copy of a lock may be held by a thread that is not there.
    """
    if os.getpid() == process:
        load_cuda().unpin_pool(pool_id, generation)
