"""What happens in processes of their own: ``python scenarios.py NAME``.

Whatever is not as it should be ends the process with an error.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from word_caches import GROUP, Caches, DecodeLoop, canonical_of, held, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.slots import Slots
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer, cuda_device, ops
from jaxkv.transfer.cuda_paths import FORCED

KIB, MIB = 1 << 10, 1 << 20
MORE_THAN_ANY_DEVICE_HAS = 1 << 50
FILLER_BYTES = (64 * MIB, MIB)
NUM_THREADS = 6

SCENARIOS: dict[str, Callable[[], None]] = {}
kept: list[Any] = []
"""What lives until the process ends."""


def scenario(function: Callable[[], None]) -> Callable[[], None]:
    SCENARIOS[function.__name__] = function
    return function


class Warnings(logging.Handler):
    """The warnings of jaxkv, as text."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logging.getLogger("jaxkv").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def loop_on_every_path(pool: HostPool, num_steps: int, num_leaves: int, page_bytes: int) -> None:
    """A decode loop with loads, once on each path."""
    engine = cuda_device.cuda_device(jax.devices()[0]).engine
    for paths in FORCED.values():
        engine.paths = astuple(paths)
        loop = DecodeLoop(pool, num_blocks=5, num_offloaded=2, lag=1)
        loop.run(num_steps, num_leaves, page_bytes)
        loop.check()


def pin_elsewhere(pool: HostPool) -> None:
    """Pin the memory of ``pool`` under another number, so that it cannot be pinned under its own."""
    assert cuda_device.load_cuda().pin_pool(0, 10**6, 1, pool.arena_bytes()) is None


# -- staging memory ---------------------------------------------------------------------------------------


@scenario
def staging_refused() -> None:
    """Transfers are direct, which is said once."""
    cuda_device.STAGING_BYTES = MORE_THAN_ANY_DEVICE_HAS
    warnings = Warnings()
    with HostPool(64 * MIB) as pool:
        loop_on_every_path(pool, num_steps=20, num_leaves=3, page_bytes=64 * KIB)
        assert len(warnings.texts) == 1, warnings.texts
        assert "no staging memory" in warnings.texts[0]
        # For larger records the engine asks again, and may say so again.
        loop_on_every_path(pool, num_steps=3, num_leaves=3, page_bytes=MIB)


@scenario
def staging_refused_and_pool_unpinned() -> None:
    """No way is left: transfers fail and say why, and the caches live on."""
    cuda_device.STAGING_BYTES = MORE_THAN_ANY_DEVICE_HAS
    caches = make_caches(2, 8, 64 * KIB)
    words = on_host(caches)
    with HostPool(8 * MIB) as pool:
        pin_elsewhere(pool)
        transfer = BlockTransfer(canonical_of(caches), pool)
        with transfer.reserve(GROUP, 4) as slots:
            store = transfer.offload(caches, GROUP, range(4), slots)
            restored, load = transfer.restore(caches, GROUP, range(4), slots)
            for ticket in (store, load):
                error = ticket.wait().error
                assert error is not None
                assert "could not be pinned" in error, error
                assert "no staging memory" in error, error
            assert_same_bytes(on_host(dict(restored)), words)


@scenario
def records_larger_than_staging() -> None:
    """Records of 80 MiB, after smaller ones that are still under way."""
    with HostPool(500 * MIB) as pool, HostPool(70 * MIB) as other_pool:
        small = DecodeLoop(other_pool, num_blocks=24, num_offloaded=6)
        small.run(num_steps=20, num_leaves=2, page_bytes=256 * KIB)
        loop_on_every_path(pool, num_steps=2, num_leaves=2, page_bytes=40 * MIB)
        small.check()


# -- first use --------------------------------------------------------------------------------------------


@scenario
def first_used_by_threads() -> None:
    """Threads that all find the device without an engine come to use the same one."""
    barrier = threading.Barrier(NUM_THREADS)
    with HostPool(64 * MIB) as pool:
        loops = [DecodeLoop(pool, num_blocks=9, num_offloaded=3, lag=1, seed=i) for i in range(NUM_THREADS)]

        def run(loop: DecodeLoop) -> None:
            barrier.wait()
            loop.run(num_steps=20, num_leaves=2, page_bytes=8 * KIB)

        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(threads.map(run, loops))
        for loop in loops:
            loop.check()


