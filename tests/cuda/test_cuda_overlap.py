"""Copies and compute at the same time, by the clocks of the device.

Steps of matrix products are timed alone, transfers alone (by CUDA events), and then both, a transfer after
each step as a serving loop has it. Were nothing to run at the same time, both would take the sum of the two.
What is asked for is that a share of the shorter one disappears behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_caches import GROUP, Caches, canonical_of, held, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.slots import Slots
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer, Ticket
from jaxkv.transfer.cuda_paths import FORCED

pytestmark = [pytest.mark.cuda, pytest.mark.alone]

MIB = 1 << 20
NUM_STEPS, NUM_MOVED, NUM_ROUNDS = 8, 12, 5
SIZE, PRODUCTS = 4096, 4
COMPUTE_PER_COPY = 1.5
"""Seconds of compute for each of copying: the longer of the two has room for the other."""


@jax.jit
def products(x: jax.Array, weights: jax.Array) -> jax.Array:
    for _ in range(PRODUCTS):
        x = jnp.tanh(x @ weights)
    return x


@dataclass
class Timed:
    """Blocks of 4 MiB, moved in one direction after each of some steps of compute."""

    transfer: BlockTransfer
    caches: Caches
    slots: list[Slots]
    weights: jax.Array
    is_offload: bool
    calls_per_step: int = 1

    def start(self) -> list[Ticket]:
        """Begin the transfers of one step each."""
        return [self.start_one(step) for step in range(NUM_STEPS)]

    def start_one(self, step: int) -> Ticket:
        ids = np.arange(NUM_MOVED) + step
        if self.is_offload:
            return self.transfer.offload(self.caches, GROUP, ids, self.slots[step])
        restored, ticket = self.transfer.restore(self.caches, GROUP, ids, self.slots[step])
        self.caches = dict(restored)
        return ticket

    def compute(self, x: jax.Array) -> jax.Array:
        for _ in range(self.calls_per_step):
            x = products(x, self.weights)
        return x

    def copies_s(self) -> float:
        """Seconds on the device of all transfers, each waited for."""
        return sum(copied_s(self.start_one(step)) for step in range(NUM_STEPS))

    def compute_s(self) -> float:
        def run() -> None:
            x = self.weights
            for _ in range(NUM_STEPS):
                x = self.compute(x)
            x.block_until_ready()

        return seconds(run)

    def both_s(self) -> float:
        def run() -> None:
            x, tickets = self.weights, []
            for step in range(NUM_STEPS):
                x = self.compute(x)
                tickets.append(self.start_one(step))
            x.block_until_ready()
            for ticket in tickets:
                copied_s(ticket)

        return seconds(run)

    def tune(self) -> None:
        """Make compute take longer than the copies."""
        wanted_s = COMPUTE_PER_COPY * min(self.copies_s() for _ in range(2))
        took_s = min(self.compute_s() for _ in range(2))
        self.calls_per_step = max(1, -(-int(1e6 * wanted_s) // int(1e6 * took_s)))

    def hidden(self) -> dict[str, float]:
        """The share of the shorter one that disappears, and what it comes from, the best of some rounds."""
        self.tune()
        rounds = [(self.compute_s(), self.copies_s(), self.both_s()) for _ in range(NUM_ROUNDS)]
        compute, copies, both = (min(times) for times in zip(*rounds, strict=True))
        share = (compute + copies - both) / min(compute, copies)
        return {"hidden": share, "compute_s": compute, "copies_s": copies, "both_s": both}


def seconds(run: Callable[[], None]) -> float:
    started = perf_counter()
    run()
    return perf_counter() - started


def copied_s(ticket: Ticket) -> float:
    result = ticket.wait()
    assert result.error is None
    return result.elapsed_s


@pytest.fixture(scope="module")
def pool() -> Iterator[HostPool]:
    with HostPool(450 * MIB) as opened:
        yield opened


@pytest.fixture(params=["offload", "restore"])
def timed(request: pytest.FixtureRequest, pool: HostPool) -> Iterator[Timed]:
    """384 MiB in transfers of 48 MiB, which staging memory has room for."""
    caches = make_caches(2, NUM_MOVED + NUM_STEPS, 2 * MIB)
    transfer = BlockTransfer(canonical_of(caches), pool)
    slots = [transfer.reserve(GROUP, NUM_MOVED).keep() for _ in range(NUM_STEPS)]
    weights = jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.bfloat16) / 64
    timed = Timed(transfer, caches, slots, weights, is_offload=True)
    timed.start()[-1].wait()
    timed.is_offload = request.param == "offload"
    yield timed
    for step in range(NUM_STEPS):
        assert_same_bytes(held(pool, slots[step]), on_host(timed.caches)[step:][:NUM_MOVED].tobytes())
        transfer.release(slots[step])


@pytest.mark.parametrize(("way", "at_least"), [("engine", 0.6), ("kernel", -0.2)])
def test_staged_copies_run_beside_compute(
    way: str, at_least: float, timed: Timed, engine: Any, record_property: Callable[..., None]
) -> None:
    """A kernel shares the multiprocessors with the products: all that is asked is that it delays nothing."""
    engine.paths = astuple(FORCED[way])
    figures = timed.hidden()
    for name, value in figures.items():
        record_property(name, value)
    assert figures["hidden"] >= at_least, figures


def test_direct_copies_are_compute_and_hide_nothing(
    timed: Timed, engine: Any, record_property: Callable[..., None]
) -> None:
    """What the share is where nothing can run at the same time: were it large, the test above would prove
    nothing."""
    engine.paths = astuple(FORCED["direct"])
    figures = timed.hidden()
    for name, value in figures.items():
        record_property(name, value)
    assert figures["hidden"] <= 0.2, figures
