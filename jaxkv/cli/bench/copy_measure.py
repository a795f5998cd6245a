"""Times transfers of blocks and what one would do without jaxkv, in one run. Prints nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, final

import numpy as np

from jaxkv.cli.bench.copy_caches import Shape, make_shape
from jaxkv.cli.bench.copy_contenders import (
    COPYING,
    EAGER,
    JAXKV,
    JIT_PINNED,
    MEMCPY,
    OFFLOAD,
    RESTORE,
    ROOF,
    SCATTER,
    TAKE_ALL,
    TAKE_ONE,
    HostSide,
    JaxkvSide,
    JaxSide,
    offload_contenders,
    restore_contenders,
)
from jaxkv.cli.bench.processes import run_fresh
from jaxkv.cli.bench.series import Ratio, Tell, interleave, tenths, undisturbed
from jaxkv.errors import ConfigError
from jaxkv.host_pool import HostPool

KIB = 1024
_OF_ROOF = ((256 * KIB, 1.0), (64 * KIB, 0.88), (16 * KIB, 0.85), (4 * KIB, 0.70))
_STRIDED_OF_PAGES = 0.75
_AT_LEAST = {TAKE_ONE: 2.5, TAKE_ALL: 1.3, JIT_PINNED: 4.0, EAGER: 12.0, SCATTER: 3.0}


@final
@dataclass(frozen=True, slots=True)
class CopySettings:
    """What is measured: every combination of page size, number of leaves and number of threads."""

    page_bytes: tuple[int, ...] = (2048 * KIB, 256 * KIB, 64 * KIB, 16 * KIB, 4 * KIB)
    num_leaves: tuple[int, ...] = (1,)
    num_threads: tuple[int, ...] = ()
    moved_bytes: int = 512 * KIB * KIB
    repeats: int = 7
    strided: bool = True


@final
@dataclass(frozen=True, slots=True)
class CopyResult:
    """Seconds of every contender, by name, one number a round; ``COPYING`` is a part of ``JAXKV``."""

    direction: str
    shape: Shape
    num_threads: int
    seconds: Mapping[str, tuple[float, ...]]

    def gb_per_s(self, name: str) -> float:
        """10^9 bytes a second, in the middle of all rounds."""
        return self.shape.num_bytes / median(self.seconds[name]) / 1e9

    def ratio(self, name: str) -> Ratio:
        """How many times faster jaxkv was than ``name``."""
        rounds = zip(self.seconds[name], self.seconds[JAXKV], strict=True)
        return Ratio(name, tuple(other / ours for other, ours in rounds), self._at_least(name))

    @property
    def ratios(self) -> list[Ratio]:
        """Against all others."""
        return [self.ratio(name) for name in self.seconds if name not in (JAXKV, COPYING)]

    def _at_least(self, name: str) -> float | None:
        """The project's targets: for two threads or more, and page sizes from 4 KiB on."""
        if self.num_threads < 2:
            return None
        if name == ROOF:
            # Runs of pages in pieces are held against pages of the same size.
            sizes = () if self.shape.is_strided else _OF_ROOF
            return next((share for size, share in sizes if self.shape.page_bytes >= size), None)
        if name == MEMCPY:
            return 1.35 if 4 * KIB <= self.shape.run_bytes <= 64 * KIB else None
        return _AT_LEAST.get(name)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "direction": self.direction,
            "page_bytes": self.shape.page_bytes,
            "run_bytes": self.shape.run_bytes,
            "leaves": self.shape.num_leaves,
            "blocks": self.shape.num_blocks,
            "threads": self.num_threads,
            "moved_bytes": self.shape.num_bytes,
            "contenders": [self._contender(name) for name in self.seconds],
            "jaxkv_times": [ratio.as_json() for ratio in self.ratios],
        }

    def _contender(self, name: str) -> dict[str, Any]:
        low, high = tenths(self.seconds[name])
        rate = self.shape.num_bytes / 1e9
        return {"name": name, "gb_s": self.gb_per_s(name), "tenth": rate / high, "nine_tenths": rate / low}


