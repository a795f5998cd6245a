"""Times transfers between a GPU and the host pool, beside the link and plain JAX. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from statistics import median
from typing import Any, final

import jax
import numpy as np

from jaxkv.cli.bench.copy_caches import Shape, make_shape
from jaxkv.cli.bench.copy_contenders import (
    JAXKV,
    JIT_COPY,
    JIT_PINNED,
    OFFLOAD,
    PUT_PINNED,
    RESTORE,
    SCATTER_HOST,
    SCATTER_PINNED,
    JaxkvSide,
    JaxSide,
)
from jaxkv.cli.bench.series import Contender, Tell, interleave, tenths, undisturbed
from jaxkv.errors import ConfigError
from jaxkv.host_pool import HostPool
from jaxkv.transfer.cuda_device import CudaDevice, cuda_device, has_cuda, load_cuda
from jaxkv.transfer.cuda_paths import FORCED, CudaPaths

KIB = 1024
LINK = "the link: one pinned copy"
WAYS = {f"jaxkv, {name}": paths for name, paths in FORCED.items()}
"""Contenders that go one way whatever the size; ``JAXKV`` chooses."""

Link = Callable[[bool], int]
"""Microseconds that one copy of as many bytes takes, to the host or from there."""


@final
@dataclass(frozen=True, slots=True)
class CudaSettings:
    """What is measured: every combination of page size and number of leaves."""

    page_bytes: tuple[int, ...] = (2048 * KIB, 256 * KIB, 64 * KIB, 16 * KIB, 4 * KIB)
    num_leaves: tuple[int, ...] = (1, 32)
    moved_bytes: int = 256 * KIB * KIB
    repeats: int = 5
    strided: bool = True


@final
@dataclass(frozen=True, slots=True)
class CudaResult:
    """Seconds of every contender, by name, one number a round.

    ``on_device_s`` are those of jaxkv's between the first and the last of their work on the device.
    """

    direction: str
    shape: Shape
    seconds: Mapping[str, tuple[float, ...]]
    on_device_s: Mapping[str, tuple[float, ...]]

    def gb_per_s(self, name: str) -> float:
        """10^9 bytes a second, in the middle of all rounds."""
        return self.shape.num_bytes / median(self.seconds[name]) / 1e9

    def on_device_gb_per_s(self, name: str) -> float:
        """The same for the work on the device alone."""
        return self.shape.num_bytes / median(self.on_device_s[name]) / 1e9

    def of_link(self, name: str) -> float:
        """The share of the link that ``name`` reaches, in the middle of all rounds."""
        rounds = zip(self.seconds[LINK], self.seconds[name], strict=True)
        return median(link / other for link, other in rounds)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "direction": self.direction,
            "page_bytes": self.shape.page_bytes,
            "run_bytes": self.shape.run_bytes,
            "leaves": self.shape.num_leaves,
            "blocks": self.shape.num_blocks,
            "moved_bytes": self.shape.num_bytes,
            "contenders": [self._contender(name) for name in self.seconds],
        }

    def _contender(self, name: str) -> dict[str, Any]:
        low, high = tenths(self.seconds[name])
        rate = self.shape.num_bytes / 1e9
        return {
            "name": name,
            "gb_s": self.gb_per_s(name),
            "tenth": rate / high,
            "nine_tenths": rate / low,
            "of_link": self.of_link(name),
            "on_device_gb_s": self.on_device_gb_per_s(name) if name in self.on_device_s else None,
        }


@final
@dataclass(frozen=True, slots=True)
class CudaFigures:
    """All results, and the way that transfers go by themselves on this device."""

    settings: CudaSettings
    device: str
    paths: str
    results: tuple[CudaResult, ...]


def measure_cuda(settings: CudaSettings, tell: Tell) -> CudaFigures:
    """Measure all combinations on the first GPU. Raises ``ConfigError`` where JAX has none."""
    if jax.default_backend() != "gpu" or not has_cuda():
        raise ConfigError(
            f"JAX computes on {jax.default_backend()} here; this benchmark wants an NVIDIA GPU, JAX for CUDA "
            "and jaxkv built with it ('jaxkv doctor' says what there is)"
        )
    on = cuda_device(jax.devices()[0])
    results: list[CudaResult] = []
    for shape in _shapes(settings):
        pages = "heads before blocks" if shape.is_strided else f"pages of {shape.page_bytes // KIB} KiB"
        tell(f"{pages}, {shape.num_leaves} leaves")
        probe = load_cuda().CopyProbe(on.device.local_hardware_id, shape.num_bytes)

        def link(to_host: bool, probe: Any = probe, num_bytes: int = shape.num_bytes) -> int:
            return int(probe.time_us(to_host, num_bytes, 0))

        results += _measure_shape(shape, settings.repeats, on, link)
    return CudaFigures(settings, on.device.device_kind, f"{on.paths} ({on.paths_found})", tuple(results))


def _shapes(settings: CudaSettings) -> Iterator[Shape]:
    for num_leaves in settings.num_leaves:
        for page_bytes in settings.page_bytes:
            yield make_shape(page_bytes, num_leaves, settings.moved_bytes)
        if settings.strided:
            yield make_shape(0, num_leaves, settings.moved_bytes, strided=True)


def _measure_shape(shape: Shape, repeats: int, on: CudaDevice, link: Link) -> list[CudaResult]:
    block_ids = np.random.default_rng(0).permutation(shape.num_blocks).astype(np.int32)
    plain = JaxSide(shape, block_ids, np.ones((shape.num_leaves, *shape.leaf_shape), np.float32))
    with (
        HostPool(shape.num_bytes + shape.page_bytes * shape.num_leaves + (64 << 20)) as pool,
        closing(JaxkvSide(shape, pool, block_ids)) as ours,
        undisturbed(),
    ):
        # Whoever follows one that kept the host busy for long would find a link that has gone to rest.
        out = _Direction(OFFLOAD, on, ours, ours.offload, wake=lambda: link(True))
        out.add_others(
            Contender(LINK, lambda: link(True)),
            Contender(PUT_PINNED, plain.gather_and_put),
            Contender(JIT_PINNED, plain.gather_pinned),
            Contender(JIT_COPY, plain.gather_and_copy),
        )
        back = _Direction(RESTORE, on, ours, ours.restore, wake=lambda: link(False))
        back.add_others(
            Contender(LINK, lambda: link(False)),
            Contender(SCATTER_PINNED, plain.scatter_from_pinned, plain.put_pinned_pages),
            Contender(SCATTER_HOST, plain.scatter_from_host),
        )
        results = [out.measure(shape, repeats)]
        ours.check(shape)
        results.append(back.measure(shape, repeats))
        assert ours.num_copied_leaves == 0, "a restore copied whole leaves"
    return results


def _works(contender: Contender) -> bool:
    try:
        contender.prepare()
        contender.run()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@final
class _Direction:
    """Contenders in one direction, those of jaxkv first: the way it chooses, and every way it could. ``wake``
    comes before each, untimed."""

    def __init__(
        self,
        direction: str,
        on: CudaDevice,
        ours: JaxkvSide,
        move: Callable[[], object],
        wake: Callable[[], object],
    ) -> None:
        self._direction, self._on, self._ours, self._move = direction, on, ours, move
        self._wake = wake
        self._on_device_s: dict[str, list[float]] = {}
        self._contenders = [self._go(name, paths) for name, paths in ({JAXKV: on.paths} | WAYS).items()]

    def add_others(self, *contenders: Contender) -> None:
        """Add those that JAX can do on this device."""
        self._contenders += [self._awake(one) for one in contenders if _works(one)]

    def measure(self, shape: Shape, repeats: int) -> CudaResult:
        """Time all, and leave the device going the way it chose."""
        try:
            seconds = interleave(self._contenders, repeats)
        finally:
            self._on.engine.paths = astuple(self._on.paths)
        on_device_s = {name: tuple(times[-repeats:]) for name, times in self._on_device_s.items()}
        return CudaResult(self._direction, shape, seconds, on_device_s)

    def _awake(self, contender: Contender) -> Contender:
        def prepare() -> None:
            contender.prepare()
            self._wake()

        return replace(contender, prepare=prepare)

    def _go(self, name: str, paths: CudaPaths) -> Contender:
        def prepare() -> None:
            self._on.engine.paths = astuple(paths)

        def run() -> None:
            self._move()
            self._on_device_s.setdefault(name, []).extend(self._ours.copying_s(1))

        return self._awake(Contender(name, run, prepare))
