"""Which shardings are accepted, and what is refused with the layer and the reason before a byte moves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from mesh_caches import (
    DATA_2,
    DATA_2_TENSOR_2,
    MESH_CASES,
    TENSOR_2,
    TENSOR_4,
    pointers,
    put_on_mesh,
    random_host,
    register,
    to_host,
)

from jaxkv.canonical import canonicalize
from jaxkv.errors import CacheMismatchError, ConfigError
from jaxkv.host_pool import HostPool
from jaxkv.keys import GroupId
from jaxkv.layout import LayoutHint
from jaxkv.sharding import find_shards
from jaxkv.spec import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from jaxkv.testing import assert_same_bytes, assert_same_caches
from jaxkv.transfer import BlockTransfer

GROUP = GroupId(0)
SHAPE = (6, 4, 8, 4)
"""Blocks, tokens, heads, head size."""


def mesh_of(*axes: tuple[str, int], first: int = 0) -> Mesh:
    shape = tuple(size for _, size in axes)
    devices = np.array(jax.devices("cpu")[first : first + int(np.prod(shape))])
    return Mesh(devices.reshape(shape), tuple(name for name, _ in axes))


def put(sharding: Any, shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jax.device_put(jnp.zeros(shape, jnp.bfloat16), sharding)


def config_of(*layers: str, num_blocks: int = 6) -> KVCacheConfig:
    """One leaf for K and one for V in each layer."""
    spec = FullAttentionSpec(4, 8, 4, jnp.bfloat16)
    return KVCacheConfig((KVCacheGroupSpec(layers, spec, num_blocks),))


def named(spec: PartitionSpec, *axes: tuple[str, int]) -> NamedSharding:
    return NamedSharding(mesh_of(*axes), spec)


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with HostPool(1 << 20) as opened:
        yield opened


# -- accepted -------------------------------------------------------------------------------------------


def test_a_mesh_of_one_device_is_no_mesh(pool: HostPool) -> None:
    case = MESH_CASES["separate_kv"]
    host = random_host(case, 1)
    alone = canonicalize(case.build(1), case.config, case.hints)
    kv_caches = jax.tree.map(
        lambda leaf: jax.device_put(
            jnp.array(leaf, copy=True), named(PartitionSpec(None, None, "t"), ("t", 1))
        ),
        host,
    )
    canonical = canonicalize(kv_caches, case.config, case.hints)
    assert canonical.records == alone.records
    transfer, before = BlockTransfer(canonical, pool, backend="cpu"), pointers(kv_caches)
    with transfer.reserve(GROUP, 1) as slots:
        transfer.offload(kv_caches, GROUP, [3], slots)
        kv_caches, _ = transfer.restore(kv_caches, GROUP, [1], slots)
    assert pointers(kv_caches) == before
    case.poke(host, 0, 1, case.oracle(host, 0, 3))
    assert_same_caches(to_host(kv_caches), host)


def test_an_equivalent_sharding_may_come_later(pool: HostPool) -> None:
    mesh = mesh_of(("data", 2))
    short, long = (NamedSharding(mesh, spec) for spec in (PartitionSpec("data"), PartitionSpec("data", None)))
    registered = {"a": (put(short, (12, 4, 8, 4)), put(long, (12, 4, 8, 4)))}
    transfer = BlockTransfer(canonicalize(registered, config_of("a")), pool)
    swapped = {"a": registered["a"][::-1]}
    with transfer.reserve(GROUP, 1) as slots:
        assert transfer.offload(swapped, GROUP, [0], slots).wait().error is None
        restored, ticket = transfer.restore(swapped, GROUP, [1], slots)
    assert ticket.wait().error is None
    assert [leaf.sharding for leaf in restored["a"]] == [long, short]


def test_what_a_step_leaves_to_the_compiler_is_accepted(pool: HostPool) -> None:
    """The sharding of an output that nobody named, and one that names no mesh."""
    case = MESH_CASES["separate_kv"]
    host = random_host(case, 1)
    kv_caches, canonical = register(case, TENSOR_4, host)
    transfer = BlockTransfer(canonical, pool, backend="cpu")
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[::-1], tree))
    with transfer.reserve(GROUP, 1) as slots:
        assert transfer.offload(step(kv_caches), GROUP, [0], slots).wait().error is None
        page = case.oracle(host, 0, 5, 4)
        assert_same_bytes(bytes(pool.view(slots[0])[: len(page)]), page)
        unnamed = jax.tree.map(lambda leaf: jax.device_put(leaf, without_mesh(leaf)), kv_caches)
        again = canonicalize(unnamed, case.config, case.hints)
        assert again.records == canonical.records
        assert transfer.offload(unnamed, GROUP, [5], slots).wait().error is None
        assert_same_bytes(bytes(pool.view(slots[0])[: len(page)]), page)


def without_mesh(leaf: jax.Array) -> Any:
    """The same placement as XLA writes it down."""
    from jax._src.sharding_impls import GSPMDSharding  # noqa: PLC0415 - no public name makes one

    devices = tuple(leaf.sharding.mesh.devices.flat)
    return GSPMDSharding(devices, leaf.sharding._to_xla_hlo_sharding(leaf.ndim))


# -- refused --------------------------------------------------------------------------------------------

OTHER_PLACES = [
    pytest.param(PartitionSpec(), (6, 4, 8, 4), id="blocks_not_split"),
    pytest.param(PartitionSpec(("data", "tensor")), (24, 4, 8, 4), id="blocks_split_further"),
    pytest.param(PartitionSpec("tensor"), (12, 4, 8, 4), id="blocks_split_over_another_axis"),
]


@pytest.mark.parametrize(("spec", "shape"), OTHER_PLACES)
def test_leaves_of_a_group_whose_blocks_are_split_in_different_ways_are_refused(
    spec: PartitionSpec, shape: tuple[int, ...]
) -> None:
    axes = ("data", 2), ("tensor", 2)
    first = put(named(PartitionSpec("data"), *axes), (12, 4, 8, 4))
    other = put(named(spec, *axes), shape)
    with pytest.raises(
        CacheMismatchError,
        match=r"layer 'a', leaf 0 \(bfloat16\[12, 4, 8, 4\]\) and layer 'a', leaf 1 .* in different ways",
    ):
        canonicalize({"a": (first, other)}, config_of("a"))


@pytest.mark.parametrize(
    "other",
    [
        lambda: NamedSharding(mesh_of(("t", 4)), PartitionSpec()),
        lambda: NamedSharding(mesh_of(("t", 2), first=2), PartitionSpec()),
        lambda: SingleDeviceSharding(jax.devices("cpu")[0]),
    ],
    ids=["larger_mesh", "other_devices", "one_device"],
)
def test_leaves_of_a_group_on_different_devices_are_refused(other: Any) -> None:
    caches = {"a": (put(named(PartitionSpec(), ("t", 2))),) * 2, "b": (put(other()), put(other()))}
    caches["a"] = (put(named(PartitionSpec(), ("t", 2))), put(named(PartitionSpec(), ("t", 2))))
    with pytest.raises(CacheMismatchError, match=r"layer 'a'.* and layer 'b'.* lie on different devices"):
        canonicalize(caches, config_of("a", "b"))


def test_groups_may_lie_on_different_meshes(pool: HostPool) -> None:
    spec = FullAttentionSpec(4, 8, 4, jnp.bfloat16)
    config = KVCacheConfig((KVCacheGroupSpec(("a",), spec, 6), KVCacheGroupSpec(("b",), spec, 6)))
    spread, whole = (
        named(PartitionSpec(None, None, "t"), ("t", 4)),
        SingleDeviceSharding(jax.devices("cpu")[5]),
    )
    caches: Any = {"a": (put(spread), put(spread)), "b": (put(whole), put(whole))}
    canonical = canonicalize(caches, config)
    transfer = BlockTransfer(canonical, pool)
    for group in map(GroupId, (0, 1)):
        with transfer.reserve(group, 1) as slots:
            assert transfer.offload(caches, group, [0], slots).wait().error is None
            caches, ticket = transfer.restore(caches, group, [1], slots)
            assert ticket.wait().error is None


@pytest.mark.parametrize("hint", [LayoutHint(), LayoutHint(0)], ids=["auto", "named"])
def test_num_blocks_that_counts_all_data_shards_is_refused(hint: LayoutHint) -> None:
    leaf = put(named(PartitionSpec("data"), ("data", 2)), (12, 4, 8, 4))
    with pytest.raises(
        CacheMismatchError,
        match=r"layer 'a', leaf 0 .*part \[6, 4, 8, 4\] that each device holds \(num_blocks counts one such",
    ):
        canonicalize({"a": (leaf, leaf)}, config_of("a", num_blocks=12), {"a": hint})


def test_parts_of_different_sizes_are_refused() -> None:
    """JAX makes no such array today."""
    with pytest.raises(CacheMismatchError, match="layer 'a' is not in equal parts on its devices"):
        find_shards(named(PartitionSpec("t"), ("t", 4)), (6, 4), "layer 'a'", None)


def test_summands_are_refused() -> None:
    mesh = jax.make_mesh((4,), ("t",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = NamedSharding(mesh, PartitionSpec(None, None, unreduced={"t"}))
    with pytest.raises(CacheMismatchError, match=r"layer 'a' is not in equal parts.*unreduced"):
        find_shards(sharding, (8, 4), "layer 'a'", None)


def test_a_split_axis_inside_the_blocks_of_a_row_is_refused() -> None:
    leaf = put(named(PartitionSpec(None, "t"), ("t", 2)), (2, 24, 8, 4))
    hint = LayoutHint((0, 1), kernel_blocks_per_block=4)
    with pytest.raises(CacheMismatchError, match=r"layer 'a', leaf 0 .*blocks of a row stand, is split"):
        canonicalize({"a": (leaf, leaf)}, config_of("a", num_blocks=6), {"a": hint})


def test_a_custom_layout_is_refused() -> None:
    sharding = named(PartitionSpec("data"), ("data", 2))
    layout = Layout(major_to_minor=(1, 0, 2, 3))
    make = jax.jit(
        lambda: jnp.zeros((12, 4, 8, 4), jnp.bfloat16),
        out_shardings=Format(layout, sharding),
    )
    with pytest.raises(CacheMismatchError, match=r"layer 'a', leaf 0 .*expected row-major"):
        canonicalize({"a": (make(), make())}, config_of("a"))


@pytest.mark.parametrize(
    "sharding",
    [
        lambda: named(PartitionSpec(None, None, "tensor"), ("tensor", 2)),
        lambda: named(PartitionSpec(None, None, None, "tensor"), ("tensor", 4)),
        lambda: named(PartitionSpec(), ("tensor", 4)),
        lambda: SingleDeviceSharding(jax.devices("cpu")[0]),
    ],
    ids=["fewer_devices", "another_axis", "copies", "one_device"],
)
def test_caches_that_moved_since_registration_are_refused(sharding: Any, pool: HostPool) -> None:
    case = MESH_CASES["separate_kv"]
    kv_caches, canonical = register(case, TENSOR_4, random_host(case, 1))
    transfer = BlockTransfer(canonical, pool)
    moved = kv_caches | {
        "layers.1": tuple(jax.device_put(leaf, sharding()) for leaf in kv_caches["layers.1"])
    }
    with transfer.reserve(GROUP, 1) as slots:
        for call in (transfer.offload, transfer.restore):
            with pytest.raises(CacheMismatchError, match=r"layer 'layers\.1', leaf 0.*was registered with"):
                call(moved, GROUP, [0], slots)
        assert transfer.offload(kv_caches, GROUP, [0], slots).wait().error is None


def test_caches_registered_whole_and_spread_later_are_refused(pool: HostPool) -> None:
    case = MESH_CASES["separate_kv"]
    host = random_host(case, 1)
    transfer = BlockTransfer(canonicalize(case.build(1), case.config, case.hints), pool)
    spread = put_on_mesh(case, TENSOR_2, host)
    with transfer.reserve(GROUP, 1) as slots:
        for call in (transfer.offload, transfer.restore):
            with pytest.raises(CacheMismatchError, match="lie on 2 devices, but were registered on one"):
                call(spread, GROUP, [0], slots)
    assert_same_caches(to_host(spread), host)


@pytest.mark.parametrize("data_shard", [-1, 2])
def test_a_data_shard_that_does_not_exist_is_refused(data_shard: int, pool: HostPool) -> None:
    case = MESH_CASES["separate_kv"].with_data_shards(2)
    _, canonical = register(case, DATA_2, random_host(case, 1))
    with pytest.raises(ConfigError, match=f"no data shard {data_shard}; .* split into 2"):
        BlockTransfer(canonical, pool, data_shard=data_shard)


def test_ids_are_local_to_a_data_shard(pool: HostPool) -> None:
    case = MESH_CASES["separate_kv"].with_data_shards(2)
    kv_caches, canonical = register(case, DATA_2_TENSOR_2, random_host(case, 1))
    transfer = BlockTransfer(canonical, pool, data_shard=1)
    with transfer.reserve(GROUP, 1) as slots, pytest.raises(IndexError, match="blocks 0 to 5"):
        transfer.offload(kv_caches, GROUP, [6], slots)


def test_processes_must_include_the_one_that_registers() -> None:
    case = MESH_CASES["mla"]
    kv_caches = put_on_mesh(case, TENSOR_2, random_host(case, 1))
    with pytest.raises(ConfigError, match=r"processes \[1, 2\] leave out 0"):
        canonicalize(kv_caches, case.config, processes=(1, 2))
