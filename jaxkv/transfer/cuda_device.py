"""The CUDA devices of this process, each with an engine that moves blocks, and the pools pinned for them."""

from __future__ import annotations

import importlib
import logging
import threading
import weakref
from dataclasses import astuple
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, final
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
    """Whether the extension loads and this machine has a CUDA driver."""
    try:
        _, driver_version = load_cuda().versions()
    except NativeError:
        return False
    return bool(driver_version)


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
        while (address := self.engine.open(numbers)) is None:
            # Not committed to the device, or what programs return would be, although the caches were not.
            with jax.default_device(self.device):
                tag = jax.device_put(np.zeros(1, np.int32))
            self._tags[tag.unsafe_buffer_pointer()] = tag.block_until_ready()
            self.engine.add_tag(tag.unsafe_buffer_pointer())
        return self._tags[address]


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
        unpin = weakref.finalize(pool, load_cuda().unpin_pool, pool.pool_id, generation)
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
