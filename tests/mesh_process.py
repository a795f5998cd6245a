"""One of two processes whose devices form a mesh: ``python mesh_process.py RANK PORT DIRECTORY``.

Both run the same program and meet in ``DIRECTORY``: process 0 owns a shared pool and sends what it reserves.
Whatever is not as it should be ends a process with an error.
"""

from __future__ import annotations

import pickle
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mesh_caches import MESH_CASES, groups_of, put, random_host

from jaxkv.canonical import CanonicalKVCaches, canonicalize
from jaxkv.errors import CacheMismatchError, ConfigError, JaxKVError
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.shared_pool import AttachedPool
from jaxkv.testing import LayoutCase, assert_same_bytes
from jaxkv.testing.arrays import as_bytes
from jaxkv.transfer import BlockTransfer

NUM_PROCESSES = 2
DEVICES_PER_PROCESS = 4
NUM_DEVICES = NUM_PROCESSES * DEVICES_PER_PROCESS
TIMEOUT_S = 300
GROUP = GroupId(0)


@dataclass
class Meeting:
    """Where the processes wait for each other and hand things over."""

    rank: int
    directory: Path
    count: Iterator[int] = field(default_factory=lambda: iter(range(10_000)))

    def gather(self, value: Any = None) -> list[Any]:
        """What each process brought, in the order of ranks. All must call it the same number of times."""
        number = next(self.count)
        places = [self.directory / f"{number}.{rank}" for rank in range(NUM_PROCESSES)]
        unfinished = places[self.rank].with_suffix(f".{self.rank}.part")
        unfinished.write_bytes(pickle.dumps(value))
        unfinished.rename(places[self.rank])
        deadline_s = time.monotonic() + TIMEOUT_S
        while not all(place.exists() for place in places):
            assert time.monotonic() < deadline_s, f"process {self.rank} waits in vain at meeting {number}"
            time.sleep(0.002)
        return [pickle.loads(place.read_bytes()) for place in places]

    def from_owner(self, make: Callable[[], Any]) -> Any:
        """What process 0 makes."""
        return self.gather(make() if self.rank == 0 else None)[0]


def put_on_all(case: LayoutCase, host: Any, mesh: Mesh) -> dict[str, Any]:
    """Heads over ``tensor``, blocks over ``data``, the rest on every device."""
    caches = {}
    for name, tree in host.items():
        leaves, treedef = jax.tree.flatten(tree)
        put_leaves = []
        for page, leaf in zip(case.pages[name], leaves, strict=True):
            spec: list[str | None] = [None] * leaf.ndim
            if "data" in mesh.axis_names:
                spec[page.data_axis] = "data"
            if page.split_axis is not None and leaf.shape[page.split_axis] % mesh.shape["tensor"] == 0:
                spec[page.split_axis] = "tensor"
            put_leaves.append(put(leaf, NamedSharding(mesh, PartitionSpec(*spec))))
        caches[name] = treedef.unflatten(put_leaves)
    return caches


def assert_parts(caches: Any, host: Any) -> None:
    """The parts that lie in this process are those of ``host``."""
    for leaf, expected in zip(jax.tree.leaves(caches), jax.tree.leaves(host), strict=True):
        for shard in leaf.addressable_shards:
            assert_same_bytes(np.array(jnp.copy(shard.data)), expected[shard.index])


def move(
    meeting: Meeting, case: LayoutCase, mesh: Mesh, pool: HostPool | AttachedPool, *, is_portable: bool
) -> None:
    """Blocks out of all devices to slots both processes see, and from there to other blocks."""
    source_host, target_host = random_host(case, 1), random_host(case, 2)
    source, target = put_on_all(case, source_host, mesh), put_on_all(case, target_host, mesh)
    canonical = canonicalize(
        source, case.config, case.hints, portable_pages=is_portable, processes=range(NUM_PROCESSES)
    )
    assert len(set(meeting.gather(canonical.fingerprint))) == 1
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    for group in groups_of(canonical):
        ids, into = [4, 0, 3, 1, 5], [2, 5, 0, 1, 3]
        record = canonical.records[group]
        slots = meeting.from_owner(lambda: transfer.reserve(group, len(ids)).keep())  # noqa: B023
        result = transfer.offload(source, group, ids, slots).wait()
        assert result.error is None, result.error
        assert sum(meeting.gather(result.num_bytes)) == len(ids) * record.block_bytes
        for block, place, slot in zip(ids, into, slots, strict=True):
            page = case.oracle(source_host, group, block, NUM_DEVICES, is_portable=is_portable)
            held = bytes(pool.view(slot))
            assert_same_bytes(held[: len(page)], page, f"{case}, block {block}")
            assert held[len(page) :] == bytes(len(held) - len(page))
            case.poke(target_host, group, place, page, NUM_DEVICES, is_portable=is_portable)
        target, ticket = transfer.restore(target, group, into, slots)
        assert ticket.wait().error is None
        meeting.gather()
        if meeting.rank == 0:
            transfer.release(slots)
    assert transfer.num_copied_leaves == 0
    assert_parts(target, target_host)
    assert_parts(source, source_host)