# -- memory of XLA ----------------------------------------------------------------------------------------


def fill_device() -> list[jax.Array]:
    """Arrays that leave less than the smallest of them."""
    made: list[jax.Array] = []

    def fill(num_bytes: int) -> None:
        while True:
            made.append(jax.device_put(np.zeros(num_bytes, np.uint8)).block_until_ready())

    for num_bytes in FILLER_BYTES:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            fill(num_bytes)
    return made


def attempt(what: str, run: Callable[[], Any]) -> Any:
    """What ``run`` returns, or nothing where XLA has no memory for it."""
    try:
        result = run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.stdout.write(f"{what}: raised\n")
        return None
    sys.stdout.write(f"{what}: done\n")
    return result


@scenario
def out_of_memory() -> None:
    """XLA's memory of the device is used up: what fails raises, and no byte of the caches is lost."""
    caches, target = make_caches(2, 64, MIB, seed=1), make_caches(2, 64, MIB, seed=2)
    words, expected, canonical = on_host(caches), on_host(target), canonical_of(caches)
    pages, leaves = canonical.groups[0], canonical.group_leaves(caches, GROUP)
    ids = np.arange(4, dtype=np.int32)
    staging = jnp.zeros((4, pages.record_bytes), jnp.uint8)
    scatter = jax.jit(lambda staging, leaves: ops.scatter_pages(staging, ids, leaves, pages))
    copying = scatter.lower(staging, leaves).compile()
    with HostPool(80 * MIB) as pool:
        transfer = BlockTransfer(canonical, pool)
        target = dict(transfer.warm_up(target, 32))
        with transfer.reserve(GROUP, 32) as lease:
            slots = lease.keep()
        filler = fill_device()
        # Leaves that are not donated are copied, and there is no room for copies.
        assert attempt("copying program", lambda: jax.block_until_ready(copying(staging, leaves))) is None
        store = attempt("offload", lambda: transfer.offload(caches, GROUP, range(32), slots))
        is_stored = store is not None and store.wait().error is None
        target, is_loaded = try_restore(transfer, target, slots)
        filler.clear()
        assert_same_bytes(on_host(caches), words)
        if is_stored:
            assert_same_bytes(held(pool, slots), words[:32].tobytes())
            if is_loaded:
                expected[32:] = words[:32]
            assert_same_bytes(on_host(target), expected)
        go_on(transfer, caches, slots)
        transfer.release(slots)


def try_restore(transfer: BlockTransfer, target: Caches, slots: Slots) -> tuple[Caches, bool]:
    """The caches to go on with, and whether blocks came to be in them."""
    moved = attempt("restore", lambda: transfer.restore(target, GROUP, range(32, 64), slots))
    if moved is None:
        assert not any(leaf.is_deleted() for leaf in target.values()), "a restore that raised took the caches"
        return target, False
    return dict(moved[0]), moved[1].wait().error is None


def go_on(transfer: BlockTransfer, caches: Caches, slots: Slots) -> None:
    """With memory again, everything works."""
    words = on_host(caches)
    assert transfer.offload(caches, GROUP, range(32), slots).wait().error is None
    restored, ticket = transfer.restore(caches, GROUP, range(32, 64), slots)
    assert ticket.wait().error is None
    words[32:] = words[:32]
    assert_same_bytes(on_host(dict(restored)), words)


# -- ends -------------------------------------------------------------------------------------------------


def begin_transfers(*, unpinned: bool = False) -> None:
    """Leave transfers under way and their caches in nobody's hands."""
    pool = HostPool(420 * MIB)
    if unpinned:
        pin_elsewhere(pool)
    caches = make_caches(4, 100, MIB)
    transfer = BlockTransfer(canonical_of(caches), pool)
    with transfer.reserve(GROUP, 100) as lease:
        slots = lease.keep()
    kept.append((pool, slots, transfer.offload(caches, GROUP, range(100), slots)))
    kept.append(transfer.restore(make_caches(4, 100, MIB), GROUP, range(50), slots))


@scenario
def ends_under_way() -> None:
    begin_transfers()


@scenario
def ends_under_way_unpinned() -> None:
    begin_transfers(unpinned=True)


@scenario
def raises_under_way() -> None:
    begin_transfers()
    raise SystemExit(3)


if __name__ == "__main__":
    SCENARIOS[sys.argv[1]]()
