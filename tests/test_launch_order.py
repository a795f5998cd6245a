"""Transfers of the same slots where no platform orders them: those that must follow wait, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.slots import Slots
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.transfer import BlockTransfer
from jaxkv.transfer.cpu import CpuBackend, CpuMover
from jaxkv.transfer.cuda import CudaBackend

GROUP = GroupId(0)
SHAPE = (16, 2, 8, 2, 32)


class Unread:
    """The status of a transfer that has ended only once somebody waits for it."""

    def __init__(self, status: Any) -> None:
        self._status = status
        self.was_waited_for = False

    def is_ready(self) -> bool:
        return self.was_waited_for

    def cancel(self) -> None:
        pass

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self.was_waited_for = True
        return np.asarray(self._status)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Unread]:
    """The statuses of all transfers in order, on a backend that is said not to order them."""
    statuses: list[Unread] = []
    offload, restore = CpuMover.offload, CpuMover.restore

    def kept(status: Any) -> Any:
        statuses.append(Unread(status))
        return statuses[-1]

    def begin_restore(self: CpuMover, leaves: Any, entries: Any) -> Any:
        written, status = restore(self, leaves, entries)
        return written, kept(status)

    monkeypatch.setattr(CpuBackend, "orders_launches", False)
    monkeypatch.setattr(CpuMover, "offload", lambda *call: kept(offload(*call)))
    monkeypatch.setattr(CpuMover, "restore", begin_restore)
    return statuses


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


class Scene:
    def __init__(self, pool: HostPool) -> None:
        self.caches: Any = {"a": jnp.arange(np.prod(SHAPE), dtype=jnp.float32).reshape(SHAPE)}
        spec = FullAttentionSpec(8, 2, 32, jnp.float32)
        config = KVCacheConfig((KVCacheGroupSpec(("a",), spec, SHAPE[0]),))
        self.transfer = BlockTransfer(canonicalize(self.caches, config), pool)

    def begin(self, what: str, slots: Slots) -> None:
        ids = range(len(slots))
        if what == "offload":
            self.transfer.offload(self.caches, GROUP, ids, slots)
        elif what == "restore":
            self.caches, _ = self.transfer.restore(self.caches, GROUP, ids, slots)
        else:
            self.transfer.prefetch(GROUP, slots)


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ("offload", "restore", True),
        ("offload", "offload", True),
        ("offload", "prefetch", True),
        ("restore", "offload", True),
        ("restore", "restore", False),
        ("restore", "prefetch", False),
    ],
)
def test_a_transfer_waits_for_those_of_its_slots_that_it_must_follow(
    first: str, second: str, waits: bool, begun: list[Unread], pool: HostPool
) -> None:
    scene = Scene(pool)
    with scene.transfer.reserve(GROUP, 4) as lease, scene.transfer.reserve(GROUP, 2) as others:
        scene.begin(first, lease[:])
        scene.begin("offload", others[:])
        assert not begun[0].was_waited_for
        scene.begin(second, lease[:2])
        assert [status.was_waited_for for status in begun[:2]] == [waits, False]
        for status in begun:
            np.asarray(status)
        scene.transfer.settle()


def test_only_cuda_leaves_the_order_to_others() -> None:
    assert not CudaBackend.orders_launches
    assert CpuBackend.orders_launches