def move_alone(rank: int, case: LayoutCase, mesh: Mesh) -> CanonicalKVCaches:
    """The same with a pool of this process, which then holds the parts of its own devices."""
    source_host, target_host = random_host(case, 1), random_host(case, 2)
    source, target = put_on_all(case, source_host, mesh), put_on_all(case, target_host, mesh)
    canonical = canonicalize(source, case.config, case.hints, portable_pages=True)
    ids, into = [4, 0, 3], [2, 5, 0]
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool, backend="cpu")
        with transfer.reserve(GROUP, len(ids)) as slots:
            assert transfer.offload(source, GROUP, ids, slots).wait().error is None
            for block, slot in zip(ids, slots, strict=True):
                page = b"".join(own_parts(case, source_host, block, rank))
                assert len(page) == canonical.records[0].block_bytes
                assert_same_bytes(bytes(pool.view(slot)[: len(page)]), page, f"{case}, block {block}")
            target, ticket = transfer.restore(target, GROUP, into, slots)
            assert ticket.wait().error is None
    for block, place in zip(ids, into, strict=True):
        case.poke(target_host, 0, place, case.oracle(source_host, 0, block))
    assert_parts(target, target_host)
    return canonical


def own_parts(case: LayoutCase, host: Any, block: int, rank: int) -> Iterator[bytes]:
    """Pages of what the devices of one process hold of a block."""
    for name in case.config.groups[0].layer_names:
        for page, leaf in zip(case.pages[name], jax.tree.leaves(host[name]), strict=True):
            parts = page.parts(leaf, NUM_DEVICES)
            own = parts[rank * DEVICES_PER_PROCESS :][:DEVICES_PER_PROCESS] if len(parts) > 1 else parts
            yield from (page.read(part, block) for part in own)


