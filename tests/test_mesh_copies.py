"""Bytes that several devices hold alike: one copy in host memory, written by turns, read by all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_caches import COPIES, FOUR_COPIES, MESH_CASES, random_host, register

from jaxkv.canonical import canonicalize
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.testing import LayoutCase
from jaxkv.transfer import BlockTransfer
from jaxkv.transfer.checks import make_entries

BACKENDS = ("cpu", "xla")
GROUP = GroupId(0)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


def differing_copies(case: LayoutCase, seeds: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Caches that JAX believes to be replicated, while device ``i`` holds those of ``seeds[i]``."""
    hosts = [random_host(case, seed) for seed in seeds]

    def join(*leaves: np.ndarray) -> jax.Array:
        devices = jax.devices("cpu")[: len(leaves)]
        sharding = jax.sharding.NamedSharding(
            jax.sharding.Mesh(np.array(devices), ("copy",)), jax.sharding.PartitionSpec()
        )
        parts = [
            jax.device_put(jnp.array(leaf, copy=True), device)
            for leaf, device in zip(leaves, devices, strict=True)
        ]
        return jax.make_array_from_single_device_arrays(leaves[0].shape, sharding, parts)

    return jax.tree.map(join, *hosts), hosts


@pytest.mark.parametrize("name", ["mla", "hybrid"])
def test_a_record_takes_as_many_bytes_as_that_of_one_device(name: str) -> None:
    case = MESH_CASES[name]
    host = random_host(case, 0)
    alone = canonicalize(case.build(0), case.config, case.hints)
    _, shared = register(case, FOUR_COPIES, host)
    for one, many in zip(alone.records, shared.records, strict=True):
        assert (one.block_bytes, one.record_bytes) == (many.block_bytes, many.record_bytes)
    assert shared.fingerprint == alone.fingerprint


@pytest.mark.parametrize("backend", BACKENDS)
def test_holders_write_by_turns_each_block_once(backend: str, pool: HostPool) -> None:
    case = MESH_CASES["mla"]
    kv_caches, hosts = differing_copies(case, [1, 2, 3])
    canonical = canonicalize(kv_caches, case.config, case.hints)
    transfer = BlockTransfer(canonical, pool, backend=backend)
    ids = [4, 0, -1, 2, 5, 1, 3]
    with transfer.reserve(GROUP, len(ids)) as slots:
        result = transfer.offload(kv_caches, GROUP, ids, slots).wait()
        assert (result.error, result.num_bytes) == (None, 6 * canonical.records[0].block_bytes)
        for entry, (block, slot) in enumerate(zip(ids, slots, strict=True)):
            if block >= 0:
                page = case.oracle(hosts[entry % 3], 0, block)
                assert bytes(pool.view(slot)[: len(page)]) == page


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_restore_reaches_every_holder(backend: str, pool: HostPool) -> None:
    case = MESH_CASES["mla"]
    kv_caches, hosts = differing_copies(case, [1, 2, 3])
    transfer = BlockTransfer(canonicalize(kv_caches, case.config, case.hints), pool, backend=backend)
    source = random_host(case, 9)
    with transfer.reserve(GROUP, 2) as slots:
        for block, slot in zip([3, 1], slots, strict=True):
            page = case.oracle(source, 0, block)
            pool.view(slot)[: len(page)] = page
        kv_caches, ticket = transfer.restore(kv_caches, GROUP, [0, 5], slots)
        assert ticket.wait().error is None
    for holder, host in enumerate(hosts):
        for block, place in zip([3, 1], [0, 5], strict=True):
            case.poke(host, 0, place, case.oracle(source, 0, block))
        for leaf, expected in zip(jax.tree.leaves(kv_caches), jax.tree.leaves(host), strict=True):
            assert np.array(leaf.addressable_shards[holder].data).tobytes() == expected.tobytes()


def test_one_block_is_copied_out_by_one_holder_of_each_part(pool: HostPool) -> None:
    case = MESH_CASES["packed_kv"]
    kv_caches, canonical = register(case, COPIES, random_host(case, 1))
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    leaves = dict(enumerate(canonical.leaves(kv_caches)))
    with transfer.reserve(GROUP, 1) as slots:
        address = pool.address(slots[0])
        for block_ids, devices in (([3], {"device 0", "device 1"}), ([-1, 3], {"device 2", "device 3"})):
            ids, addresses = np.array(block_ids), np.array([address] * 2)
            entries = make_entries(
                ids, addresses, canonical.records[0].record_bytes, 1, 0, (int(pool.token()[0]), 0)
            )
            moves = transfer.movers[GROUP].offload(leaves, entries)
            assert [move.read().error for move in moves] == [None, None]
            assert {move.where for move in moves} == devices
