"""Buffers of caches on a mesh: what a restore consumes, what survives an error, who may still look."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_caches import (
    DATA_2,
    DATA_2_TENSOR_2,
    FOUR_COPIES,
    MESH_CASES,
    TENSOR_2,
    TENSOR_4,
    MeshPlan,
    pointers,
    random_host,
    register,
    to_host,
)
from test_compilations import count_backend_compilations

from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.testing import LayoutCase, assert_same_caches
from jaxkv.transfer import BlockTransfer
from jaxkv.transfer.cpu import CpuMover
from jaxkv.transfer.status import STATUS_SIZE

GROUP = GroupId(0)
CASE = MESH_CASES["separate_kv"]


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(4 << 20) as opened:
        yield opened


def copy_block(case: LayoutCase, host: Any, source: int, target: int) -> None:
    case.poke(host, 0, target, case.oracle(host, 0, source))


@pytest.mark.parametrize(
    ("backend", "plan"),
    [("cpu", TENSOR_2), ("cpu", DATA_2_TENSOR_2), ("cpu", FOUR_COPIES), ("xla", DATA_2)],
    ids=str,
)
def test_jax_refuses_the_old_arrays_after_a_restore_of_any_data_shard(
    backend: str, plan: MeshPlan, pool: HostPool
) -> None:
    case = CASE.with_data_shards(plan.num_data_shards)
    kv_caches, canonical = register(case, plan, random_host(case, 1))
    for data_shard in range(plan.num_data_shards):
        transfer = BlockTransfer(canonical, pool, backend=backend, data_shard=data_shard)
        with transfer.reserve(GROUP, 1) as slots:
            transfer.offload(kv_caches, GROUP, [0], slots)
            old = kv_caches
            kv_caches, _ = transfer.restore(kv_caches, GROUP, [1], slots)
        for leaf in jax.tree.leaves(old):
            # Not only an error of jaxkv: a program given an array that lost some of its parts may never end.
            assert leaf.is_deleted()
            with pytest.raises(RuntimeError, match="deleted"):
                jnp.sum(leaf)


@pytest.mark.parametrize("data_shard", [0, 1])
def test_a_view_of_a_part_costs_a_copy_of_that_part_and_keeps_its_bytes(
    data_shard: int, pool: HostPool, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASE.with_data_shards(2)
    host = random_host(case, 1)
    kv_caches, canonical = register(case, DATA_2_TENSOR_2, host)
    transfer = BlockTransfer(canonical, pool, backend="cpu", data_shard=data_shard)
    leaf = kv_caches["layers.1"][0]
    view = np.asarray(leaf.addressable_shards[0].data)
    before = view.tobytes()
    with transfer.reserve(GROUP, 1) as slots:
        transfer.offload(kv_caches, GROUP, [2], slots)
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, [3], slots)
        assert ticket.wait().error is None
    assert leaf.is_deleted()
    assert view.tobytes() == before
    # The first part belongs to data shard 0; of that of data shard 1 only the name had to change hands.
    assert transfer.num_copied_leaves == (1 if data_shard == 0 else 0)
    assert ("copied 1 whole cache leaves" in caplog.text) == (data_shard == 0)
    copy_block(case, case.data_shard(host, data_shard, 2), 2, 3)
    assert_same_caches(to_host(kv_caches), host)


def test_the_next_step_may_donate_the_caches_while_their_blocks_are_read(pool: HostPool) -> None:
    case = MESH_CASES["wide_pages"]
    host = random_host(case, 1)
    kv_caches, canonical = register(case, TENSOR_4, host)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 + 1, tree), donate_argnums=0)
    with transfer.reserve(GROUP, 6) as slots:
        ticket = transfer.offload(kv_caches, GROUP, range(6), slots)
        step(kv_caches)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kv_caches))
        assert ticket.wait().error is None
        for block, slot in enumerate(slots):
            page = case.oracle(host, 0, block, 4)
            assert bytes(pool.view(slot)[: len(page)]) == page


def test_caches_still_being_computed_are_waited_for(pool: HostPool) -> None:
    kv_caches, canonical = register(CASE, TENSOR_4, random_host(CASE, 1))
    transfer = BlockTransfer(canonical, pool, backend="cpu")

    shardings = jax.tree.map(lambda leaf: leaf.sharding, kv_caches)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def slow_step(tree: Any) -> Any:
        one = jax.lax.fori_loop(0, 50, lambda _, x: jnp.tanh(x @ x), jnp.eye(300))[0, 0]
        return jax.tree.map(lambda x: jnp.full_like(x, one), tree)

    with transfer.reserve(GROUP, 1) as slots:
        kv_caches = slow_step(kv_caches)
        stored = transfer.offload(kv_caches, GROUP, [5], slots)
        kv_caches, loaded = transfer.restore(kv_caches, GROUP, [1], slots)
        assert (stored.wait().error, loaded.wait().error) == (None, None)
        page = CASE.oracle(to_host(kv_caches), 0, 2, 4)
        assert bytes(pool.view(slots[0])[: len(page)]) == page


def fail_on_call(monkeypatch: pytest.MonkeyPatch, name: str, failing: int) -> None:
    """Let call number ``failing`` of a mover's method raise before it does anything."""
    whole, calls = getattr(CpuMover, name), iter(range(100))

    def fail(self: CpuMover, *args: Any) -> Any:
        if next(calls) == failing:
            raise MemoryError("no memory for a program")
        return whole(self, *args)

    monkeypatch.setattr(CpuMover, name, fail)


