"""Times the move of one block: the compiled program alone, and the whole public call. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cli.bench.copy_caches import GROUP, Shape, fill, make_shape
from jaxkv.cli.bench.series import Contender, Measurement, Tell, interleave, undisturbed
from jaxkv.host_pool import HostPool
from jaxkv.transfer import BlockTransfer, ops

OP, CALL, NOTHING = "the op in a program", "BlockTransfer, waited for", "a program that does nothing"
OFFLOAD, RESTORE = "offload", "restore"
_TARGETS_S = {(OFFLOAD, 1): 8e-6, (OFFLOAD, 60): 90e-6, (RESTORE, 60): 140e-6}
_BURST = 20
_MOST_BLOCKS = 1024  # of one measurement, before it begins anew


@final
@dataclass(frozen=True, slots=True)
class LatencySettings:
    """Leaves of ``page_bytes`` a block, so many blocks that a processor's cache does not hold them."""

    num_leaves: tuple[int, ...] = (1, 8, 60)
    page_bytes: int = 4096
    cache_bytes: int = 64 << 20
    repeats: int = 25


@final
@dataclass(frozen=True, slots=True)
class LatencyResult:
    """One direction at one number of leaves; measurements of ``OP``, ``CALL`` and ``NOTHING``."""

    direction: str
    num_leaves: int
    measurements: tuple[Measurement, ...]


@final
@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """All results, fewest leaves first."""

    settings: LatencySettings
    results: tuple[LatencyResult, ...]


def measure_latency(settings: LatencySettings, tell: Tell) -> LatencyFigures:
    """Measure every number of leaves."""
    results: list[LatencyResult] = []
    for num_leaves in settings.num_leaves:
        tell(f"one block of {num_leaves} leaves")
        shape = make_shape(settings.page_bytes, num_leaves, settings.cache_bytes)
        with (
            HostPool(2 * shape.num_bytes + (64 << 20)) as pool,
            closing(_Calls(shape, pool)) as calls,
            closing(_Programs(shape, pool)) as programs,
            undisturbed(),
        ):
            measured = interleave(_contenders(calls, programs), settings.repeats, burst=_BURST)
        results += _results(num_leaves, measured)
    return LatencyFigures(settings, tuple(results))


def _contenders(calls: _Calls, programs: _Programs) -> list[Contender]:
    return [
        Contender(f"{OFFLOAD} {OP}", programs.offload, programs.choose),
        Contender(f"{OFFLOAD} {CALL}", calls.offload, calls.choose),
        Contender(f"{OFFLOAD} {NOTHING}", programs.only_read),
        Contender(f"{RESTORE} {OP}", programs.restore, programs.choose),
        Contender(f"{RESTORE} {CALL}", calls.restore, calls.choose),
        Contender(f"{RESTORE} {NOTHING}", programs.hand_on),
    ]


def _results(num_leaves: int, measured: Mapping[str, tuple[float, ...]]) -> Iterator[LatencyResult]:
    for direction in (OFFLOAD, RESTORE):
        targets = {OP: _TARGETS_S.get((direction, num_leaves))}
        measurements = tuple(
            Measurement(name, measured[f"{direction} {name}"], targets.get(name))
            for name in (OP, CALL, NOTHING)
        )
        yield LatencyResult(direction, num_leaves, measurements)


@final
class _Calls:
    """The public way: a block and a slot are named, everything is checked, a ticket is waited for."""

    def __init__(self, shape: Shape, pool: HostPool) -> None:
        self._caches: Any = {f"layer.{i}": fill(shape.leaf_shape) for i in range(shape.num_leaves)}
        self._transfer = BlockTransfer(shape.make_canonical(self._caches), pool)
        with self._transfer.reserve(GROUP, shape.num_blocks) as slots:
            self._slots = slots.keep()
        order = np.random.default_rng(0).permutation(shape.num_blocks)[:_MOST_BLOCKS].tolist()
        self._pairs = cycle([([block], self._slots[block : block + 1]) for block in order])
        self.choose()

    def choose(self) -> None:
        """The next block and its slot."""
        self._block, self._slot = next(self._pairs)

    def offload(self) -> None:
        """The block to its slot."""
        result = self._transfer.offload(self._caches, GROUP, self._block, self._slot).wait()
        assert result.error is None, result.error

    def restore(self) -> None:
        """The block from its slot."""
        self._caches, ticket = self._transfer.restore(self._caches, GROUP, self._block, self._slot)
        result = ticket.wait()
        assert result.error is None, result.error

    def close(self) -> None:
        """Give the slots back."""
        self._transfer.release(self._slots)


@final
class _Programs:
    """Jitted programs of nothing but an op, as those of ``BlockTransfer``: its numbers are on the device."""

    def __init__(self, shape: Shape, pool: HostPool) -> None:
        self._leaves: list[Any] = [fill(shape.leaf_shape) for _ in range(shape.num_leaves)]
        canonical = shape.make_canonical({f"layer.{i}": leaf for i, leaf in enumerate(self._leaves)})
        self._pool = pool
        self._slots = pool.reserve_slots(canonical.records[GROUP].record_bytes, shape.num_blocks)
        self._pages = canonical.groups[GROUP]
        (generation,) = pool.token()
        addresses = pool.pin(self._slots)
        order = np.random.default_rng(1).permutation(shape.num_blocks)[:_MOST_BLOCKS]
        self._calls = cycle(
            [jnp.array([generation, 0, block, addresses[block]], jnp.int32) for block in order]
        )
        donated = range(1, 1 + shape.num_leaves)
        self._read = jax.jit(self._offload_op)
        self._write = jax.jit(self._restore_op, donate_argnums=donated)
        self._look = jax.jit(lambda numbers, *_others: numbers + 1, keep_unused=True)
        self._pass = jax.jit(
            lambda numbers, *leaves: (numbers + 1, leaves), donate_argnums=donated, keep_unused=True
        )
        self.choose()

    def choose(self) -> None:
        """The next block and its address."""
        self._numbers = next(self._calls)

    def offload(self) -> None:
        """The op that reads."""
        self._read(self._numbers, *self._leaves).block_until_ready()

    def restore(self) -> None:
        """The op that writes in place."""
        self._run_in_place(self._write)

    def only_read(self) -> None:
        """The same arguments as ``offload``, and no op."""
        self._look(self._numbers, *self._leaves).block_until_ready()

    def hand_on(self) -> None:
        """The same arguments and results as ``restore``, and no op."""
        self._run_in_place(self._pass)

    def close(self) -> None:
        """Give the slots back."""
        self._pool.unpin(self._slots)
        self._pool.free_slots(self._slots)

    def _run_in_place(self, program: Callable[..., Any]) -> None:
        status, self._leaves = program(self._numbers, *self._leaves)
        status.block_until_ready()

    def _offload_op(self, numbers: Any, *leaves: Any) -> jax.Array:
        return ops.read_blocks(self._pool, numbers, leaves, self._pages)

    def _restore_op(self, numbers: Any, *leaves: Any) -> tuple[jax.Array, list[jax.Array]]:
        return ops.write_blocks(self._pool, numbers, leaves, self._pages)