@final
@dataclass(frozen=True, slots=True)
class CopyFigures:
    """All results, pages in the order they were asked for, those in pieces last."""

    settings: CopySettings
    results: tuple[CopyResult, ...]

    @property
    def strided_ratios(self) -> list[tuple[CopyResult, Ratio]]:
        """For pages in pieces: their share of the roof, over that of whole pages as large as a piece."""
        found = []
        for result in self.results:
            whole = self._find_whole(result)
            if whole is not None:
                share = result.ratio(ROOF).median / whole.ratio(ROOF).median
                at_least = _STRIDED_OF_PAGES if result.num_threads > 1 else None
                found.append((result, Ratio(f"whole pages of {size_name(4 * KIB)}", (share,), at_least)))
        return found

    def _find_whole(self, strided: CopyResult) -> CopyResult | None:
        if not strided.shape.is_strided:
            return None
        wanted = (strided.direction, strided.num_threads, strided.shape.num_leaves, strided.shape.run_bytes)
        return next(
            (
                one
                for one in self.results
                if (one.direction, one.num_threads, one.shape.num_leaves, one.shape.page_bytes) == wanted
            ),
            None,
        )


def size_name(num_bytes: int) -> str:
    """Such as ``64 KiB``."""
    return f"{num_bytes // KIB} KiB" if num_bytes < KIB * KIB else f"{num_bytes // KIB // KIB} MiB"


def usable_cpus() -> list[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def measure_copy(settings: CopySettings, tell: Tell) -> CopyFigures:
    """Measure all combinations. Fewer threads than processors are measured in a process that has as many."""
    cpus = usable_cpus()
    results: list[CopyResult] = []
    for num_threads in settings.num_threads or (len(cpus),):
        alone = replace(settings, num_threads=(num_threads,))
        if num_threads == len(cpus):
            results += _measure_here(alone, tell)
            continue
        if num_threads > len(cpus) or not hasattr(os, "sched_setaffinity"):
            raise ConfigError(
                f"{num_threads} threads cannot be measured: this process has {len(cpus)} processors, "
                "and fewer only on Linux"
            )
        tell(f"{num_threads} of {len(cpus)} threads, in a process of their own")
        results += run_fresh(cpus[:num_threads], _measure_here, alone, _say_nothing)
    return CopyFigures(settings, tuple(results))


def _say_nothing(_line: str) -> None:
    pass


def _measure_here(settings: CopySettings, tell: Tell) -> list[CopyResult]:
    results: list[CopyResult] = []
    (num_threads,) = settings.num_threads
    for shape in _shapes(settings):
        pages = "heads before blocks" if shape.is_strided else f"pages of {size_name(shape.page_bytes)}"
        tell(f"{pages}, {shape.num_leaves} leaves, {num_threads} threads")
        results += _measure_shape(shape, settings.repeats, num_threads)
    return results


def _shapes(settings: CopySettings) -> Iterator[Shape]:
    for num_leaves in settings.num_leaves:
        for page_bytes in settings.page_bytes:
            yield make_shape(page_bytes, num_leaves, settings.moved_bytes)
        if settings.strided:
            yield make_shape(0, num_leaves, settings.moved_bytes, strided=True)


def _measure_shape(shape: Shape, repeats: int, num_threads: int) -> list[CopyResult]:
    block_ids = np.random.default_rng(0).permutation(shape.num_blocks).astype(np.int32)
    capacity = shape.num_bytes + shape.page_bytes * shape.num_leaves + (64 << 20)
    with ExitStack() as stack:
        pool = stack.enter_context(HostPool(capacity))
        ours = stack.enter_context(closing(JaxkvSide(shape, pool, block_ids)))
        host = stack.enter_context(closing(HostSide(shape, block_ids, num_threads)))
        plain = JaxSide(shape, block_ids, host.buffers)
        stack.enter_context(undisturbed())
        out = dict(interleave(offload_contenders(ours, host, plain, num_threads), repeats))
        out[COPYING] = ours.copying_s(repeats)
        ours.check(shape)
        back = dict(interleave(restore_contenders(ours, host, plain, num_threads), repeats))
        back[COPYING] = ours.copying_s(repeats)
        assert ours.num_copied_leaves == 0, "a restore copied whole leaves"
    return [
        CopyResult(OFFLOAD, shape, num_threads, out),
        CopyResult(RESTORE, shape, num_threads, back),
    ]
