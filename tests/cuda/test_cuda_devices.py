"""Caches on other devices than the first, on several, and on meshes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from mesh_caches import DATA_2, MESH_CASES, TENSOR_2, TWO_COPIES, MeshPlan
from test_mesh_transfer import move_everything
from word_caches import GROUP, DecodeLoop, canonical_of, held, make_caches, on_host

from jaxkv.host_pool import HostPool
from jaxkv.testing import assert_same_bytes
from jaxkv.transfer import BlockTransfer
from jaxkv.transfer.cuda_device import cuda_device

pytestmark = pytest.mark.cuda

KIB, MIB = 1 << 10, 1 << 20
NAMES = ("separate_kv", "hybrid", "head_major_int8_scales_float32", "mla", "packed_kv")


@pytest.fixture(autouse=True)
def _needs_two_devices() -> None:
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(128 * MIB) as opened:
        yield opened


def test_every_device_has_an_engine_of_its_own() -> None:
    engines = [cuda_device(device).engine for device in jax.devices()[:2]]
    assert engines[0] is not engines[1]


@pytest.mark.parametrize("place", [1, -1])
def test_caches_on_another_device_are_moved_there(place: int, pool: HostPool) -> None:
    device = jax.devices()[place]
    with jax.default_device(device):
        loop = DecodeLoop(pool, num_blocks=24, num_offloaded=6, lag=2)
        loop.run(num_steps=40, num_leaves=4, page_bytes=16 * KIB)
        loop.check()
        assert {leaf.devices().pop() for leaf in loop.caches.values()} == {device}


def test_what_one_device_offloaded_another_restores(pool: HostPool) -> None:
    caches, others = make_caches(3, 16, 64 * KIB, seed=1), make_caches(3, 16, 64 * KIB, seed=2)
    there = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices()[1]), others)
    words, expected = on_host(caches), on_host(others)
    here, away = (BlockTransfer(canonical_of(tree), pool) for tree in (caches, there))
    with here.reserve(GROUP, 10) as slots:
        here.offload(caches, GROUP, range(10), slots)
        restored, ticket = away.restore(there, GROUP, range(6, 16), slots)
        assert ticket.wait().error is None
        assert_same_bytes(held(pool, slots), words[:10].tobytes())
    expected[6:] = words[:10]
    assert_same_bytes(on_host(dict(restored)), expected)


def test_devices_move_blocks_at_the_same_time(pool: HostPool) -> None:
    loops = [DecodeLoop(pool, num_blocks=24, num_offloaded=5, lag=2, seed=seed) for seed in range(2)]

    def run(place: int) -> None:
        with jax.default_device(jax.devices()[place]):
            loops[place].run(num_steps=60, num_leaves=3, page_bytes=32 * KIB)

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for loop in loops:
        assert len(loop.slots) == 60
        loop.check()


@pytest.mark.parametrize("is_portable", [False, True], ids=["per_shard", "portable"])
@pytest.mark.parametrize(
    "name", ["separate_kv", "hybrid", "head_major_int8_scales_float32", "mla", "packed_kv"]
)
@pytest.mark.parametrize("plan", [TENSOR_2, DATA_2, TWO_COPIES], ids=str)
def test_layouts_move_on_meshes(plan: MeshPlan, name: str, pool: HostPool, *, is_portable: bool) -> None:
    move_everything(MESH_CASES[name], plan, "cuda", pool, is_portable=is_portable)


@pytest.mark.parametrize("plan", [MeshPlan((("tensor", 4),)), MeshPlan((("tensor", 8),))], ids=str)
def test_larger_meshes(plan: MeshPlan, pool: HostPool) -> None:
    if len(jax.devices()) < np.prod([size for _, size in plan.axes]):
        pytest.skip("needs as many GPUs as the mesh has")
    move_everything(MESH_CASES["separate_kv"], plan, "cuda", pool, is_portable=True)
