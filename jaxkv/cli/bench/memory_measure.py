"""Measures what pools cost to make, and what memory transfers take beside caches and pool. Prints nothing.

Each pool is measured in a fresh process, because only the first touch of memory shows what a cold start is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import final

import numpy as np

from jaxkv.cli.bench.copy_caches import make_shape
from jaxkv.cli.bench.copy_contenders import HostSide, JaxkvSide, JaxSide
from jaxkv.cli.bench.processes import run_fresh
from jaxkv.cli.bench.series import Measurement, Tell
from jaxkv.host_pool import HostPool
from jaxkv.memory_limit import available_memory_bytes

GIB = 1 << 30
_TARGETS_S = {4 * GIB: 0.4}
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_ROOM = 1.25  # What must be free for a pool to be measured, times its size.


@final
@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Pool sizes; those that the machine has no room for are left out and said so."""

    pool_bytes: tuple[int, ...] = (GIB, 4 * GIB)
    moved_bytes: int = 512 << 20
    repeats: int = 5


@final
@dataclass(frozen=True, slots=True)
class PoolResult:
    """``cold_s`` is the first pool of a process; ``warm`` those after it, ``numpy`` an array of ones instead.

    ``extra_bytes``: how far the peak of resident memory was above what the pool holds; ``None`` where the
    system does not tell.
    """

    num_bytes: int
    cold_s: float
    warm: Measurement
    numpy: Measurement
    huge_pages: bool
    extra_bytes: int | None


@final
@dataclass(frozen=True, slots=True)
class PeakResult:
    """How far the peak of resident memory during an operation was above what was resident before."""

    name: str
    extra_bytes: int | None


@final
@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """All that was measured, and the sizes there was no room for."""

    settings: MemorySettings
    pools: tuple[PoolResult, ...]
    peaks: tuple[PeakResult, ...]
    too_large: tuple[int, ...]


def measure_memory(settings: MemorySettings, tell: Tell) -> MemoryFigures:
    """Measure pools one after another, then transfers."""
    pools: list[PoolResult] = []
    too_large: list[int] = []
    for num_bytes in settings.pool_bytes:
        if _ROOM * num_bytes > available_memory_bytes():
            too_large.append(num_bytes)
            continue
        tell(f"pools of {num_bytes / GIB:g} GiB")
        pools.append(run_fresh(None, _measure_pool, num_bytes, settings.repeats))
    tell("memory that transfers take")
    peaks = run_fresh(None, _measure_peaks, settings.moved_bytes)
    return MemoryFigures(settings, tuple(pools), tuple(peaks), tuple(too_large))


def _measure_pool(num_bytes: int, repeats: int) -> PoolResult:
    HostPool(4096).close()  # Loads the extension and starts its threads.
    resident = _reset_peak()
    cold_s, huge_pages = _time_pool(num_bytes)
    extra = None if resident is None else max(0, _peak() - resident - num_bytes)
    warm, ones = [], []
    for _ in range(repeats):
        warm.append(_time_pool(num_bytes)[0])
        ones.append(_time_ones(num_bytes))
    return PoolResult(
        num_bytes,
        cold_s,
        Measurement("warm", tuple(warm), _TARGETS_S.get(num_bytes)),
        Measurement("np.ones", tuple(ones)),
        huge_pages,
        extra,
    )


def _time_pool(num_bytes: int) -> tuple[float, bool]:
    start = perf_counter()
    pool = HostPool(num_bytes)
    elapsed = perf_counter() - start
    huge_pages = pool.huge_pages
    pool.close()
    return elapsed, huge_pages


def _time_ones(num_bytes: int) -> float:
    start = perf_counter()
    np.ones(num_bytes, np.uint8)
    return perf_counter() - start


def _measure_peaks(moved_bytes: int) -> list[PeakResult]:
    shape = make_shape(64 << 10, 1, moved_bytes)
    block_ids = np.random.default_rng(0).permutation(shape.num_blocks).astype(np.int32)
    with (
        HostPool(2 * shape.num_bytes + (64 << 20)) as pool,
        closing(JaxkvSide(shape, pool, block_ids)) as ours,
        closing(HostSide(shape, block_ids, 1)) as host,
    ):
        plain = JaxSide(shape, block_ids, host.buffers)
        operations: dict[str, Callable[[], None]] = {
            "jaxkv offload": ours.offload,
            "jaxkv restore": ours.restore,
            "jit gather + copy": plain.gather_and_copy,
            "jit scatter of host pages": plain.scatter_from_host,
        }
        return [PeakResult(name, _extra(operation)) for name, operation in operations.items()]


def _extra(operation: Callable[[], None]) -> int | None:
    """The second time, when everything is compiled."""
    operation()
    resident = _reset_peak()
    operation()
    return None if resident is None else max(0, _peak() - resident)


def _reset_peak() -> int | None:
    """Let the peak begin at what is resident now, and say how much that is, on a system that can."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _peak() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