def expect(error: type[JaxKVError], text: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def check_shared_pool(meeting: Meeting, devices: np.ndarray) -> None:
    owned = HostPool(1 << 20, shared=True) if meeting.rank == 0 else None
    handle = meeting.from_owner(lambda: owned.handle)  # type: ignore[union-attr]
    mesh = Mesh(devices, ("tensor",))
    with AttachedPool(handle) if owned is None else owned as pool:
        for name in ("packed_kv", "head_major_int8_scales_float32", "mla", "gated_delta_net"):
            for is_portable in (False, True):
                move(meeting, MESH_CASES[name], mesh, pool, is_portable=is_portable)
        meeting.gather()


def check_private_pools(meeting: Meeting, devices: np.ndarray) -> None:
    mesh = Mesh(devices, ("tensor",))
    in_parts = move_alone(meeting.rank, MESH_CASES["kv_axis_first"], mesh)
    reason = "4 of 8 parts of each block lie on devices of the processes that share the pool"
    assert all(text.startswith(reason) for text in in_parts.per_shard_layers.values())
    assert len(set(meeting.gather(in_parts.fingerprint))) == NUM_PROCESSES
    whole = move_alone(meeting.rank, MESH_CASES["mla"], mesh)
    assert not whole.per_shard_layers
    assert len(set(meeting.gather(whole.fingerprint))) == 1


def check_data_shards(meeting: Meeting, devices: np.ndarray) -> None:
    """Each process holds a data shard of its own, and cannot move the other's."""
    mesh = Mesh(devices.reshape(NUM_PROCESSES, DEVICES_PER_PROCESS), ("data", "tensor"))
    case = MESH_CASES["separate_kv"].with_data_shards(NUM_PROCESSES)
    host = random_host(case, 1)
    caches = put_on_all(case, host, mesh)
    canonical = canonicalize(caches, case.config, case.hints, portable_pages=True)
    assert not canonical.per_shard_layers
    assert len(set(meeting.gather(canonical.fingerprint))) == 1
    with HostPool(1 << 20) as pool:
        other = 1 - meeting.rank
        expect(
            ConfigError,
            f"data shard {other} of the caches lies on no device of process {meeting.rank}",
            lambda: BlockTransfer(canonical, pool, data_shard=other),
        )
        transfer = BlockTransfer(canonical, pool, backend="cpu", data_shard=meeting.rank)
        with transfer.reserve(GROUP, 1) as slots:
            assert transfer.offload(caches, GROUP, [2], slots).wait().error is None
            caches, ticket = transfer.restore(caches, GROUP, [5], slots)
            assert ticket.wait().error is None
    for data_shard in range(
        NUM_PROCESSES
    ):  # This process sees its own only, the other did the same with its.
        shard = case.data_shard(host, data_shard, NUM_PROCESSES)
        case.poke(shard, 0, 5, case.oracle(shard, 0, 2))
    assert_parts(caches, host)


def check_refusals(meeting: Meeting, devices: np.ndarray) -> None:
    case = MESH_CASES["separate_kv"]
    spread = put_on_all(case, random_host(case, 1), Mesh(devices, ("tensor",)))
    expect(
        ConfigError,
        f"leave out {meeting.rank}",
        lambda: canonicalize(spread, case.config, processes=[1 - meeting.rank]),
    )
    # Heads 0 and 1 of data shard 0 lie in process 0, those of data shard 1 in process 1.
    crossed = np.roll(devices.reshape(NUM_PROCESSES, DEVICES_PER_PROCESS), 2, axis=1).reshape(-1)
    crossed = np.concatenate([crossed[:2], crossed[4:6], crossed[6:], crossed[2:4]])
    mesh = Mesh(crossed.reshape(NUM_PROCESSES, DEVICES_PER_PROCESS), ("data", "tensor"))
    case = case.with_data_shards(NUM_PROCESSES)
    caches = put_on_all(case, random_host(case, 1), mesh)
    expect(CacheMismatchError, "lie on devices of other processes", lambda: canonicalize(caches, case.config))
    canonicalize(caches, case.config, processes=range(NUM_PROCESSES))
    if meeting.rank == 1:
        alone = Mesh(devices[:DEVICES_PER_PROCESS], ("tensor",))  # those of process 0
        shape, sharding = (6, 4, 8, 4), NamedSharding(alone, PartitionSpec())
        away = jax.make_array_from_single_device_arrays(shape, sharding, [], dtype=jnp.bfloat16)
        config = case.config
        expect(
            CacheMismatchError,
            "lies on no device of process 1",
            lambda: canonicalize(
                {"layers.0": (away, away), "layers.1": (away, away)}, config, processes=(0, 1)
            ),
        )


def check_a_step_of_both(devices: np.ndarray) -> None:
    """Caches that a transfer put together are good for a program of all processes, donated again."""
    case = MESH_CASES["separate_kv"]
    host = random_host(case, 1)
    caches = put_on_all(case, host, Mesh(devices, ("tensor",)))
    canonical = canonicalize(caches, case.config)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[::-1], tree), donate_argnums=0)
    with HostPool(1 << 20) as pool:
        transfer = BlockTransfer(canonical, pool, backend="cpu")
        with transfer.reserve(GROUP, 1) as slots:
            transfer.offload(caches, GROUP, [3], slots)
            caches, _ = transfer.restore(caches, GROUP, [0], slots)
            case.poke(host, 0, 0, case.oracle(host, 0, 3))
            caches = step(caches)
            host = jax.tree.map(lambda leaf: leaf[::-1].copy(), host)
            assert transfer.offload(caches, GROUP, [5], slots).wait().error is None
            caches, ticket = transfer.restore(caches, GROUP, [1], slots)
            assert ticket.wait().error is None
    case.poke(host, 0, 1, case.oracle(host, 0, 5))
    assert_parts(caches, host)
    assert as_bytes(host["layers.0"][0]).any()


def main() -> None:
    rank, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_PER_PROCESS)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", NUM_PROCESSES, rank, initialization_timeout=TIMEOUT_S)
    devices = np.array(jax.devices("cpu"))
    assert [device.process_index for device in devices] == [0] * DEVICES_PER_PROCESS + [
        1
    ] * DEVICES_PER_PROCESS
    meeting = Meeting(rank, directory)
    check_shared_pool(meeting, devices)
    check_private_pools(meeting, devices)
    check_data_shards(meeting, devices)
    check_refusals(meeting, devices)
    check_a_step_of_both(devices)
    meeting.gather()
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
