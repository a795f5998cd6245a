"""Long native work lets other Python threads run."""

from __future__ import annotations

import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import BlockTransfer, FullAttentionSpec, HostPool, KVCacheConfig, KVCacheGroupSpec, canonicalize

MANY = 20
"""Turns of the other thread that no few stray releases of the lock explain."""
ATTEMPTS = 20
"""One in which the other thread had many turns is enough: on a busy machine it may get no core meanwhile."""


@contextmanager
def counting_thread() -> Iterator[Callable[[], int]]:
    """A thread that counts while it may; with a long switch interval it may only where others let it."""
    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1
            select.select([], [], [], 0)  # gives the interpreter lock back

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=count)
    sys.setswitchinterval(100)
    thread.start()
    try:
        yield lambda: turns[0]
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def turns_during(work: Callable[[], object]) -> int:
    with counting_thread() as turns:
        before = turns()
        work()
        return turns() - before


def test_other_threads_run_while_a_pool_is_allocated_and_populated():
    def turns_of_others() -> int:
        pools: list[HostPool] = []
        turns = turns_during(lambda: pools.append(HostPool(512 << 20)))
        pools[0].close()
        return turns

    assert any(turns_of_others() > MANY for _ in range(ATTEMPTS))


@pytest.mark.parametrize("direction", ["offload", "restore"])
def test_other_threads_run_while_blocks_are_copied(direction):
    blocks = 4096
    caches = {"layer": jnp.zeros((blocks, 16, 8, 128), jnp.float32)}
    config = KVCacheConfig(
        (KVCacheGroupSpec(("layer",), FullAttentionSpec(16, 4, 128, jnp.float32), blocks),)
    )
    ids = np.arange(blocks, dtype=np.int32)
    with HostPool(300 << 20) as pool:
        transfer = BlockTransfer(canonicalize(caches, config), pool)
        with transfer.reserve(0, blocks) as slots:
            transfer.offload(caches, 0, ids, slots).wait()
            caches, ticket = transfer.restore(caches, 0, ids, slots)
            ticket.wait()

            def work() -> None:
                nonlocal caches
                if direction == "offload":
                    transfer.offload(caches, 0, ids, slots).wait()
                else:
                    caches, ticket = transfer.restore(caches, 0, ids, slots)
                    ticket.wait()

            assert any(turns_during(work) > MANY for _ in range(ATTEMPTS))