def test_an_error_before_any_device_gave_up_its_leaves_is_raised_and_the_caches_stay(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = random_host(CASE, 1)
    kv_caches, canonical = register(CASE, TENSOR_4, host)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    fail_on_call(monkeypatch, "restore", 0)
    with transfer.reserve(GROUP, 1) as slots, pytest.raises(MemoryError):
        transfer.restore(kv_caches, GROUP, [1], slots)
    assert pool.used_bytes == 0
    assert_same_caches(to_host(kv_caches), host)


@pytest.mark.parametrize("failing", [1, 3])
def test_an_error_of_a_later_device_fails_the_transfer_and_keeps_the_caches(
    failing: int, pool: HostPool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = random_host(CASE, 1)
    kv_caches, canonical = register(CASE, TENSOR_4, host)
    before = pointers(kv_caches)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    fail_on_call(monkeypatch, "restore", failing)
    with transfer.reserve(GROUP, 1) as slots:
        transfer.offload(kv_caches, GROUP, [4], slots)
        old = kv_caches
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, [1], slots)
        assert ticket.wait().error == f"group 0: device {failing}: 0 blocks moved, 1 were asked for"
        assert "no memory for a program" in caplog.text
        assert pointers(kv_caches) == before
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, [1], slots)
        assert ticket.wait().error is None
    copy_block(CASE, host, 4, 1)
    assert_same_caches(to_host(kv_caches), host)


def test_an_offload_that_breaks_off_leaves_no_program_that_writes_its_slots(
    pool: HostPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_caches, canonical = register(CASE, TENSOR_4, random_host(CASE, 1))
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    mover = transfer.movers[0].stations[0].mover  # type: ignore[attr-defined]
    ended: list[bool] = []

    class Status:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            ended.append(pool.used_bytes > 0)
            return np.zeros(STATUS_SIZE, np.int32)

    monkeypatch.setattr(CpuMover, "offload", lambda self, *_: Status() if self is mover else 1 / 0)
    with pytest.raises(ZeroDivisionError), transfer.reserve(GROUP, 1) as slots:
        transfer.offload(kv_caches, GROUP, [4], slots)
    assert ended == [True]
    assert pool.used_bytes == 0


def test_after_warm_up_a_transfer_of_any_data_shard_compiles_nothing(pool: HostPool) -> None:
    case = CASE.with_data_shards(2)
    host = random_host(case, 1)
    kv_caches, canonical = register(case, DATA_2_TENSOR_2, host)
    transfer = BlockTransfer(canonical, pool, backend="cpu", data_shard=1)
    kv_caches = transfer.warm_up(kv_caches, max_blocks=6)
    with transfer.reserve(GROUP, 3) as slots, count_backend_compilations() as compiled:
        transfer.offload(kv_caches, GROUP, [1, 3, 0], slots)
        kv_caches, _ = transfer.restore(kv_caches, GROUP, [1, 3, 0], slots)
    assert not compiled
    assert_same_caches(to_host(kv_caches), host)
